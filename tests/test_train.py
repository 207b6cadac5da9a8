"""The trainer in one process: schedule, step, evaluation, the loop, resume, the command line."""

import errno
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tools import (
    ROOT,
    read_log,
    run_main,
    run_python,
    start_script,
    tiny_config,
    tiny_model,
    write_bytes_data,
)
from transformers import GPT2LMHeadModel

import hellaswag
import train_gpt2
from model import GPT, NextTokenLoss
from sample import load_model
from support import report, run_directory, script
from support.files import locked
from support.runtime import Runtime, start
from support.shards import write_manifest, write_shard
from tokens import Mixture, get_encoding, open_data, token_bytes
from train_gpt2 import (
    RECIPES,
    evaluate,
    learning_rate,
    main,
    step_batch,
    train_step,
)

TINY_FLAGS = """
    --n-layer 2 --n-head 2 --n-embd 32 --seq-len 32 --total-batch-tokens 512 --micro-batch 4
    --max-steps 20 --warmup-steps 2 --eval-every 10 --eval-tokens 1000 --sample-every 0
    --save-every 10 --dtype float32 --device cpu --no-compile
"""
TINY = TINY_FLAGS.split()
CONFIG = replace(
    RECIPES["first-run"],
    n_layer=2,
    n_head=2,
    n_embd=32,
    seq_len=32,
    total_batch_tokens=512,
    micro_batch=4,
    max_steps=20,
    warmup_steps=2,
    eval_tokens=1000,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_bytes_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    """A run of 20 steps with a sample at its end. Tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("finished") / "r"
    assert train("--data", data, *TINY, "--sample-every", 20, "--out", folder) == 0
    return folder


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """A copy of the finished run, in the test's working directory."""
    return Path(shutil.copytree(finished, tmp_path / "r"))


@pytest.fixture
def in_tmp(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*args) -> int:
    """The exit code of train_gpt2.py with these arguments, run in this process."""
    return run_main(main, *args)


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in read_log(folder, "train")]


def steps_of(folder: Path, event: str) -> list[int]:
    return [entry["step"] for entry in read_log(folder, event)]


def saved_steps(folder: Path) -> list[int]:
    return [run_directory.step_number(path) for path in run_directory.step_directories(folder)]


def same_tensors(a: Path, b: Path) -> bool:
    one, other = load_file(a), load_file(b)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def last_error(capfd) -> str:
    err = capfd.readouterr().err
    assert "Traceback" not in err
    return err.splitlines()[-1]


# ---------------------------------------------------------------------------------- pure pieces


@pytest.mark.learning
def test_cosine_schedule_warms_up_linearly_and_ends_at_min_lr():
    config = replace(
        CONFIG,
        schedule="cosine",
        learning_rate=1e-3,
        min_lr=1e-4,
        warmup_steps=10,
        max_steps=110,
    )
    assert learning_rate(0, config) == pytest.approx(1e-4)
    assert learning_rate(9, config) == learning_rate(10, config) == pytest.approx(1e-3)
    assert learning_rate(60, config) == pytest.approx(5.5e-4)
    assert learning_rate(110, config) == pytest.approx(1e-4)


def test_linear_schedule_falls_in_a_straight_line_to_zero():
    config = replace(CONFIG, schedule="linear", learning_rate=1e-3, warmup_steps=10, max_steps=110)
    assert learning_rate(10, config) == pytest.approx(1e-3)
    assert learning_rate(35, config) == pytest.approx(7.5e-4)
    assert learning_rate(110, config) == 0


def test_gpt2_recipe_is_gpt3_table_2_1():
    config = RECIPES["gpt2"]
    assert config.learning_rate == 6e-4
    assert config.total_batch_tokens == 524_288
    for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        config = RECIPES[name]
        assert config.max_steps * config.total_batch_tokens == pytest.approx(10e9, rel=1e-3)
        assert config.warmup_steps * config.total_batch_tokens == pytest.approx(375e6, rel=2e-3)
        assert config.min_lr == pytest.approx(config.learning_rate / 10)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_shrinks_matrices_and_leaves_vectors_alone(name):
    """With gradients of zero, decay is all that an update does."""
    model = tiny_model()
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 1.0)
        parameter.grad = torch.zeros_like(parameter)
    config = replace(CONFIG, optimizer=name, weight_decay=0.5, learning_rate=0.1)
    train_gpt2.build_optimizer(model, config).step()
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            assert parameter.max() < 1, parameter_name
        else:
            assert (parameter == 1).all(), parameter_name


