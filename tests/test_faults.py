"""What a training process meets from outside: signals, full disks, lost readers, little memory."""

import errno
import functools
import itertools
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from chaos import differences, final_state, hold_up_the_commit, run_ranks, start_ranks
from tools import start_script, write_bytes_data

import train_gpt2
from support import checkpoint, optimizer, run_directory
from support.run_directory import RunDirectory
from support.spikes import SpikeGuard

FLAGS = """
    --n-layer 2 --n-head 2 --n-embd 32 --seq-len 32 --total-batch-tokens 256 --micro-batch 4
    --max-steps 8 --warmup-steps 2 --eval-every 4 --eval-tokens 500 --sample-every 0
    --save-every 4 --keep 10 --dtype float32 --device cpu --no-compile
"""
TINY = FLAGS.split()
FOREVER = ["--max-steps", 1_000_000, "--save-every", 500_000, "--eval-every", 0]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_bytes_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    run_ranks(1, ["--data", data, *TINY, "--out", folder / "run"], folder / "output")
    return folder / "run"


def wait_until(condition, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def steps_logged(run: Path) -> int:
    log = run / "log.jsonl"
    return log.read_text().count('"train"') if log.exists() else 0


def valid_steps(run: Path) -> list[str]:
    folders = run_directory.step_directories(run)
    return [folder.name for folder in folders if checkpoint.fault_of(folder) is None]


def one_error_line(ranks) -> str:
    """The last line of what a run has printed, which is its only error."""
    lines = ranks.output().splitlines()
    assert [line for line in lines if line.startswith(("error:", "Traceback"))] == lines[-1:]
    return lines[-1]


# --------------------------------------------------------------------------------------- signals


def sleep_in_the_third_update() -> None:
    real = train_gpt2.train_step
    calls = []

    def step(*args):
        calls.append(1)
        if len(calls) == 3:
            time.sleep(600)
        return real(*args)

    train_gpt2.train_step = step


def test_a_second_ctrl_c_stops_at_once(data, tmp_path):
    """The update in hand would take ten minutes; nothing is saved."""
    run = tmp_path / "run"
    args = ["--data", data, *TINY, "--out", run]
    with start_ranks(1, args, tmp_path / "output", prepare=sleep_in_the_third_update) as ranks:
        wait_until(lambda: steps_logged(run) == 2)
        time.sleep(0.2)
        pid = ranks.processes[0].pid
        os.kill(pid, signal.SIGINT)
        time.sleep(0.5)
        assert ranks.running()
        os.kill(pid, signal.SIGINT)
        assert ranks.wait(30) == [130]
    assert valid_steps(run) == []
    assert "Traceback" not in ranks.output()


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_a_closed_terminal_or_a_schedulers_warning_saves_and_stops(data, tmp_path, name):
    run = tmp_path / "run"
    args = ["--data", data, *TINY, *FOREVER, "--out", run]
    with start_ranks(1, args, tmp_path / "output") as ranks:
        wait_until(lambda: steps_logged(run) >= 2)
        signum = getattr(signal, name)
        os.kill(ranks.processes[0].pid, signum)
        assert ranks.wait(30) == [128 + signum]
    assert valid_steps(run) == [f"step_{steps_logged(run):06d}"]


def test_a_signal_during_a_background_save_lets_it_commit(data, tmp_path):
    run = tmp_path / "run"
    args = ["--data", data, *TINY, *FOREVER, "--save-every", 4, "--out", run]
    slowly = functools.partial(hold_up_the_commit, seconds=1)  # in which a signal can come
    with start_ranks(1, args, tmp_path / "output", prepare=slowly) as ranks:
        wait_until(lambda: (run / ".step_000004.tmp/manifest.json").exists())
        os.kill(ranks.processes[0].pid, signal.SIGTERM)
        assert ranks.wait(30) == [143]
    assert valid_steps(run)[0] == "step_000004"
    assert valid_steps(run)[-1] == f"step_{steps_logged(run):06d}"


def die_in_the_last_save() -> None:
    real = checkpoint.write_file

    def write_or_die(file, *parts):
        if ".step_000008.tmp" in str(file) and file.name == "manifest.json":
            os.kill(os.getpid(), signal.SIGKILL)
        return real(file, *parts)

    checkpoint.write_file = write_or_die


def test_kill_9_during_a_background_save_loses_nothing_that_a_resume_does_not_make_good(
    data, finished, tmp_path
):
    run = tmp_path / "run"
    args = ["--data", data, *TINY, "--out", run]
    with start_ranks(1, args, tmp_path / "output", prepare=die_in_the_last_save) as ranks:
        assert ranks.wait() == [-signal.SIGKILL]
    assert (run / ".step_000008.tmp").is_dir()
    assert valid_steps(run) == ["step_000004"]
    run_ranks(1, ["--out", run, "--resume"], tmp_path / "output")
    assert differences(final_state(finished), final_state(run)) == []


def die_before_the_last_pruning() -> None:
    real = run_directory.prune

    def prune_or_die(run, keep, spare):
        if (run / "step_000008").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        real(run, keep, spare)

    run_directory.prune = prune_or_die


def test_kill_9_before_the_last_pruning_leaves_no_checkpoint_too_many(data, tmp_path):
    run = tmp_path / "run"
    args = ["--data", data, *TINY, "--keep", 1, "--out", run]
    with start_ranks(1, args, tmp_path / "output", prepare=die_before_the_last_pruning) as ranks:
        assert ranks.wait() == [-signal.SIGKILL]
    assert valid_steps(run) == ["step_000004", "step_000008"]
    run_ranks(1, ["--out", run, "--resume"], tmp_path / "output")
    assert valid_steps(run) == ["step_000008"]


# ------------------------------------------------------------------------------ negative controls
#
# What chaos.py compares must depend on each item of the state. In each of these controls a run is
# continued with one item left out, and then it must not end as an undisturbed one does.


def change_what_is_loaded(change) -> None:
    real = RunDirectory.load_newest
    RunDirectory.load_newest = lambda run: change(real(run))


def forget_a_tensor(kind: str) -> None:
    def forget(checkpoint):
        moments = checkpoint.moments
        assert any(name.endswith(kind) for name in moments)
        zeros = {name: moments[name] * 0 for name in moments if name.endswith(kind)}
        return replace(checkpoint, moments=moments | zeros)

    change_what_is_loaded(forget)


def change_the_state(**values) -> None:
    change_what_is_loaded(lambda checkpoint: replace(checkpoint, state=checkpoint.state | values))


def forget_exp_avg() -> None:
    forget_a_tensor(".exp_avg")


def forget_exp_avg_sq() -> None:
    forget_a_tensor(".exp_avg_sq")


def forget_momentum() -> None:
    forget_a_tensor(".momentum")


def forget_weights() -> None:
    real = train_gpt2.load_weights
    train_gpt2.load_weights = lambda model, checkpoint, *rest: real(model, None, *rest)


def forget_the_steps_of_adamw() -> None:
    real = optimizer.load_optimizer_tensors
    optimizer.load_optimizer_tensors = lambda model, optim, tensors, step: real(
        model, optim, tensors, 0
    )


def begin_data_anew() -> None:
    real = train_gpt2.step_batch
    train_gpt2.step_batch = lambda data, config, sample, *ranks: real(
        data, config, sample - 6 * config.sequences_per_step, *ranks
    )


def begin_dropout_anew() -> None:
    real = train_gpt2.micro_batch_loss
    train_gpt2.micro_batch_loss = lambda loss_fn, windows, config, rt, number: real(
        loss_fn, windows, config, rt, number - 6 * config.sequences_per_step // config.micro_batch
    )


def begin_the_schedule_anew() -> None:
    real = train_gpt2.learning_rate
    train_gpt2.learning_rate = lambda step, config: real(step - 6, config)


def forget_the_step() -> None:
    change_the_state(step=5)


def forget_the_time() -> None:
    change_the_state(elapsed=0.0)


def forget_the_lowest_loss() -> None:
    RunDirectory.lowest_validation_loss = lambda run: float("inf")


def forget_losses() -> None:
    real = SpikeGuard.load
    SpikeGuard.load = lambda guard, state: real(guard, state | {"losses": []})


def forget_updates_left_out() -> None:
    real = SpikeGuard.load
    SpikeGuard.load = lambda guard, state: real(guard, state | {"left_out": 0})


def leave_the_log_as_it_is() -> None:
    run_directory.cut_log = lambda run, step, warn: None


def forget_what_was_logged() -> None:
    RunDirectory.has_logged = lambda run, event, step: False


def leave_half_written_files() -> None:
    run_directory.remove_leftovers = lambda folder: None


def make_spikes_frequent() -> None:
    SpikeGuard.WINDOW = SpikeGuard.LEAST = 3
    SpikeGuard.LIMIT = 1.0


def remember_all() -> None:
    pass


# Each with something that must differ in the end.
CONTROLS = {
    forget_weights: "step_000008/model.safetensors",
    forget_exp_avg: "step_000008/model.safetensors",
    forget_exp_avg_sq: "step_000008/model.safetensors",
    forget_momentum: "step_000008/model.safetensors",
    forget_the_steps_of_adamw: "step_000008/model.safetensors",
    begin_data_anew: "log",
    begin_dropout_anew: "log",
    begin_the_schedule_anew: "log",
    forget_the_step: "log",
    forget_the_time: "time in the log rises",
    forget_the_lowest_loss: "best.json",
    forget_losses: "step_000008/state.json",
    forget_updates_left_out: "step_000008/state.json",
    leave_the_log_as_it_is: "log",
    forget_what_was_logged: "log",
    leave_half_written_files: "directory",
}


@pytest.fixture(scope="module")
def rich(data, tmp_path_factory) -> Path:
    """A run with every item of the state: dropout, Muon, updates left out, an early best step."""
    folder = tmp_path_factory.mktemp("rich")
    events = ["--save-every", 2, "--eval-every", 2, "--keep-best", "--skip-spikes"]
    rates = ["--optimizer", "muon", "--learning-rate", 0.1, "--muon-learning-rate", 0.5]
    args = ["--data", data, *TINY, *events, *rates, "--dropout", 0.1, "--out", folder / "run"]
    run_ranks(1, args, folder / "output", prepare=make_spikes_frequent)
    state = json.loads((folder / "run/step_000006/state.json").read_text())
    best = json.loads((folder / "run/best.json").read_text())
    assert state["spikes"]["left_out"] > 0
    assert best["step"] < 6
    return folder / "run"


def prepare_control(control) -> None:
    make_spikes_frequent()
    control()


def continued_from_step_6(rich: Path, tmp_path: Path, control) -> list[str]:
    """What differs at the end when the run is killed after step 8 was logged and not saved."""
    run = Path(shutil.copytree(rich, tmp_path / "run"))
    (run / "step_000008").rename(run / ".0123456789abcdef.tmp")
    prepare = functools.partial(prepare_control, control)
    run_ranks(1, ["--out", run, "--resume"], tmp_path / "output", prepare=prepare)
    return differences(final_state(rich), final_state(run))


def test_with_all_of_the_state_a_continued_run_ends_as_an_undisturbed_one(rich, tmp_path):
    assert continued_from_step_6(rich, tmp_path, remember_all) == []


@pytest.mark.parametrize("control", CONTROLS)
def test_without_an_item_of_the_state_a_continued_run_ends_otherwise(rich, tmp_path, control):
    assert CONTROLS[control] in continued_from_step_6(rich, tmp_path, control)


def let_the_wall_clock_run_backwards() -> None:
    times = itertools.count(2_000_000_000, -3600)
    time.time = lambda: float(next(times))


def test_a_wall_clock_that_jumps_changes_nothing(data, finished, tmp_path):
    run = tmp_path / "run"
    args = ["--data", data, *TINY, "--out", run]
    run_ranks(1, args, tmp_path / "output", prepare=let_the_wall_clock_run_backwards)
    assert differences(final_state(finished), final_state(run)) == []


# -------------------------------------------------------------------------------- disk and memory


def allow_only_small_files() -> None:
    """Writing past 60 kB fails with EFBIG, as ENOSPC does on a full disk. The weights have 140."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


def test_a_full_disk_keeps_the_old_checkpoint_and_is_one_line_that_names_the_file(
    finished, tmp_path
):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(run / "step_000008")
    args = ["--out", run, "--resume"]
    with start_ranks(1, args, tmp_path / "output", prepare=allow_only_small_files) as ranks:
        assert ranks.wait() == [2]
    assert f"{run}/.step_000008.tmp/model.safetensors" in one_error_line(ranks)
    assert valid_steps(run) == ["step_000004"]


def fill_the_disk_for_the_log() -> None:
    real = os.fsync

    def fail_for_files_that_grow(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("log.jsonl"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    os.fsync = fail_for_files_that_grow


def test_a_log_that_cannot_be_written_is_one_line_that_names_it(data, tmp_path):
    run = tmp_path / "run"
    args = ["--data", data, *TINY, "--out", run]
    with start_ranks(1, args, tmp_path / "output", prepare=fill_the_disk_for_the_log) as ranks:
        assert ranks.wait() == [2]
    assert f"{run / 'log.jsonl'}: No space left on device" in one_error_line(ranks)


def test_a_directory_that_cannot_be_written_is_refused_before_any_work(data, tmp_path):
    if os.geteuid() == 0:  # modes do not bind root, but nobody can make a directory in /proc/sys
        parent = Path("/proc/sys")
    else:
        parent = tmp_path / "read-only"
        parent.mkdir(mode=0o500)
    args = ["--data", data, *TINY, "--out", parent / "run"]
    with start_ranks(1, args, tmp_path / "output") as ranks:
        assert ranks.wait() == [2]
    assert str(parent / "run") in one_error_line(ranks)
    assert "validation loss" not in ranks.output()


def leave_little_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))


def test_too_little_memory_is_one_line_that_names_the_flag_to_lower(data, tmp_path):
    size = ["--total-batch-tokens", 2**19, "--micro-batch", 2**14, "--eval-every", 0]
    args = ["--data", data, *TINY, *size, "--out", tmp_path / "run"]
    with start_ranks(1, args, tmp_path / "output", prepare=leave_little_memory) as ranks:
        assert ranks.wait() == [2]
    assert "--micro-batch" in one_error_line(ranks)


# ---------------------------------------------------------------------------------- other processes


def test_a_reader_of_stdout_that_goes_away_does_not_end_the_run(data, tmp_path):
    """As in `python train_gpt2.py | head -1`."""
    run = tmp_path / "run"
    args = ["--data", data, *TINY, "--out", run]
    process = start_script(
        "train_gpt2.py", *args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(120) == 0, err
    assert "Traceback" not in err
    assert valid_steps(run) == ["step_000004", "step_000008"]


def close_stdout_and_stderr() -> None:
    """What Python makes of `>&- 2>&-`."""
    sys.stdout = sys.stderr = None


def test_closed_stdout_and_stderr_do_not_end_the_run(data, tmp_path):
    run = tmp_path / "run"
    args = ["--data", data, *TINY, "--out", run]
    run_ranks(1, args, tmp_path / "output", prepare=close_stdout_and_stderr)
    assert valid_steps(run) == ["step_000004", "step_000008"]


def test_a_second_run_in_the_directory_is_refused_with_the_process_that_holds_it(data, tmp_path):
    run = tmp_path / "run"
    args = ["--data", data, *TINY, *FOREVER, "--out", run]
    with start_ranks(1, args, tmp_path / "first") as first:
        wait_until(lambda: steps_logged(run) >= 1)
        with start_ranks(1, [*args, "--resume"], tmp_path / "second") as second:
            assert second.wait(60) == [2]
        assert first.running()
        assert f"in use by process {first.processes[0].pid}" in one_error_line(second)


def use_port(port: int) -> None:
    os.environ["MASTER_PORT"] = str(port)


def test_a_port_in_use_is_one_line_that_names_it(data, tmp_path):
    args = ["--data", data, *TINY, "--out", tmp_path / "run"]
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        prepare = functools.partial(use_port, port)
        with start_ranks(2, args, tmp_path / "output", prepare=prepare) as ranks:
            ranks.processes[0].join(60)
            assert ranks.processes[0].exitcode == 2
    line = one_error_line(ranks)
    assert f"127.0.0.1:{port}" in line
    assert "expected a free port" in line


def test_a_run_whose_process_was_killed_can_be_resumed_at_once(data, tmp_path):
    run = tmp_path / "run"
    args = ["--data", data, *TINY, "--out", run]
    with start_ranks(1, [*args, *FOREVER], tmp_path / "first") as first:
        wait_until(lambda: steps_logged(run) >= 1)
        first.kill()
    with start_ranks(1, ["--out", run, "--resume", *FOREVER], tmp_path / "second") as second:
        # Nothing had been saved, so the second one puts the first one's log aside.
        wait_until(lambda: not second.running() or (run / "log-old.jsonl").exists())
        wait_until(lambda: not second.running() or steps_logged(run) >= 1)
        assert second.running()


def use_a_matplotlib_backend_that_is_not_there() -> None:
    """Matplotlib reads the variable when it is imported; the fork server has done that before."""
    os.environ["MPLBACKEND"] = "no-such-backend"
    for name in list(sys.modules):
        if name.partition(".")[0] == "matplotlib":
            del sys.modules[name]


def test_a_matplotlib_backend_of_a_notebook_does_not_end_the_run(data, tmp_path):
    run = tmp_path / "run"
    args = ["--data", data, *TINY, "--out", run]
    prepare = use_a_matplotlib_backend_that_is_not_there
    ranks = run_ranks(1, args, tmp_path / "output", prepare=prepare)
    assert valid_steps(run) == ["step_000004", "step_000008"]
    assert ranks.output().count("warning: no curves are drawn") == 1
