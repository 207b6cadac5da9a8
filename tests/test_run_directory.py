"""Checkpoints and run directories: commit, verification, pruning, the log, forks, `--model`."""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tools import ROOT, tiny_model

from model import GPT
from support import checkpoint, files, huggingface, run_directory
from support.run_directory import Checkpoint, RunDirectory, fault_of, newest_valid
from support.script import UserError, exit_code_and_message
from tokens import get_encoding

BYTES = get_encoding("bytes")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pair():
    """Weights and moments, as they are handed to a save."""
    torch.manual_seed(0)
    return trained()


def trained() -> tuple[dict, dict]:
    weights = {name: p.detach() for name, p in tiny_model().named_parameters()}
    moments = {}
    for name, weight in weights.items():
        moments[f"{name}.exp_avg"] = torch.randn_like(weight)
        moments[f"{name}.exp_avg_sq"] = torch.rand_like(weight)
    return weights, moments


def save_in(run: RunDirectory, step: int, pair, **how) -> None:
    end = BYTES.eot_token
    config, _ = tiny_model().saved_form(encoding="bytes", bos_token_id=end, eos_token_id=end)
    state = {"data": "data", "samples": 16 * step}
    run.save(step, config, *pair, BYTES, state, **({"keep": 10} | how))


def save(folder: Path, step: int, pair, **how) -> Path:
    """Commit a checkpoint as a run does."""
    with RunDirectory(folder, tokens_per_step=512, writes=True, say=print) as run:
        save_in(run, step, pair, **how)
        run.wait_for_commit()
    return folder / f"step_{step:06d}"


def resume(folder: Path, warn=lambda *lines: None) -> Checkpoint | None:
    with RunDirectory(folder, tokens_per_step=512, writes=True, say=warn) as run:
        run.claim(may_hold_run=True)
        return run.load_newest()


def names(folder: Path) -> list[str]:
    return [path.name for path in run_directory.step_directories(folder)]


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "train.json").write_text("{}")
    return folder


# ---------------------------------------------------------------------------------- there and back


def test_weights_and_moments_come_back_to_the_last_bit(run, pair):
    found = checkpoint.load_checkpoint(save(run, 1, pair))
    for saved, loaded in zip(pair, (found.weights, found.moments), strict=True):
        assert saved.keys() == loaded.keys()
        assert all(torch.equal(saved[name], loaded[name]) for name in saved)


def test_a_checkpoint_is_a_model_that_from_pretrained_loads(run, pair):
    model = GPT.from_pretrained(save(run, 1, pair))
    assert all(torch.equal(p, pair[0][name]) for name, p in model.named_parameters())


def test_updates_during_a_background_save_do_not_reach_the_checkpoint(run, monkeypatch):
    """The writer is held up until the weights and the moments have changed."""
    weights, moments = trained()
    before = {name: tensor.clone() for name, tensor in (weights | moments).items()}
    real = run_directory.commit_checkpoint
    may_write = threading.Event()

    def commit_later(*args):
        assert may_write.wait(60)
        real(*args)

    monkeypatch.setattr(run_directory, "commit_checkpoint", commit_later)
    with RunDirectory(run, 512, writes=True, say=print) as directory:
        save_in(directory, 1, (weights, moments))
        for tensor in (weights | moments).values():
            tensor.add_(1)
        may_write.set()
        directory.wait_for_commit()
    saved = checkpoint.load_checkpoint(run / "step_000001")
    assert all(torch.equal(t, before[name]) for name, t in (saved.weights | saved.moments).items())


def test_each_tensor_file_of_a_resume_is_read_once(run, pair, monkeypatch):
    save(run, 1, pair)
    opened = []
    real = os.open

    def note(path, *args, **kwargs):
        opened.append(Path(path).name)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", note)
    assert resume(run).step == 1
    assert opened.count("model.safetensors") == opened.count("optimizer.safetensors") == 1


def test_state_json_holds_the_hash_of_train_json(run, pair):
    state = json.loads((save(run, 1, pair) / "state.json").read_text())
    assert state["train_json"] == files.file_sha256(run / "train.json")


