"""Several ranks: what they learn together, resume after kills, agreement, signals, errors."""

import errno
import functools
import hashlib
import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from chaos import (
    FLAGS,
    LEAST_SHARE_IN_SAVES,
    campaign,
    hold_up_the_commit,
    run_ranks,
    schedules,
    start_ranks,
)
from tools import read_log, write_bytes_data

import hellaswag
import train_gpt2
from support import checkpoint, run_directory
from support.spikes import SpikeGuard

CALM_FLAGS = """
    --n-layer 2 --n-head 2 --n-embd 32 --seq-len 32 --total-batch-tokens 512 --micro-batch 2
    --max-steps 6 --warmup-steps 2 --eval-every 3 --eval-tokens 1000 --sample-every 0
    --save-every 2 --keep 10 --dtype float32 --device cpu --no-compile
"""
CALM = CALM_FLAGS.split()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_bytes_data(tmp_path_factory.mktemp("data"))


def values(folder: Path, event: str, key: str) -> list[float]:
    return [entry[key] for entry in read_log(folder, event)]


def outputs(ranks) -> str:
    return "".join(ranks.output(rank) for rank in range(len(ranks.processes)))


def error_of(ranks) -> str:
    """What the one rank that failed says. The others say that they end with it, and no more."""
    text = outputs(ranks)
    assert "Traceback" not in text
    errors = [line for line in text.splitlines() if line.startswith("error:")]
    (error,) = [line for line in errors if not re.match(r"error: rank \d ends, since rank", line)]
    return error