def gradients(micro_batch: int, dropout: float = 0.0) -> torch.Tensor:
    """The gradient of one step on 16 fixed sequences, as one vector."""
    torch.manual_seed(0)
    model = tiny_model(dropout=dropout).train()
    config = replace(CONFIG, micro_batch=micro_batch, grad_clip=1e9, dropout=dropout)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    batch = torch.randint(0, 257, (16, 33), generator=torch.Generator().manual_seed(1))
    seen = []

    def keep_gradients() -> None:
        seen.append(torch.cat([p.grad.flatten() for p in model.parameters()]))

    optimizer.step = keep_gradients
    train_step(NextTokenLoss(model), optimizer, batch, config, start("cpu", "float32"))
    return seen[0]


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_accumulated_gradient_is_the_big_batchs(micro_batch):
    big = gradients(16)
    assert torch.linalg.norm(gradients(micro_batch) - big) <= 1e-5 * torch.linalg.norm(big)


def test_gradients_longer_than_grad_clip_are_scaled_to_it():
    model = tiny_model()
    config = replace(CONFIG, grad_clip=1e-3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = torch.cat([p.detach().flatten() for p in model.parameters()]).clone()
    batch = torch.randint(0, 257, (16, 33))
    train_step(NextTokenLoss(model), optimizer, batch, config, start("cpu", "float32"))
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    assert torch.linalg.norm(moved).item() == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.learning
def test_evaluation_is_the_mean_loss_of_transformers_over_the_split(data, tmp_path):
    """Full windows and the shorter one at the end of the budget, weighted by their tokens."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    val = open_data(data).val
    bytes_per_token = token_bytes(get_encoding("bytes"))
    ours = evaluate(model, val, CONFIG, start("cpu", "float32"), bytes_per_token)
    tokens = torch.from_numpy(val.read(0, 1001).astype(np.int64))
    nats = 0.0
    for first in range(0, 1000, 32):
        window = tokens[first : first + 33]
        logits = theirs(window[None, :-1]).logits[0]
        nats += F.cross_entropy(logits, window[1:], reduction="sum").item()
    assert ours["eval_tokens"] == 1000
    assert ours["val_loss"] == pytest.approx(nats / 1000, abs=1e-5)
    # A token of this encoding is one byte.
    assert ours["bits_per_byte"] == pytest.approx(nats / 1000 / math.log(2), abs=1e-5)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_together_read_what_one_process_reads(data, world_size):
    corpus = Mixture({"text": open_data(data)}, [1.0])
    for sample in (0, 48, 960):
        alone = step_batch(corpus, CONFIG, sample, 0, 1)
        parts = [step_batch(corpus, CONFIG, sample, rank, world_size) for rank in range(world_size)]
        assert torch.equal(alone, torch.cat(parts))


# ----------------------------------------------------------------------------------- whole runs


def test_each_event_is_logged_at_its_interval(finished):
    assert steps_of(finished, "train") == list(range(1, 21))
    assert steps_of(finished, "eval") == [0, 10, 20]
    assert steps_of(finished, "sample") == [20]
    assert steps_of(finished, "save") == [10, 20]


def test_log_entries_have_these_keys(finished):
    lines = (finished / "log.jsonl").read_text().splitlines()
    keys = {}
    for entry in map(json.loads, lines):
        keys.setdefault(entry["event"], set(entry))
    common = {"event", "step", "tokens"}
    speed = {"tokens_per_second", "mfu", "elapsed"}
    assert keys["train"] == common | speed | {"loss", "lr", "grad_norm"}
    assert keys["eval"] == common | {"val_loss", "bits_per_byte", "eval_tokens"}


def test_training_lowers_the_validation_loss(finished):
    first, *_, last = [entry["val_loss"] for entry in read_log(finished, "eval")]
    assert last < first - 0.5


def test_curves_are_drawn_as_png(finished):
    assert (finished / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_a_checkpoint_has_these_files(finished):
    assert {file.name for file in (finished / "step_000020").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
        "manifest.json",
        "vocab.json",
        "merges.txt",
        "tokenizer_config.json",
        "README.md",
    }


def test_train_json_says_when_and_with_what_the_run_was_started(finished):
    started = json.loads((finished / "train.json").read_text())["started"]
    assert started["torch"] == torch.__version__
    assert started.keys() == {"date", "torch", "device", "command", "git_commit", "code"}


def test_a_second_bare_run_gets_the_next_directory(data, in_tmp):
    for _ in range(2):
        assert train("--data", data, *TINY, "--max-steps", 1, "--eval-every", 0) == 0
    assert {path.name for path in (in_tmp / "runs").iterdir()} == {"first-run", "first-run-2"}


def test_out_directory_is_claimed_while_another_run_prepares_its_data(data, in_tmp, monkeypatch):
    """The other run has no train.json yet, and must not be written into."""
    with locked(Path("runs/first-run")):
        assert train("--data", data, *TINY, "--max-steps", 1, "--eval-every", 0) == 0
    assert not Path("runs/first-run/log.jsonl").exists()
    assert run_directory.is_run(Path("runs/first-run-2"))


def test_the_directory_is_ours_before_the_data_are_prepared(data, in_tmp, monkeypatch):
    real = train_gpt2.load_data

    def prepare_and_look(config, rt):
        code = (
            "from pathlib import Path; from support.script import run_script;"
            "from support.files import locked\n"
            "run_script(lambda: locked(Path('r')).__enter__())"
        )
        second = run_python("-c", code, cwd=in_tmp, env={"PYTHONPATH": str(ROOT)})
        assert second.returncode == 2, second.stderr
        return real(config, rt)

    monkeypatch.setattr(train_gpt2, "load_data", prepare_and_look)
    flags = ("--max-steps", 1, "--eval-every", 0, "--out", "r")
    assert train("--data", data, *TINY, *flags) == 0


# ------------------------------------------------------------------------------ stop and resume


def signal_in_update(monkeypatch, number: int) -> None:
    """Send this process SIGTERM in the middle of its update of that number."""
    real = train_gpt2.train_step
    calls = []

    def step_with_signal(*args):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(train_gpt2, "train_step", step_with_signal)


@pytest.fixture(scope="module")
def stopped_and_resumed(data, tmp_path_factory) -> tuple[Path, Path]:
    """With dropout: a run, and the same run stopped in its 10th update and resumed."""
    folder = tmp_path_factory.mktemp("stopped")
    flags = ("--data", data, *TINY, "--dropout", 0.1, "--save-every", 7)
    assert train(*flags, "--out", folder / "whole") == 0
    with pytest.MonkeyPatch.context() as patch:
        signal_in_update(patch, 10)
        assert train(*flags, "--out", folder / "halves") == 143
    assert saved_steps(folder / "halves") == [7, 10]
    assert train("--out", folder / "halves", "--resume") == 0
    return folder / "whole", folder / "halves"


def test_a_resumed_run_logs_what_an_undisturbed_one_logs(stopped_and_resumed):
    logs = []
    for folder in stopped_and_resumed:
        logs.append([entry for entry in read_log(folder) if entry["event"] != "save"])
    assert logs[0] == logs[1]


@pytest.mark.learning
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
def test_a_resumed_run_ends_with_the_same_bits(stopped_and_resumed, file):
    whole, halves = stopped_and_resumed
    assert same_tensors(whole / "step_000020" / file, halves / "step_000020" / file)


def test_a_stop_saves_before_the_validation_of_that_step(data, in_tmp, monkeypatch):
    """Step 10 would validate. The stop leaves that for the resumed run, which does it once."""
    with monkeypatch.context() as patch:
        signal_in_update(patch, 10)
        assert train("--data", data, *TINY, "--save-every", 50, "--out", "r") == 143
    assert saved_steps(Path("r")) == [10]
    assert steps_of(Path("r"), "eval") == [0]
    assert train("--out", "r", "--resume") == 0
    assert steps_of(Path("r"), "eval") == [0, 10, 20]


def test_a_stop_between_evaluation_batches_saves_and_the_resumed_run_validates_once(
    data, in_tmp, monkeypatch
):
    """The signal comes in the second batch of the validation of step 10, of about 62."""
    real = train_gpt2.evaluation_batches
    read = []

    def batches_with_signal(tokens, config):
        batches = real(tokens, config)
        if not saved_steps(Path("r")) and not Path("r/step_000010").exists():
            wrapped = []
            for batch in batches:
                wrapped.append(lambda batch=batch: note_and_read(batch))
            return wrapped
        return batches

    def note_and_read(batch):
        if losses(Path("r")) and len(losses(Path("r"))) == 10:
            read.append(1)
            if len(read) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        return batch()

    flags = ("--micro-batch", 1, "--eval-tokens", 2000, "--save-every", 50)
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt2, "evaluation_batches", batches_with_signal)
        assert train("--data", data, *TINY, *flags, "--out", "r") == 143
    assert len(read) == 2
    assert saved_steps(Path("r")) == [10]
    assert train("--out", "r", "--resume") == 0
    assert steps_of(Path("r"), "eval") == [0, 10, 20]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_stop_in_the_first_validation_saves_what_can_be_continued(
    data, in_tmp, monkeypatch, optimizer
):
    """Before the first update optimizers have no state."""
    flags = ("--data", data, *TINY, "--max-steps", 2, "--optimizer", optimizer)
    assert train(*flags, "--out", "whole") == 0
    real = train_gpt2.evaluate

    def evaluate_signalled(*args, **how):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **how)

    with monkeypatch.context() as patch:
        patch.setattr(train_gpt2, "evaluate", evaluate_signalled)
        assert train(*flags, "--out", "r") == 143
    assert saved_steps(Path("r")) == [0]
    assert train("--out", "r", "--resume") == 0
    assert losses(Path("r")) == losses(Path("whole"))
    assert steps_of(Path("r"), "eval") == [0, 2]


# What disks, quotas and network file systems answer, and a file that cannot be written then.
FAILED_WRITES = [
    (errno.EDQUOT, "step_000020.tmp/model.safetensors"),
    (errno.EROFS, "step_000020.tmp/optimizer.safetensors"),
    (errno.ESHUTDOWN, "step_000020.tmp/model.safetensors"),
    (errno.ESTALE, "log.jsonl"),
    (errno.ESHUTDOWN, "log.jsonl"),
    (errno.EIO, "log.jsonl"),
]


def fail_to_flush(monkeypatch, code: int, name: str) -> None:
    """Files whose path has that name in it cannot be flushed to the disk."""
    real = os.fsync

    def fsync(descriptor):
        if name in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the names of open files")
@pytest.mark.parametrize("code, name", FAILED_WRITES)
def test_a_write_that_fails_is_one_line_that_names_the_file_and_keeps_the_old_checkpoint(
    copy, in_tmp, monkeypatch, capfd, code, name
):
    shutil.rmtree(copy / "step_000020")
    fail_to_flush(monkeypatch, code, name)
    assert train("--out", "r", "--resume") == 2
    line = last_error(capfd)
    assert name in line
    assert os.strerror(code) in line
    monkeypatch.undo()
    monkeypatch.chdir(in_tmp)
    assert run_directory.newest_valid(copy, print).folder == copy / "step_000010"


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the names of open files")
@pytest.mark.parametrize("place, named", [("/r/", "r/log.jsonl: "), ("/data/novel", "data/novel-")])
def test_a_quota_met_before_the_first_step_is_one_line_that_names_the_file(
    in_tmp, monkeypatch, capfd, place, named
):
    Path("novel.txt").write_text("Hello world. " * 500)
    fail_to_flush(monkeypatch, errno.EDQUOT, place)
    assert train("--data", "novel.txt", *TINY, "--out", "r") == 2
    line = last_error(capfd)
    assert line.startswith(f"error: {named}")
    assert os.strerror(errno.EDQUOT) in line


def test_a_stop_with_save_every_0_saves_nothing_and_offers_no_resume(
    data, in_tmp, monkeypatch, capfd
):
    signal_in_update(monkeypatch, 3)
    assert train("--data", data, *TINY, "--save-every", 0, "--out", "r") == 143
    out = capfd.readouterr().out
    assert saved_steps(Path("r")) == []
    assert "was not saved" in out
    assert "--resume" not in out


def test_a_stop_prints_the_command_that_goes_on(data, in_tmp, monkeypatch, capfd):
    signal_in_update(monkeypatch, 3)
    assert train("--data", data, *TINY, "--out", "r") == 143
    last = capfd.readouterr().out.splitlines()[-1]
    assert last == "stopped after step 3; to go on: python train_gpt2 --out r --resume"


def test_a_resumed_run_without_a_checkpoint_says_so_and_keeps_its_old_log(
    data, in_tmp, monkeypatch, capfd
):
    with monkeypatch.context() as patch:
        signal_in_update(patch, 3)
        assert train("--data", data, *TINY, "--save-every", 0, "--out", "r") == 143
    old_log = Path("r/log.jsonl").read_bytes()
    capfd.readouterr()
    assert train("--out", "r", "--resume") == 0
    out = capfd.readouterr().out
    assert "r holds no checkpoint" in out and "continuing" not in out
    assert Path("r/log-old.jsonl").read_bytes() == old_log
    assert steps_of(Path("r"), "train") == list(range(1, 21))


def test_resume_uses_the_newest_checkpoint_that_verifies_and_sets_newer_ones_aside(
    copy, in_tmp, capfd
):
    expected = losses(copy)
    weights = copy / "step_000020/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert train("--out", "r", "--resume") == 0
    out = capfd.readouterr().out
    assert "model.safetensors: damaged" in out
    assert "going on after step 10" in out
    assert losses(copy) == expected
    assert (copy / "damaged_step_000020/model.safetensors").exists()


def test_resuming_a_finished_run_changes_neither_log_nor_checkpoints(copy, in_tmp):
    log = (copy / "log.jsonl").read_bytes()
    assert train("--out", "r", "--resume") == 0
    assert (copy / "log.jsonl").read_bytes() == log
    assert saved_steps(copy) == [10, 20]


def test_resume_finds_equal_data_in_another_place(data, copy, in_tmp):
    shutil.rmtree("r/step_000020")
    shutil.copytree(data, "elsewhere")
    assert train("--out", "r", "--resume", "--data", "elsewhere") == 0


def test_resume_refuses_other_data(data, copy, in_tmp, capfd):
    shutil.rmtree("r/step_000020")
    shutil.copytree(data, "other")
    shard = Path("other/text_val_000000.bin")
    manifest = json.loads(Path("other/manifest.json").read_text())
    content = bytearray(shard.read_bytes())
    content[-2] ^= 1
    shard.write_bytes(content)
    for entry in manifest["shards"]:
        if entry["name"] == shard.name:
            entry["sha256"] = hashlib.sha256(content).hexdigest()
    Path("other/manifest.json").write_text(json.dumps(manifest))
    assert train("--out", "r", "--resume", "--data", "other") == 2
    assert "the data are not those" in last_error(capfd)


# ------------------------------------------------------------------------- faults of a training


def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(data, in_tmp, capfd, monkeypatch):
    real = train_gpt2.train_step
    calls = []

    def ruin_the_fifth(loss_fn, *args):
        calls.append(1)
        if len(calls) == 5:
            with torch.no_grad():
                loss_fn.model.transformer.ln_f.weight[0] = torch.nan
        return real(loss_fn, *args)

    monkeypatch.setattr(train_gpt2, "train_step", ruin_the_fifth)
    assert train("--data", data, *TINY, "--save-every", 2, "--out", "r") == 2
    assert "loss nan" in last_error(capfd)
    assert len(losses(in_tmp / "r")) == 4
    assert saved_steps(in_tmp / "r") == [2, 4]


def test_weights_ruined_right_before_a_save_are_not_saved(data, in_tmp, capfd, monkeypatch):
    """The update itself makes them NaN; the older checkpoint stays the one to go on from."""
    real = train_gpt2.train_step
    calls = []

    def ruin_after_the_fourth(loss_fn, *args):
        result = real(loss_fn, *args)
        calls.append(1)
        if len(calls) == 4:
            with torch.no_grad():
                loss_fn.model.transformer.ln_f.weight[0] = torch.nan
        return result

    with monkeypatch.context() as patch:
        patch.setattr(train_gpt2, "train_step", ruin_after_the_fourth)
        assert train("--data", data, *TINY, "--save-every", 2, "--out", "r") == 2
    assert "NaN" in last_error(capfd)
    assert saved_steps(Path("r")) == [2]
    assert train("--out", "r", "--resume") == 0


def test_best_checkpoint_is_kept_and_preferred(data, in_tmp, monkeypatch):
    """Of losses that fall until step 8 and rise after it, the best outlives pruning."""
    val_losses = iter([5.0, 4.0, 3.0, 2.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    real = train_gpt2.evaluate

    def evaluate_by_list(*args, **how):
        return real(*args, **how) | {"val_loss": next(val_losses)}

    monkeypatch.setattr(train_gpt2, "evaluate", evaluate_by_list)
    flags = ("--keep-best", "--keep", 1, "--eval-every", 2, "--save-every", 2, "--out", "r")
    assert train("--data", data, *TINY, *flags) == 0
    assert saved_steps(Path("r")) == [8, 20]
    assert load_model("r")[2].endswith("step_000008")


def test_the_card_of_a_checkpoint_has_its_validation_loss(data, in_tmp):
    flags = ("--eval-every", 2, "--save-every", 4, "--keep", 9, "--out", "r")
    assert train("--data", data, *TINY, *flags) == 0
    losses = {entry["step"]: entry["val_loss"] for entry in read_log(Path("r"), "eval")}
    for step in saved_steps(Path("r")):
        card = (Path("r") / f"step_{step:06d}" / "README.md").read_text()
        assert f"| {step} | {losses[step]:.4f} |" in card


def test_a_validation_of_nan_is_never_the_best(data, in_tmp, monkeypatch):
    val_losses = iter([5.0, 4.0, math.nan])
    real = train_gpt2.evaluate

    def evaluate_by_list(*args, **how):
        return real(*args, **how) | {"val_loss": next(val_losses)}

    monkeypatch.setattr(train_gpt2, "evaluate", evaluate_by_list)
    assert train("--data", data, *TINY, "--keep-best", "--out", "r") == 0
    assert run_directory.best_step(Path("r")).name == "step_000010"


# -------------------------------------------------------------------------------- side activities


def fail(*args, **kwargs):
    raise KeyError("a fault of it")


ITEM = hellaswag.Item("A cat", ("sat.", "flew.", "sang songs.", "was."), 0)
SIDES = {
    "no curves are drawn": (report, "draw_curves"),
    "no sample is written": (train_gpt2, "sample_text"),
    "HellaSwag is not scored": (hellaswag, "log_probabilities"),
}


@pytest.mark.parametrize("what", SIDES)
def test_a_fault_of_a_side_activity_is_one_warning_and_the_run_ends_as_without_it(
    data, finished, in_tmp, monkeypatch, capfd, what
):
    """Each would happen twice or more often."""
    monkeypatch.setattr(*SIDES[what], fail)
    monkeypatch.setattr(hellaswag, "find_items", lambda rt: [ITEM])
    flags = ("--sample-every", 10, "--hellaswag-every", 10, "--out", "r")
    assert train("--data", data, *TINY, *flags) == 0
    out = capfd.readouterr().out
    assert out.count("warning") == 1
    assert f"warning: {what} (KeyError: 'a fault of it'); training goes on" in out
    weights = "step_000020/model.safetensors"
    assert same_tensors(finished / weights, Path("r") / weights)


@pytest.mark.parametrize(
    "error, code",
    [
        (torch.OutOfMemoryError("CUDA out of memory"), 2),
        (RuntimeError("Connection closed by peer"), 2),
        (KeyboardInterrupt(), 130),
        (script.Stopped(signal.SIGTERM), 143),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_a_fault_of_the_run_ends_it_in_a_side_activity_too(
    data, in_tmp, monkeypatch, error, code
):
    monkeypatch.setattr(train_gpt2, "sample_text", mock.Mock(side_effect=error))
    assert train("--data", data, *TINY, "--sample-every", 10, "--out", "r") == code
    assert len(losses(Path("r"))) == 10


# ------------------------------------------------------------------------------------ loss spikes


@pytest.fixture
def spike_in_step_14(monkeypatch) -> None:
    """The 14th batch holds a byte that no text has, and eight losses are enough to judge it by."""
    real = train_gpt2.step_batch

    def with_a_foreign_batch(data, config, first_sample, *ranks):
        batch = real(data, config, first_sample, *ranks)
        is_foreign = first_sample == 13 * config.sequences_per_step
        return torch.full_like(batch, 200) if is_foreign else batch

    monkeypatch.setattr(train_gpt2, "step_batch", with_a_foreign_batch)
    monkeypatch.setattr(train_gpt2.SpikeGuard, "WINDOW", 8)
    monkeypatch.setattr(train_gpt2.SpikeGuard, "LEAST", 8)


def test_a_loss_that_jumps_is_logged_and_warned_about_once(data, in_tmp, capfd, spike_in_step_14):
    assert train("--data", data, *TINY, "--out", "r") == 0
    (spike,) = read_log(Path("r"), "spike")
    assert spike["step"] == 14
    assert spike["loss"] == losses(Path("r"))[13]
    assert spike["z"] > 6
    assert not spike["left_out"]
    out = capfd.readouterr().out
    assert out.count("warning") == 1
    assert f"warning: step 14: loss {spike['loss']:.4f} is a spike, {spike['z']:.1f}" in out
    assert "its update was made" in out


def test_with_skip_spikes_the_weights_are_those_of_a_run_without_that_update(
    data, in_tmp, monkeypatch, spike_in_step_14
):
    assert train("--data", data, *TINY, "--skip-spikes", "--out", "skipping") == 0
    assert [entry["left_out"] for entry in read_log(Path("skipping"), "spike")] == [True]
    real = train_gpt2.build_optimizer

    def without_update_14(*args):
        optim = real(*args)
        step, calls = optim.step, []
        optim.step = lambda: calls.append(1) if len(calls) == 13 else calls.append(step())
        return optim

    monkeypatch.setattr(train_gpt2, "build_optimizer", without_update_14)
    assert train("--data", data, *TINY, "--out", "other") == 0
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert same_tensors(Path("skipping/step_000020", file), Path("other/step_000020", file))


@pytest.mark.parametrize("step", [10, 15])
def test_a_resumed_run_leaves_out_what_an_undisturbed_one_leaves_out(
    data, in_tmp, spike_in_step_14, step
):
    """Before the spike it needs the losses until then; after it, the number of updates made."""
    flags = ("--skip-spikes", "--save-every", 5, "--keep", 10)
    assert train("--data", data, *TINY, *flags, "--out", "r") == 0
    shutil.copytree("r", "whole")
    for folder in run_directory.step_directories(Path("r")):
        if run_directory.step_number(folder) > step:
            shutil.rmtree(folder)
    assert train("--out", "r", "--resume") == 0
    for file in ("model.safetensors", "optimizer.safetensors", "state.json"):
        whole, resumed = Path("whole/step_000020", file), Path("r/step_000020", file)
        if file == "state.json":
            spikes = [json.loads(path.read_text())["spikes"] for path in (whole, resumed)]
            assert spikes[0] == spikes[1]
        else:
            assert same_tensors(whole, resumed)
    assert read_log(Path("r")) == read_log(Path("whole"))


# ------------------------------------------------------------------------------------ eval-only


def evaluate_only(*args) -> int:
    return train("--eval-only", *args, "--dtype", "float32", "--device", "cpu")


def test_eval_only_measures_the_validation_split_of_shards(data, finished, in_tmp, capfd):
    assert evaluate_only("--init-from", finished, "--data", data, "--eval-tokens", 1000) == 0
    out = capfd.readouterr().out
    expected = read_log(finished, "eval")[-1]["val_loss"]
    assert f"validation loss {expected:.4f}" in out
    assert f"perplexity      {math.exp(expected):.2f}" in out


def test_eval_only_writes_nothing(data, finished, in_tmp):
    assert evaluate_only("--init-from", finished, "--data", data, "--eval-tokens", 1000) == 0
    assert list(in_tmp.iterdir()) == []


def test_eval_only_measures_the_whole_of_a_text(finished, in_tmp, capfd):
    text = (ROOT / "input.txt").read_bytes()[:5000]
    Path("novel.txt").write_bytes(text)
    assert evaluate_only("--init-from", finished, "--data", "novel.txt") == 0
    # One token a byte, and the token that ends the document.
    out = capfd.readouterr().out
    assert "measured on     5,000 of the 5,001 tokens of novel.txt" in out


def test_eval_only_of_a_text_names_its_validation_split(finished, in_tmp, capfd):
    """A model may have been trained on the text, so its loss there is none of a validation."""
    Path("novel.txt").write_bytes((ROOT / "input.txt").read_bytes()[:5000])
    assert evaluate_only("--init-from", finished, "--data", "novel.txt") == 0
    out = capfd.readouterr().out
    assert "\nloss            " in out and "validation loss" not in out
    folder = out.splitlines()[-1].removeprefix("its validation split alone: --data ")
    assert evaluate_only("--init-from", finished, "--data", folder) == 0
    out = capfd.readouterr().out
    assert "\nvalidation loss " in out and "of the 500 tokens" in out


# ------------------------------------------------------------------------------ the command line


def test_flags_are_judged_together_with_their_recipe(in_tmp):
    """1,280 tokens are ten sequences of the first run, and no multiple of GPT-2's context."""
    flags = ("--total-batch-tokens", 1280, "--micro-batch", 5)
    assert train("--recipe", "first-run", *flags, "--dry-run") == 0


@pytest.fixture(scope="module")
def broken_data(data, tmp_path_factory) -> Path:
    """Corpora with a training shard cut short, without an end, and with too little text."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "short").mkdir()
    shards = []
    for name in ("text_val_000000.bin", "text_train_000001.bin"):
        shards.append(write_shard(folder / "short" / name, np.zeros(20, dtype=np.uint16)))
    manifest = {"encoding": "bytes", "vocab_size": 257, "shards": shards}
    write_manifest(folder / "short", manifest)
    for name in ("truncated", "unfinished"):
        shutil.copytree(data, folder / name)
    shard = folder / "truncated/text_train_000001.bin"
    shard.write_bytes(shard.read_bytes()[:5000])
    (folder / "unfinished/manifest.partial.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    "flags, culprit",
    [
        (["--data", "missing"], "missing"),
        (["--data", ""], "--data is missing"),
        (["--micro-batch", "5"], "--micro-batch one of 1, 2, 4, 8, 16"),
        (["--total-batch-tokens", "500"], "--total-batch-tokens 500"),
        (["--recipe", "gpt5"], "gpt5"),
        (["--device", "tpu"], "--device tpu"),
        (["--learning-rate", "nan"], "--learning-rate nan"),
        (["--grad-clip", "inf"], "--grad-clip inf"),
        (["--dropout", "1"], "--dropout 1"),
        (["--seed", "-1"], "--seed -1"),
        (["--save-every", str(2**63)], "--save-every 9223372036854775808"),
        (["--data", "truncated"], "text_train_000001.bin"),
        (["--data", "unfinished"], "manifest.partial.json"),
        (["--data", "short"], "short: 20 tokens to train on"),
        (["--deterministic", "--micro-batch", "16", "--total-batch-tokens", "1536"], "power of"),
        (["--config", "missing.json"], "missing.json"),
        (["--init-from", "runs/missing"], "runs/missing"),
    ],
)
def test_bad_input_exits_2_and_its_one_line_names_the_culprit(
    data, broken_data, in_tmp, capfd, flags, culprit
):
    for path in broken_data.iterdir():
        Path(path.name).symlink_to(path)
    assert train("--data", data, *TINY, *flags) == 2
    assert culprit in last_error(capfd)


def test_an_unknown_flag_exits_2(data, in_tmp, capfd):
    assert train("--data", data, *TINY, "--no-such-flag") == 2
    assert "--no-such-flag" in capfd.readouterr().err


@pytest.mark.parametrize("existed", [False, True])
def test_a_start_that_fails_leaves_no_directory_that_it_has_made(in_tmp, existed):
    if existed:
        Path("runs/first-run").mkdir(parents=True)
    assert train("--data", "missing", *TINY) == 2
    assert Path("runs/first-run").exists() == existed


def test_a_job_that_may_restart_names_its_run(data, in_tmp, monkeypatch, capfd):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    flags = ("--data", data, *TINY, "--max-steps", 1, "--eval-every", 0, "--out", "r")
    assert train(*flags) == 2
    assert "--max-restarts 3 without --out and --resume" in last_error(capfd)
    assert train(*flags, "--resume") == 0


def test_an_out_directory_with_a_run_is_refused(data, copy, in_tmp, capfd):
    assert train("--data", data, *TINY, "--out", "r") == 2
    assert "r: holds a run" in last_error(capfd)


def test_checkpoints_without_a_train_json_are_not_mixed_with_a_new_run(data, copy, in_tmp, capfd):
    """Pruning would count them, and they would be resumed from."""
    (copy / "train.json").unlink()
    assert train("--data", data, *TINY, "--out", "r") == 2
    assert "r: holds" in last_error(capfd)


# --------------------------------------------------------------------- in processes of their own


def test_ctrl_c_saves_exits_130_and_prints_no_traceback(data, in_tmp):
    flags = ("--max-steps", 100_000, "--save-every", 50_000, "--eval-every", 0, "--out", "r")
    process = start_script(
        "train_gpt2.py", "--data", data, *TINY, *flags, stderr=subprocess.PIPE, text=True
    )
    log = Path("r/log.jsonl")
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 10):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert saved_steps(Path("r")) == [len(losses(Path("r")))]


def test_compiled_training_learns_the_same(data, in_tmp):
    flags = ("--max-steps", 5, "--eval-every", 5)
    assert train("--data", data, *TINY, *flags, "--out", "eager") == 0
    assert train("--data", data, *TINY, *flags, "--compile", "--out", "compiled") == 0
    assert np.allclose(losses(Path("eager")), losses(Path("compiled")), atol=1e-4, rtol=0)
    names = load_file("compiled/step_000005/model.safetensors").keys()
    assert names == dict(GPT(tiny_config()).named_parameters()).keys()  # without a prefix


@pytest.mark.parametrize("capability, is_said", [((7, 5), True), ((8, 0), False)])
def test_a_gpu_without_bfloat16_is_said_to_train_in_float32(monkeypatch, capability, is_said):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    rt = Runtime(device=torch.device("cuda"), dtype=torch.float32)
    said = report.runtime_line(rt, CONFIG.seq_len)
    assert ("no bfloat16, so it trains in float32" in said) == is_said


def test_a_model_is_not_measured_on_tokens_of_another_encoding(finished, in_tmp, capfd):
    Path("words").mkdir()
    shards = [
        write_shard(Path("words") / name, np.arange(1000, dtype=np.uint16))
        for name in ("a_val_000000.bin", "a_train_000001.bin")
    ]
    write_manifest(Path("words"), {"encoding": "gpt2", "vocab_size": 50257, "shards": shards})
    assert evaluate_only("--init-from", finished, "--data", "words") == 2
    assert "tokens of the encoding gpt2; expected bytes" in last_error(capfd)