def test_a_model_card_may_be_edited_without_damage(run, pair):
    step = save(run, 20, pair)
    card = step / "README.md"
    card.write_text(card.read_text().replace("# license: choose one, such as mit", "license: mit"))
    assert "license: mit" in card.read_text()
    assert run_directory.fault_of(step) is None and resume(run).step == 20


def test_files_follow_the_umask(run, pair):
    umask = os.umask(0o027)
    try:
        folder = save(run, 1, pair)
    finally:
        os.umask(umask)
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o640}


# ------------------------------------------------------------------- faults at each call of a save


# The functions with which a save changes the disk.
CALLS = (
    (os, "fsync"),
    (os, "rename"),
    (os, "replace"),
    (os, "mkdir"),
    (os, "chmod"),
    (os, "unlink"),
    (os, "rmdir"),
    (huggingface, "save_file"),
    (checkpoint, "save_file"),
    (run_directory, "open"),
    (files, "open"),
)


@contextlib.contextmanager
def at_call(number: int, fault, after: bool = False):
    """Call `fault(name, args)` instead of call `number` of CALLS, or right after it.

    Yields a list of the names of the calls made.
    """
    made = []

    def wrap(name: str, function):
        def wrapped(*args, **kwargs):
            if name == "open" and isinstance(args[0], int):  # an open file gets a Python object
                return function(*args, **kwargs)
            made.append(name)
            is_the_one = len(made) == number
            if is_the_one and not after:
                fault(name, args)
            try:
                return function(*args, **kwargs)
            finally:
                if is_the_one and after:
                    fault(name, args)

        return wrapped

    with contextlib.ExitStack() as stack:
        for module, name in CALLS:
            wrapped = wrap(name, getattr(module, name, open))
            stack.enter_context(mock.patch.object(module, name, wrapped, create=True))
        yield made