def wait_for_steps(folder: Path, count: int, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    log = folder / "log.jsonl"
    while not (log.exists() and log.read_text().count('"train"') >= count):
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ------------------------------------------------------------------------------- kill and resume


# Muon leaves embeddings, positions, biases and norms to AdamW, so its runs have the state of both.
CASES = ((1, "adamw"), (1, "muon"), (2, "adamw"), (3, "muon"), (4, "muon"))


@pytest.fixture(scope="module")
def campaigns(tmp_path_factory) -> tuple[Path, dict]:
    """For each case a run with dropout, and runs killed five times in all and resumed."""
    folder = tmp_path_factory.mktemp("campaigns")
    seed = random.randrange(2**32)
    scores = {}
    for case in CASES:
        scores[case] = campaign(5, [case], folder, seed, FLAGS.split())
    return folder, scores


@pytest.mark.parametrize("case", CASES)
def test_a_killed_and_resumed_run_ends_with_the_bits_of_an_undisturbed_one(campaigns, case):
    """All files of all checkpoints, the log without timing, best.json, and the directory's list."""
    score = campaigns[1][case]
    assert score.faults == []
    assert score.kills == 5


def test_enough_of_the_kills_were_inside_saves(campaigns):
    in_saves = sum(score.in_saves for score in campaigns[1].values())
    assert in_saves >= LEAST_SHARE_IN_SAVES * 5 * len(CASES)


@pytest.mark.parametrize("world_size, optimizer", CASES[2:])
@pytest.mark.parametrize("event, key", [("train", "loss"), ("eval", "val_loss")])
def test_ranks_learn_with_dropout_what_one_process_learns(
    campaigns, world_size, optimizer, event, key
):
    folder, _ = campaigns
    one = values(folder / f"calm-1-{optimizer}", event, key)
    several = values(folder / f"calm-{world_size}-{optimizer}", event, key)
    assert np.allclose(one, several, atol=1e-4, rtol=0)


@pytest.mark.parametrize("world_size, optimizer", CASES[2:])
def test_a_fork_on_ranks_ends_with_the_bits_of_its_parent(
    campaigns, tmp_path, world_size, optimizer
):
    parent = campaigns[0] / f"calm-{world_size}-{optimizer}"
    before, last = sorted(parent.glob("step_*"))[-2:]
    run_ranks(world_size, ["--fork", before, "--out", tmp_path / "fork"], tmp_path / "output")
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (tmp_path / "fork" / last.name / file).read_bytes() == (last / file).read_bytes()


def print_how_gradients_differ() -> None:
    """Of two passes over the first batch, before the first update."""
    real = train_gpt2.train_step

    def step(loss_fn, optimizer, batch, config, rt, *rest):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        passes = []
        for _ in range(2):
            for windows in batch.split(config.micro_batch):
                train_gpt2.micro_batch_loss(loss_fn, windows, config, rt, 0).backward()
            passes.append([p.grad.clone() for p in parameters])
            optimizer.zero_grad(set_to_none=False)
        different = sum(int((a != b).sum()) for a, b in zip(*passes, strict=True))
        rt.say(f"{different} elements differ")
        return real(loss_fn, optimizer, batch, config, rt, *rest)

    train_gpt2.train_step = step


def test_the_first_step_of_three_ranks_sums_in_the_order_of_all_others(data, tmp_path):
    """Or a continued run, which has one more first step, would end with other bits."""
    flags = ["--total-batch-tokens", 768, "--max-steps", 1, "--eval-every", 0, "--save-every", 0]
    args = ["--data", data, *CALM, *flags, "--out", tmp_path / "run"]
    ranks = run_ranks(3, args, tmp_path / "output", prepare=print_how_gradients_differ)
    assert "\n0 elements differ\n" in ranks.output()


# --------------------------------------------------------------------------------- deterministic


def hash_of_weights(run: Path) -> str:
    return hashlib.sha256((run / "step_000006/model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def deterministic(data, tmp_path_factory) -> Path:
    """Deterministic runs on one, two and four ranks, in ranks-1, ranks-2 and ranks-4."""
    folder = tmp_path_factory.mktemp("deterministic")
    for world_size in (1, 2, 4):
        args = ["--data", data, *CALM, "--deterministic", "--out", folder / f"ranks-{world_size}"]
        run_ranks(world_size, args, folder / "output")
    return folder


@pytest.mark.learning
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_deterministic_run_gives_the_same_weights_on_any_number_of_ranks(
    deterministic, world_size
):
    one = hash_of_weights(deterministic / "ranks-1")
    assert hash_of_weights(deterministic / f"ranks-{world_size}") == one


def test_a_deterministic_run_resumed_on_4_then_2_then_1_ranks_gives_the_same_weights(
    deterministic, tmp_path
):
    run = Path(shutil.copytree(deterministic / "ranks-4", tmp_path / "run"))
    shutil.rmtree(run / "step_000006")
    shutil.rmtree(run / "step_000004")
    run_ranks(2, ["--out", run, "--resume"], tmp_path / "output")
    shutil.rmtree(run / "step_000006")
    run_ranks(1, ["--out", run, "--resume"], tmp_path / "output")
    assert hash_of_weights(run) == hash_of_weights(deterministic / "ranks-1")


def test_a_run_of_two_ranks_forked_on_one_ends_with_the_bits_of_its_parent(deterministic, tmp_path):
    parent = deterministic / "ranks-2" / "step_000004"
    run_ranks(1, ["--fork", parent, "--out", tmp_path / "run"], tmp_path / "output")
    assert hash_of_weights(tmp_path / "run") == hash_of_weights(deterministic / "ranks-2")


def test_deterministic_runs_killed_on_changing_numbers_of_ranks_end_with_the_same_bits(tmp_path):
    """Two random schedules, one of each optimizer; also on one rank nothing may differ."""
    score = schedules(2, tmp_path, random.randrange(2**32), FLAGS.split())
    assert score.faults == []
    assert score.runs == 2


def test_a_deterministic_run_learns_what_others_learn(deterministic, data, tmp_path):
    run_ranks(2, ["--data", data, *CALM, "--out", tmp_path / "run"], tmp_path / "output")
    for event, key in (("train", "loss"), ("train", "grad_norm"), ("eval", "val_loss")):
        other = values(deterministic / "ranks-2", event, key)
        assert np.allclose(values(tmp_path / "run", event, key), other, atol=1e-4, rtol=0)


def test_a_deterministic_run_refuses_three_ranks(data, tmp_path):
    args = ["--data", data, *CALM, "--total-batch-tokens", 768, "--deterministic"]
    with start_ranks(3, [*args, "--out", tmp_path / "run"], tmp_path / "output") as ranks:
        assert ranks.wait() == [2, 2, 2]
    assert "3 ranks in a deterministic run" in ranks.output()


# ------------------------------------------------------------------- spikes, bits, and full disks


def put_a_spike_into_step_4() -> None:
    """On every rank; two losses are enough to judge it by."""
    real = train_gpt2.step_batch

    def with_a_foreign_batch(data, config, first_sample, *ranks):
        batch = real(data, config, first_sample, *ranks)
        is_foreign = first_sample == 3 * config.sequences_per_step
        return torch.full_like(batch, 200) if is_foreign else batch

    train_gpt2.step_batch = with_a_foreign_batch
    SpikeGuard.WINDOW = SpikeGuard.LEAST = 2
    SpikeGuard.LIMIT = 1.0


def test_ranks_leave_out_the_same_updates_also_when_resumed_on_another_number(data, tmp_path):
    """A save in between, at step 2, and a comparison of the ranks at each save."""
    args = ["--data", data, *CALM, "--deterministic", "--skip-spikes"]
    start = {"prepare": put_a_spike_into_step_4}
    for world_size in (1, 2):
        run = tmp_path / f"ranks-{world_size}"
        run_ranks(world_size, [*args, "--out", run], tmp_path / "output", **start)
        assert [entry["left_out"] for entry in read_log(run, "spike")] == [True]
    assert hash_of_weights(tmp_path / "ranks-1") == hash_of_weights(tmp_path / "ranks-2")
    for step in ("step_000006", "step_000004"):
        shutil.rmtree(run / step)
    run_ranks(4, ["--out", run, "--resume"], tmp_path / "output", **start)
    assert hash_of_weights(tmp_path / "ranks-1") == hash_of_weights(run)


def flip_a_bit_of_the_weights() -> None:
    flip_a_bit(lambda training: training.model.transformer.wte.weight)


def flip_a_bit_of_the_moments() -> None:
    flip_a_bit(lambda training: next(iter(training.optimizer.parts[0].state.values()))["momentum"])


def flip_a_bit(tensor_of) -> None:
    """In the memory of rank 1, right before step 4 is saved."""
    real = train_gpt2.EVENTS["save"]

    def flip_and_save(step, training):
        if step == 4 and training.rt.rank == 1:
            tensor_of(training).detach().view(torch.int32).view(-1)[5] ^= 1
        real(step, training)

    train_gpt2.EVENTS["save"] = flip_and_save


@pytest.mark.parametrize(
    "world_size, flip", [(3, flip_a_bit_of_the_weights), (2, flip_a_bit_of_the_moments)]
)
def test_a_bit_that_flips_in_one_rank_is_noticed_before_it_is_saved(
    data, tmp_path, world_size, flip
):
    run = tmp_path / "run"
    args = ["--data", data, *CALM, "--total-batch-tokens", 768, "--out", run]
    with start_ranks(world_size, args, tmp_path / "output", prepare=flip) as ranks:
        assert ranks.wait() == [2] * world_size
    text = error_of(ranks)
    assert "step 4: weights or moments of rank 1 are not those of rank 0" in text
    assert [folder.name for folder in run.glob("step_*")] == ["step_000002"]


def fill_the_disk_for_the_writer() -> None:
    """The thread that writes the checkpoint meets it."""
    checkpoint.save_file = full_disk


def fill_the_disk_for_the_copy() -> None:
    """The training loop meets it, where it begins a save."""
    run_directory.file_sha256 = full_disk


def fill_the_disk_for_the_log() -> None:
    run_directory.append = full_disk


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the/file")


@pytest.mark.parametrize(
    "fault, save_every",
    [
        (fill_the_disk_for_the_writer, 3),
        (fill_the_disk_for_the_copy, 3),
        (fill_the_disk_for_the_log, 0),
    ],
)
def test_what_rank_0_cannot_write_ends_every_rank_with_a_line_that_says_so(
    data, tmp_path, fault, save_every
):
    flags = ["--max-steps", 1_000_000, "--save-every", save_every]
    args = ["--data", data, *CALM, *flags, "--out", tmp_path / "run"]
    with start_ranks(2, args, tmp_path / "output", prepare=fault) as ranks:
        assert ranks.wait(60) == [2, 2]
    reason = "the/file: No space left on device; expected to read or write it"
    assert ranks.output(0).splitlines()[-1].startswith(f"error: {reason}")
    (line,) = ranks.output(1).splitlines()
    assert line.startswith(f"error: rank 1 ends, since rank 0 has failed: {reason}")
    assert "Traceback" not in ranks.output(0)


def test_a_second_ctrl_c_does_not_wait_for_a_checkpoint_that_is_being_written(data, tmp_path):
    run = tmp_path / "run"
    args = ["--data", data, *CALM, "--out", run]
    slowly = functools.partial(hold_up_the_commit, seconds=600)
    with start_ranks(1, args, tmp_path / "output", prepare=slowly) as ranks:
        wait_for_steps(run, 5)
        for _ in range(2):
            os.kill(ranks.processes[0].pid, signal.SIGINT)
            time.sleep(0.5)
        assert ranks.wait(20) == [130]
    assert ranks.output().splitlines()[-1] == "interrupted"
    run_ranks(1, ["--out", run, "--resume"], tmp_path / "output")
    assert [entry["step"] for entry in read_log(run, "train")] == [1, 2, 3, 4, 5, 6]


# --------------------------------------------------------------------------- agreement and errors


def test_ranks_with_other_flags_end_with_one_line_that_names_them(data, tmp_path):
    args = ["--data", data, *CALM, "--out", tmp_path / "run"]
    other = {1: ["--seed", 1]}
    with start_ranks(2, args, tmp_path / "output", args_of_rank=other) as ranks:
        assert ranks.wait() == [2, 2]
    text = error_of(ranks)
    assert "the flags or the data of rank 1 differ from rank 0's: --seed;" in text


def enter_folder_of_rank(folder: Path) -> None:
    """As on machines that have a file system each: one path leads to other places."""
    os.chdir(folder / f"rank-{os.environ['RANK']}")


def copy_for_each_rank(data: Path, folder: Path) -> Callable[[], None]:
    """Folders rank-0 and rank-1 with a corpus each; returns how a rank enters its own."""
    for rank in (0, 1):
        shutil.copytree(data, folder / f"rank-{rank}/data")
    return functools.partial(enter_folder_of_rank, folder)


def change_a_hash(folder: Path) -> None:
    """The manifest is that of other tokens."""
    manifest = folder / "manifest.json"
    content = json.loads(manifest.read_text())
    content["shards"][0]["sha256"] = 64 * "0"
    manifest.write_text(json.dumps(content))


def remove_a_shard(folder: Path) -> None:
    (folder / "text_train_000001.bin").unlink()


@pytest.mark.parametrize(
    "harm, message",
    [
        (change_a_hash, "of rank 1 differ from rank 0's: the contents of --data;"),
        (remove_a_shard, "text_train_000001.bin"),
    ],
)
def test_ranks_with_other_shards_end_with_one_line_that_says_so(data, tmp_path, harm, message):
    prepare = copy_for_each_rank(data, tmp_path)
    harm(tmp_path / "rank-1/data")
    args = ["--data", "data", *CALM, "--out", "run"]
    with start_ranks(2, args, tmp_path / "output", prepare=prepare) as ranks:
        assert ranks.wait(60) == [2, 2]
    text = error_of(ranks)
    assert message in text
    assert "lost another rank" not in text


def test_a_rank_that_does_not_see_the_run_directory_gets_its_state_from_rank_0(data, tmp_path):
    """Without DDP, which would send the weights, though not the moments."""
    prepare = copy_for_each_rank(data, tmp_path)
    flags = ["--deterministic", "--optimizer", "muon", "--eval-every", 0]
    args = ["--data", "data", *CALM, *flags, "--out", "run"]
    run_ranks(2, args, tmp_path / "output", prepare=prepare)
    run = tmp_path / "rank-0/run"
    assert not (tmp_path / "rank-1/run").exists()
    weights = hash_of_weights(run)
    shutil.rmtree(run / "step_000006")
    run_ranks(2, [*args, "--resume"], tmp_path / "output", prepare=prepare)
    assert hash_of_weights(run) == weights
    assert [entry["step"] for entry in read_log(run, "train")] == [1, 2, 3, 4, 5, 6]


def test_a_run_directory_that_is_newer_on_another_rank_is_refused(data, tmp_path):
    """Rank 0 would begin the run anew."""
    prepare = copy_for_each_rank(data, tmp_path)
    (tmp_path / "rank-1/run/step_000006").mkdir(parents=True)
    args = ["--data", "data", *CALM, "--out", "run", "--resume"]
    with start_ranks(2, args, tmp_path / "output", prepare=prepare) as ranks:
        assert ranks.wait(60) == [2, 2]
    text = error_of(ranks)
    assert "run: rank 1 sees step 6 there, and rank 0 no checkpoint" in text
    assert not (tmp_path / "rank-0/run/train.json").exists()


def test_bad_input_that_only_rank_0_reads_ends_all_ranks_with_one_line(tmp_path):
    args = ["--data", tmp_path / "missing", *CALM, "--out", tmp_path / "run"]
    with start_ranks(4, args, tmp_path / "output") as ranks:
        assert ranks.wait(60) == [2, 2, 2, 2]
    text = error_of(ranks)
    assert str(tmp_path / "missing") in text


def test_a_directory_in_use_ends_all_ranks_with_one_line(data, tmp_path):
    args = ["--data", data, *CALM, "--max-steps", 100_000, "--out", tmp_path / "run"]
    with start_ranks(1, args, tmp_path / "first") as first:
        wait_for_steps(tmp_path / "run", 1)
        with start_ranks(2, [*args, "--resume"], tmp_path / "second") as second:
            assert second.wait(60) == [2, 2]
        assert first.running()
    text = error_of(second)
    assert f"in use by process {first.processes[0].pid}" in text


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_all_of_them_at_the_same_saved_step(data, tmp_path, rank):
    run = tmp_path / "run"
    flags = ["--max-steps", 100_000, "--save-every", 50_000, "--eval-every", 0]
    args = ["--data", data, *CALM, *flags, "--out", run]
    with start_ranks(2, args, tmp_path / "output") as ranks:
        wait_for_steps(run, 3)
        os.kill(ranks.processes[rank].pid, signal.SIGTERM)
        assert ranks.wait(60) == [143, 143]
    (checkpoint,) = run.glob("step_*")
    assert int(checkpoint.name.removeprefix("step_")) == len(read_log(run, "train"))
    assert "Traceback" not in outputs(ranks)


def test_only_rank_0_prints(data, tmp_path):
    ranks = run_ranks(
        2, ["--data", data, *CALM, "--max-steps", 1, "--out", tmp_path / "run"], tmp_path / "output"
    )
    assert ranks.output(0).count("recipe first-run") == 1
    assert ranks.output(1) == ""


# ------------------------------------------------------------------------ compiled, and HellaSwag


def test_two_compiled_ranks_with_accumulation_have_the_gradients_of_eager_ones(data, tmp_path):
    """31 MB of gradients: more than one of DDP's buckets, which cut the compiled graph."""
    shape = ["--n-layer", 1, "--n-embd", 800, "--n-head", 8, "--max-steps", 2, "--eval-every", 0]
    args = ["--data", data, *CALM, *shape, "--total-batch-tokens", 256, "--save-every", 0]
    for name, compiled in (("eager", "--no-compile"), ("compiled", "--compile")):
        run_ranks(2, [*args, compiled, "--out", tmp_path / name], tmp_path / "output", timeout=300)
    for key in ("loss", "grad_norm"):
        eager = values(tmp_path / "eager", "train", key)
        assert np.allclose(values(tmp_path / "compiled", "train", key), eager, rtol=1e-4)


def use_a_few_hellaswag_items() -> None:
    """The last ending is right, and is the likeliest of any model, because it is the shortest."""
    endings = ("sat on the mat.", "flew far away.", "sang many songs.", "was.")
    items = [hellaswag.Item(f"Cat {i}", endings, 3) for i in range(7)]  # no multiple of the ranks
    hellaswag.find_items = lambda rt: items
    hellaswag.BATCH_TOKENS["cpu"] = 64  # several batches, so that each rank has some


def test_hellaswag_in_a_distributed_run_scores_what_one_process_scores(data, tmp_path):
    args = ["--data", data, *CALM, "--hellaswag-every", 3, "--save-every", 0]
    for world_size in (1, 2):
        out = ["--out", tmp_path / f"ranks-{world_size}"]
        run_ranks(world_size, [*args, *out], tmp_path / "output", prepare=use_a_few_hellaswag_items)
    one = read_log(tmp_path / "ranks-1", "hellaswag")
    assert [entry["step"] for entry in one] == [3, 6]
    assert one[0]["items"] == 7
    assert one[0]["acc"] == 1
    assert read_log(tmp_path / "ranks-2", "hellaswag") == one


def fail_in_hellaswag_on_rank_1() -> None:
    use_a_few_hellaswag_items()
    hellaswag.BATCH_TOKENS = {"cpu": 20}  # several batches for each rank
    if os.environ["RANK"] == "1":
        hellaswag.log_probabilities = mock.Mock(side_effect=KeyError("a fault of it"))


def test_a_fault_of_hellaswag_on_one_rank_is_a_warning_and_all_ranks_stay_in_step(data, tmp_path):
    args = ["--data", data, *CALM, "--hellaswag-every", 3, "--out", tmp_path / "run"]
    ranks = run_ranks(2, args, tmp_path / "output", prepare=fail_in_hellaswag_on_rank_1)
    assert len(values(tmp_path / "run", "train", "loss")) == 6
    assert read_log(tmp_path / "run", "hellaswag") == []
    text = outputs(ranks)
    assert text.count("warning: HellaSwag is not scored") == 1
    assert "rank 1: KeyError: 'a fault of it'" in text


def lose_hellaswag() -> None:
    hellaswag.find_items = lambda rt: None


def test_without_hellaswags_items_the_run_goes_on(data, tmp_path):
    args = ["--data", data, *CALM, "--hellaswag-every", 3, "--out", tmp_path / "run"]
    ranks = run_ranks(2, args, tmp_path / "output", prepare=lose_hellaswag)
    assert "warning" not in ranks.output()
    assert len(values(tmp_path / "run", "train", "loss")) == 6


def see_no_log_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        run_directory.read_log = lambda folder: iter(())


def test_ranks_that_see_an_older_log_do_as_rank_0(data, tmp_path):
    """As on another machine, whose network file system is late."""
    args = ["--data", data, *CALM, "--out", tmp_path / "run"]
    run_ranks(2, args, tmp_path / "output")
    args.append("--resume")
    with start_ranks(2, args, tmp_path / "output", prepare=see_no_log_on_rank_1) as ranks:
        assert ranks.wait(30) == [0, 0]
    assert [entry["step"] for entry in read_log(tmp_path / "run", "eval")] == [0, 3, 6]