@pytest.fixture(scope="module")
def run_at_step_1(pair, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("template") / "run"
    folder.mkdir()
    (folder / "train.json").write_text("{}")
    save(folder, 1, pair)
    return folder


@pytest.fixture(scope="module")
def calls_of_a_save(run_at_step_1, pair, tmp_path_factory) -> list[str]:
    folder = shutil.copytree(run_at_step_1, tmp_path_factory.mktemp("counted") / "run")
    with at_call(0, None) as made:
        save(folder, 2, pair, keep=1)
    return made


def assert_old_or_new_is_valid(folder: Path) -> None:
    assert resume(folder).step in (1, 2)
    assert not list(folder.glob(".step_*"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
def test_a_save_that_fails_at_any_call_leaves_the_old_checkpoint_or_the_new_one(
    tmp_path, pair, run_at_step_1, calls_of_a_save, code
):
    """The functions fail as the system's do: those that are called with a path name it."""

    def fail(name, args):
        if name == "save_file":
            raise SafetensorError(f"I/O error: {os.strerror(code)}")
        path = str(args[0]) if isinstance(args[0], str | Path) else None
        raise OSError(code, os.strerror(code), path)

    calls = calls_of_a_save
    assert {"fsync", "rename", "replace", "mkdir", "save_file", "open"} <= set(calls)
    for number, call in enumerate(calls, start=1):
        folder = shutil.copytree(run_at_step_1, tmp_path / f"call-{number}")
        with at_call(number, fail):
            try:
                save(folder, 2, pair, keep=1)
            except OSError as error:
                exit_code, message = exit_code_and_message(error, "")
                assert exit_code == 2
                if call not in ("unlink", "rmdir"):  # Python's rmtree gives a name alone
                    assert str(folder) in message, (number, call, message)
        assert_old_or_new_is_valid(folder)
        shutil.rmtree(folder)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_process_killed_at_any_call_of_a_save_leaves_the_old_checkpoint_or_the_new_one(
    tmp_path, pair, run_at_step_1, calls_of_a_save, after
):
    for number in range(1, len(calls_of_a_save) + 1):
        folder = shutil.copytree(run_at_step_1, tmp_path / f"call-{number}")
        die_at_call(number, folder, pair, after)
        assert_old_or_new_is_valid(folder)
        shutil.rmtree(folder)


def die_at_call(number: int, folder: Path, pair, after: bool = False) -> None:
    """Save step 2 in a process that dies at this call."""
    child = os.fork()
    if child == 0:
        with at_call(number, lambda name, args: os._exit(9), after):
            save(folder, 2, pair, keep=1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_a_fork_killed_at_any_call_of_its_first_save_goes_on_from_its_parent_or_the_save(
    tmp_path, pair, run_at_step_1
):
    fork(run_at_step_1, "step_000001", tmp_path / "fork").__exit__(None, None, None)
    counted = shutil.copytree(tmp_path / "fork", tmp_path / "counted")
    with at_call(0, None) as calls:
        save(counted, 2, pair)
    for number in range(1, len(calls) + 1):
        folder = shutil.copytree(tmp_path / "fork", tmp_path / f"call-{number}")
        die_at_call(number, folder, pair)
        assert_old_or_new_is_valid(folder)


def test_a_failed_background_save_is_known_without_waiting_and_raised_by_who_waits(run, pair):
    with RunDirectory(run, 512, writes=True, say=print) as directory:
        (run / ".step_000001.tmp").write_text("")  # removed first
        full = OSError(errno.ENOSPC, "full", "there")
        with mock.patch.object(checkpoint, "save_file", side_effect=full):
            save_in(directory, 1, pair)
            directory._commit.exception()  # returns when the commit has ended
            assert directory.has_failed()
            with pytest.raises(OSError, match="full"):
                directory.wait_for_commit()


# -------------------------------------------------------------------------------------- verifying

DAMAGE = {
    "empty weights": lambda step: (step / "model.safetensors").write_bytes(b""),
    "no moments": lambda step: (step / "optimizer.safetensors").unlink(),
    "no manifest": lambda step: (step / "manifest.json").unlink(),
    "torn manifest": lambda step: (step / "manifest.json").write_text("{"),
    "manifest of nothing": lambda step: (step / "manifest.json").write_text('{"files": {}}'),
    "manifest is a list": lambda step: (step / "manifest.json").write_text("[]"),
    "changed state": lambda step: (step / "state.json").write_text("{}"),
    "state of another step": lambda step: shutil.copy(step.parent / "step_000001/state.json", step),
    "directory for a file": lambda step: replace_by_directory(step / "model.safetensors"),
    "name that leads out": lambda step: add_to_manifest(step, "../train.json"),
}


def replace_by_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def add_to_manifest(step: Path, name: str) -> None:
    manifest = json.loads((step / "manifest.json").read_text())
    content = (step / name).read_bytes()
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["files"][name] = entry
    (step / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_reported_and_the_checkpoint_before_is_used(run, pair, damage):
    save(run, 1, pair)
    damage(save(run, 2, pair))
    warnings = []
    assert newest_valid(run, warnings.append).step == 1
    (warning,) = warnings
    assert "step_000002" in warning


def rewrite(step: Path, name: str, tensors: dict) -> None:
    """Replace a tensor file and its entry in the manifest, as if it had been saved so."""
    save_file(tensors, step / name, metadata={"format": "pt"})
    content = (step / name).read_bytes()
    manifest = json.loads((step / "manifest.json").read_text())
    manifest["files"][name] = {
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    (step / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_checkpoint_that_holds_nan_is_skipped_for_an_older_one(run, pair, name):
    save(run, 1, pair)
    step = save(run, 2, pair)
    tensors = load_file(step / name)
    tensors[min(tensors)].flatten()[0] = torch.nan
    rewrite(step, name, tensors)
    warnings = []
    assert newest_valid(run, warnings.append).step == 1
    assert "NaN" in warnings[0]


def test_nan_is_not_saved(run, pair):
    save(run, 1, pair)
    weights, moments = trained()
    weights["transformer.ln_f.bias"][3] = torch.inf
    with pytest.raises(UserError, match="step 2: transformer.ln_f.bias holds NaN or Inf"):
        save(run, 2, (weights, moments))
    assert names(run) == ["step_000001"]


def test_a_checkpoint_whose_file_cannot_be_read_is_skipped(run, pair, monkeypatch):
    """EIO in the newest one must not end the resume."""
    save(run, 1, pair)
    save(run, 2, pair)
    real = checkpoint.read_bytes

    def fail_in_step_2(file, limit):
        if file.parent.name == "step_000002":
            raise OSError(errno.EIO, "Input/output error", str(file))
        return real(file, limit)

    monkeypatch.setattr(checkpoint, "read_bytes", fail_in_step_2)
    warnings = []
    assert newest_valid(run, warnings.append).step == 1
    assert "step_000002/model.safetensors: Input/output error" in warnings[0]


def test_a_state_of_another_schema_is_refused(run, pair):
    folder = save(run, 1, pair)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"schema": 99}))
    with pytest.raises(UserError, match="schema 99"):
        checkpoint.read_state(folder)


def test_a_checkpoint_under_another_steps_name_is_refused(run, pair):
    save(run, 1, pair).rename(run / "step_000009")
    with pytest.raises(UserError, match="step 1"):
        checkpoint.read_state(run / "step_000009")


# --------------------------------------------------------------------------- pruning, setting aside


def test_pruning_keeps_the_newest_and_the_best(run, pair):
    for step in (1, 2, 3, 4):
        save(run, step, pair)
    (run / "best.json").write_text('{"step": 1, "val_loss": 2.0}')
    run_directory.prune(run, 2)
    assert names(run) == ["step_000001", "step_000003", "step_000004"]


def test_pruning_spares_the_checkpoint_before_a_decay_begins(run, pair):
    for step in (1, 2, 3, 4, 5):
        save(run, step, pair, keep=1, spare=[3])
    assert names(run) == ["step_000003", "step_000005"]
    save(run, 6, pair, keep=1, spare=[4])  # where no checkpoint is, the one before it
    assert names(run) == ["step_000003", "step_000006"]


def test_with_keep_1_and_the_newest_damaged_a_resumed_run_keeps_what_it_saves(run, pair):
    save(run, 1, pair)
    DAMAGE["empty weights"](save(run, 3, pair))
    assert resume(run).step == 1
    save(run, 2, pair, keep=1)
    assert names(run) == ["step_000002"]
    assert fault_of(run / "step_000002") is None


def test_damaged_newer_checkpoints_are_renamed_on_resume(run, pair):
    save(run, 1, pair)
    DAMAGE["empty weights"](save(run, 2, pair))
    resume(run)
    assert names(run) == ["step_000001"]
    assert (run / "damaged_step_000002/optimizer.safetensors").exists()


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_and_left_alone(run, pair):
    DAMAGE["empty weights"](save(run, 1, pair))
    with pytest.raises(UserError, match="none of its checkpoints is valid"):
        resume(run)
    assert names(run) == ["step_000001"]


def test_a_checkpoint_that_cannot_be_removed_is_a_warning_and_counts_no_more(
    run, pair, monkeypatch, capfd
):
    """As on NFS, where a file that somebody reads keeps its directory."""
    save(run, 1, pair)

    def fail(path):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail)
        save(run, 2, pair, keep=1)
    assert f"warning: {run / 'step_000001'}: not removed" in capfd.readouterr().out
    assert fault_of(run / "step_000001") is not None
    assert fault_of(run / "step_000002") is None
    save(run, 3, pair, keep=1)
    assert names(run) == ["step_000003"]


def test_a_best_step_whose_checkpoint_is_gone_counts_no_more(run, pair):
    """Or a run that reaches this step again would not keep it, and keep none at last."""
    with RunDirectory(run, 512, writes=True, say=print) as directory:
        save(run, 1, pair)
        save(run, 2, pair)
        directory.mark_best(2, 1.5)
        assert directory.lowest_validation_loss() == 1.5
        DAMAGE["empty weights"](run / "step_000002")
        assert directory.load_newest().step == 1
        assert directory.lowest_validation_loss() == math.inf


def test_a_symlinked_step_directory_is_neither_resumed_from_nor_pruned(run, pair, tmp_path):
    elsewhere = save(run, 9, pair).rename(tmp_path / "elsewhere")
    (run / "step_000009").symlink_to(elsewhere)
    save(run, 1, pair)
    save(run, 2, pair, keep=1)
    assert resume(run).step == 2
    assert (run / "step_000009").is_symlink()
    assert (elsewhere / "model.safetensors").exists()


def test_a_save_replaces_a_link_in_its_place_and_not_what_it_points_to(run, pair, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("here")
    (run / "step_000001").symlink_to(elsewhere)
    save(run, 1, pair)
    assert not (run / "step_000001").is_symlink()
    assert (elsewhere / "precious").read_text() == "here"


def test_leftovers_of_a_crash_are_removed_on_resume(run, pair):
    save(run, 1, pair)
    (run / ".step_000002.tmp").mkdir()
    (run / ".step_000002.tmp/model.safetensors").write_text("half")
    resume(run)
    assert not (run / ".step_000002.tmp").exists()


# -------------------------------------------------------------------------------------------- log


def test_a_log_with_foreign_and_torn_lines_is_mended_with_one_warning(run, pair):
    save(run, 1, pair)
    lines = (run / "log.jsonl").read_bytes()
    foreign = b'\xff\xfe\n{}\n[1]\n"text"\n{"event": "train", "step": "1"}\n{"event": "tra'
    (run / "log.jsonl").write_bytes(b'{"event": "train", "step": 1}\n' + foreign + b"\n" + lines)
    warnings = []
    resume(run, warnings.append)
    assert warnings == [f"warning: {run / 'log.jsonl'}: left out 6 damaged lines"]
    events = [json.loads(line)["event"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert events == ["train", "save"]


def test_the_log_is_cut_back_to_the_checkpoint(run, pair):
    save(run, 1, pair)
    with open(run / "log.jsonl", "a") as f:
        f.write('{"event": "train", "step": 2}\n')
    resume(run)
    assert '"step": 2' not in (run / "log.jsonl").read_text()


def test_the_save_stands_in_the_log_whenever_the_checkpoint_is_there(run, pair, monkeypatch):
    """It is written first: a kill right after the commit must not lose it."""
    real = os.rename
    seen = []

    def look_at_log(source, target):
        seen.append((run / "log.jsonl").read_text())
        return real(source, target)

    monkeypatch.setattr(os, "rename", look_at_log)
    save(run, 1, pair)
    assert '"event": "save", "step": 1' in seen[-1]


def test_a_log_that_is_gone_is_a_warning(run, pair):
    save(run, 1, pair)
    (run / "log.jsonl").unlink()
    warnings = []
    assert resume(run, warnings.append).step == 1
    assert "log.jsonl: nothing is there of the 1 steps before" in warnings[0]


def test_checkpoints_that_are_all_gone_are_a_warning_and_the_old_log_is_kept(run, pair):
    shutil.rmtree(save(run, 1, pair))
    old_log = (run / "log.jsonl").read_bytes()
    said = []
    assert resume(run, said.append) is None
    assert "the log tells of one at step 1" in said[0]
    with RunDirectory(run, 512, writes=True, say=said.append) as directory:
        directory.begin({}, CPU)
    assert "begins at step 0 again" in said[1]
    assert (run / "log-old.jsonl").read_bytes() == old_log
    assert (run / "log.jsonl").read_bytes() == b""


# --------------------------------------------------------------------------------------- forks


@pytest.fixture
def parent(run, pair) -> Path:
    """A run with checkpoints at steps 1 and 2, and a log that goes on."""
    for step in (1, 2):
        with open(run / "log.jsonl", "a") as f:
            f.write(json.dumps({"event": "train", "step": step, "tokens": 512 * step}) + "\n")
        save(run, step, pair)
    with open(run / "log.jsonl", "a") as f:
        f.write('{"event": "train", "step": 3, "tokens": 1536}\n{"event": "tra')
    return run


def fork(parent: Path, name: str, folder: Path, tokens_per_step: int = 512) -> RunDirectory:
    found = run_directory.checkpoint_of(parent / name, print)
    directory = RunDirectory(folder, tokens_per_step, writes=True, say=print)
    directory.claim(may_hold_run=False)
    directory.begin({}, CPU, found.as_origin(samples=16 * found.step))
    directory.continue_from(found)
    return directory


def events(run: Path) -> list[tuple[str, int]]:
    entries = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [(entry["event"], entry["step"]) for entry in entries]


def test_a_fork_begins_with_the_log_of_its_parent_and_says_where_it_comes_from(parent, tmp_path):
    with fork(parent, "step_000002", tmp_path / "fork") as directory:
        assert directory.has_logged("save", 2)
        directory.log("train", 3)
    expected = [("train", 1), ("save", 1), ("train", 2), ("save", 2), ("train", 3)]
    assert events(tmp_path / "fork") == expected
    assert json.loads((tmp_path / "fork/train.json").read_text())["origin"] == {
        "run": str(parent),
        "step": 2,
        "samples": 32,
        "weights": files.file_sha256(parent / "step_000002/model.safetensors"),
    }


def test_a_fork_leaves_its_parent_as_it_was(parent, tmp_path, pair):
    before = {file: file.read_bytes() for file in parent.rglob("*") if file.is_file()}
    with fork(parent, "step_000001", tmp_path / "fork") as directory:
        save_in(directory, 2, pair)
    assert {file: file.read_bytes() for file in parent.rglob("*") if file.is_file()} == before


def test_a_fork_with_another_batch_counts_its_tokens_on(parent, tmp_path):
    with fork(parent, "step_000002", tmp_path / "fork", tokens_per_step=100) as directory:
        assert directory.tokens_at(4) == 2 * 512 + 2 * 100


def test_a_fork_that_has_saved_nothing_goes_back_to_the_checkpoint_it_began_with(parent, tmp_path):
    with fork(parent, "step_000001", tmp_path / "fork") as directory:
        directory.log("train", 2)
    found = resume(tmp_path / "fork")
    assert found.folder == parent / "step_000001"
    assert found.logged == {"train", "save"}
    assert events(tmp_path / "fork") == [("train", 1), ("save", 1)]


def test_a_fork_that_has_saved_goes_on_from_that(parent, tmp_path, pair):
    with fork(parent, "step_000001", tmp_path / "fork") as directory:
        save_in(directory, 2, pair)
    assert resume(tmp_path / "fork").folder == tmp_path / "fork/step_000002"


@pytest.mark.parametrize("fault", [shutil.rmtree, DAMAGE["empty weights"]])
def test_a_fork_without_its_parents_checkpoint_is_an_error_that_names_it(parent, tmp_path, fault):
    fork(parent, "step_000001", tmp_path / "fork").__exit__(None, None, None)
    fault(parent / "step_000001")
    with pytest.raises(UserError, match="step_000001"):
        resume(tmp_path / "fork")


def test_a_fork_whose_parent_was_trained_again_is_refused(parent, tmp_path):
    fork(parent, "step_000001", tmp_path / "fork").__exit__(None, None, None)
    save(parent, 1, trained())
    with pytest.raises(UserError, match="other weights than"):
        resume(tmp_path / "fork")


def test_a_run_is_forked_from_its_newest_valid_checkpoint_and_not_changed(parent):
    DAMAGE["empty weights"](parent / "step_000002")
    warnings = []
    assert run_directory.checkpoint_of(parent, warnings.append).step == 1
    assert "step_000002/model.safetensors: damaged" in warnings[0]
    assert names(parent) == ["step_000001", "step_000002"]


def test_a_damaged_step_is_not_replaced_by_another_one(parent):
    DAMAGE["empty weights"](parent / "step_000002")
    with pytest.raises(UserError, match="step_000002/model.safetensors: damaged"):
        run_directory.checkpoint_of(parent / "step_000002", print)


def test_a_running_run_can_be_forked(parent):
    with files.locked(parent):
        assert run_directory.checkpoint_of(parent, print).step == 2


def test_a_checkpoint_that_a_running_run_prunes_meanwhile_is_no_fault(parent, pair, monkeypatch):
    real = run_directory.load_checkpoint

    def prune_before(folder):
        if folder.name == "step_000002":
            save(parent, 3, pair, keep=1)
        return real(folder)

    monkeypatch.setattr(run_directory, "load_checkpoint", prune_before)
    warnings = []
    assert run_directory.checkpoint_of(parent, warnings.append).step == 3
    assert not warnings


@pytest.mark.parametrize("name", ["step_000009", "step_000001/config.json", "../nothing"])
def test_what_is_no_checkpoint_cannot_be_forked(parent, name):
    with pytest.raises(UserError):
        run_directory.checkpoint_of(parent / name, print)


# ------------------------------------------------------------------------------- what is picked


def test_a_run_stands_for_its_newest_checkpoint(run, pair):
    save(run, 1, pair)
    save(run, 2, pair)
    assert run_directory.resolve_model(str(run)) == str(run / "step_000002")


def test_a_step_directory_stands_for_itself(run, pair):
    save(run, 1, pair)
    save(run, 2, pair)
    assert run_directory.resolve_model(str(run / "step_000001")) == str(run / "step_000001")


def test_a_run_that_keeps_its_best_stands_for_that(run, pair):
    save(run, 1, pair)
    save(run, 2, pair)
    (run / "best.json").write_text('{"step": 1, "val_loss": 2.0}')
    assert run_directory.resolve_model(str(run)) == str(run / "step_000001")


def test_without_a_name_the_newest_run_is_picked(tmp_path, pair, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, time in (("new", 2), ("old", 1)):
        folder = Path("runs") / name
        folder.mkdir(parents=True)
        (folder / "train.json").write_text("{}")
        save(folder, 7, pair)
        os.utime(folder / "log.jsonl", (time, time))
    assert run_directory.resolve_model(None) == "runs/new/step_000007"


def test_without_runs_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="train_gpt2.py"):
        run_directory.resolve_model(None)


def test_inference_works_without_the_optimizers_state(run, pair):
    folder = save(run, 1, pair)
    (folder / "optimizer.safetensors").unlink()
    assert run_directory.resolve_model(str(run)) == str(folder)


def test_inference_hashes_only_the_models_files(run, pair, monkeypatch):
    save(run, 1, pair)
    hashed = []
    real = checkpoint.file_sha256

    def note(file):
        hashed.append(file.name)
        return real(file)

    monkeypatch.setattr(checkpoint, "file_sha256", note)
    run_directory.resolve_model(str(run))
    assert hashed == ["config.json", "model.safetensors"]


def test_inference_skips_a_damaged_best_checkpoint_with_a_warning(run, pair):
    DAMAGE["empty weights"](save(run, 1, pair))
    save(run, 2, pair)
    (run / "best.json").write_text('{"step": 1, "val_loss": 2.0}')
    warnings = []
    assert run_directory.resolve_model(str(run), warnings.append) == str(run / "step_000002")
    assert "step_000001" in warnings[0]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"step": "1"}', '{"step": 1}'])
def test_a_torn_best_json_is_one_line_that_names_it(run, pair, content):
    save(run, 1, pair)
    (run / "best.json").write_text(content)
    with pytest.raises(UserError, match="best.json"):
        run_directory.resolve_model(str(run))


def test_a_typing_error_in_a_checkpoints_name_lists_those_of_the_run(run, pair):
    save(run, 1, pair)
    save(run, 2, pair)
    with pytest.raises(UserError, match="one of step_000001, step_000002"):
        run_directory.resolve_model(str(run / "step_000020"))


# ---------------------------------------------------------------------------------- the promises


def test_the_page_on_reliability_names_tests_that_exist():
    page = (ROOT / "docs/reliability.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", page))
    tests = "".join(file.read_text() for file in (ROOT / "tests").glob("test_*.py"))
    assert len(named) > 40
    assert named <= set(re.findall(r"def (test_\w+)", tests))
