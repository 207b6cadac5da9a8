"""Forks: new runs that go on from another run's checkpoint. Schedules that forks are made for."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tools import read_log, run_main, tiny_model, write_bytes_data

import train_gpt2
from support import run_directory
from train_gpt2 import RECIPES, learning_rate, main

TINY = [
    "--n-layer",
    "2",
    "--n-head",
    "2",
    "--n-embd",
    "32",
    "--seq-len",
    "32",
    "--total-batch-tokens",
    "512",
    "--micro-batch",
    "4",
    "--max-steps",
    "12",
    "--warmup-steps",
    "2",
    "--eval-every",
    "4",
    "--eval-tokens",
    "500",
    "--sample-every",
    "0",
    "--save-every",
    "4",
    "--keep",
    "9",
    "--dtype",
    "float32",
    "--device",
    "cpu",
]
FILES = ("model.safetensors", "optimizer.safetensors")


def train(*args) -> int:
    return run_main(main, *args)


def same_checkpoint(a: str, b: str) -> bool:
    for file in FILES:
        one, other = load_file(Path(a, file)), load_file(Path(b, file))
        if one.keys() != other.keys():
            return False
        if not all(torch.equal(one[name], other[name]) for name in one):
            return False
    return True


@pytest.fixture(scope="module")
def trunks(tmp_path_factory) -> Path:
    """Runs of twelve steps, `adamw` and `muon` with dropout, on the data `text`."""
    folder = tmp_path_factory.mktemp("trunks")
    write_bytes_data(folder / "text")
    for name in ("adamw", "muon"):
        flags = ("--optimizer", name, "--dropout", 0.1, "--out", folder / name)
        assert train("--data", folder / "text", *TINY, *flags) == 0
    return folder


@pytest.fixture
def here(trunks, tmp_path, monkeypatch) -> Path:
    shutil.copytree(trunks, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_fork_with_nothing_changed_ends_with_the_bits_of_its_parent(here, name):
    assert train("--fork", f"{name}/step_000004", "--out", "fork") == 0
    assert same_checkpoint(f"{name}/step_000012", "fork/step_000012")
    logs = [read_log(Path(run)) for run in (name, "fork")]
    assert logs[0] == logs[1]


def test_a_fork_says_where_it_comes_from(here):
    assert train("--fork", "muon/step_000008", "--out", "fork") == 0
    origin = json.loads(Path("fork/train.json").read_text())["origin"]
    manifest = json.loads(Path("muon/step_000008/manifest.json").read_text())
    assert origin == {
        "run": "muon",
        "step": 8,
        "samples": 8 * 16,
        "weights": manifest["files"]["model.safetensors"]["sha256"],
    }


def batches_of(monkeypatch, *args) -> list[tuple[int, int]]:
    """First sample and number of samples of each step that a command trains."""
    seen = []
    real = train_gpt2.step_batch

    def step_batch(data, config, first_sample, *ranks):
        seen.append((first_sample, config.sequences_per_step))
        return real(data, config, first_sample, *ranks)

    with monkeypatch.context() as patch:
        patch.setattr(train_gpt2, "step_batch", step_batch)
        assert train(*args) == 0
    return seen[:-1]  # the last one is read ahead, and not trained on


def test_a_fork_with_another_batch_goes_on_at_the_next_sample(here, monkeypatch):
    """Step 8 of 16 sequences each has seen samples 0 to 127."""
    flags = ("--total-batch-tokens", 1024, "--max-steps", 10, "--out", "fork")
    assert batches_of(monkeypatch, "--fork", "muon/step_000008", *flags) == [(128, 32), (160, 32)]
    state = json.loads(Path("fork/step_000010/state.json").read_text())
    assert state["samples"] == 192
    assert state["tokens"] == 192 * 32
    assert read_log(Path("fork"), "train")[-1]["tokens"] == 192 * 32
    # A fork of the fork goes on from there.
    flags = ("--max-steps", 11, "--out", "again")
    assert batches_of(monkeypatch, "--fork", "fork", *flags) == [(192, 32)]


def test_a_fork_on_other_data_begins_with_their_first_sample(here, monkeypatch):
    text = Path("other.txt")
    text.write_text("Other words, many times over. " * 500)
    flags = ("--data", text, "--tokenizer", "bytes", "--max-steps", 10, "--out", "fork")
    assert batches_of(monkeypatch, "--fork", "muon/step_000008", *flags) == [(0, 16), (16, 16)]


def test_a_fork_that_is_stopped_and_resumed_ends_as_one_that_was_not(here, monkeypatch):
    flags = ("--fork", "muon/step_000004", "--learning-rate", 1e-3, "--max-steps", 16)
    assert train(*flags, "--out", "whole") == 0
    real = train_gpt2.train_step
    calls = []

    def step_with_signal(*args):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train_gpt2, "train_step", step_with_signal)
        assert train(*flags, "--out", "halves") == 143
    assert train("--out", "halves", "--resume") == 0
    assert same_checkpoint("whole/step_000016", "halves/step_000016")


def test_a_fork_killed_before_its_first_save_starts_again_at_its_parent(here):
    flags = ("--fork", "muon/step_000004", "--out", "fork", "--resume")
    assert train(*flags) == 0
    for folder in run_directory.step_directories(Path("fork")):
        shutil.rmtree(folder)
    assert train(*flags) == 0
    assert same_checkpoint("muon/step_000012", "fork/step_000012")
    assert read_log(Path("fork")) == read_log(Path("muon"))


def test_what_the_learning_rate_does_at_the_seam_is_said(here, capfd):
    assert train("--fork", "muon", "--max-steps", 24, "--out", "fork") == 0
    # The parent's last update, 11 steps after 2 of warm-up, had a tenth of the peak, 8e-3.
    assert "learning rate  8.0e-04 → 4.4e-03\n" in capfd.readouterr().out


# ------------------------------------------------------------------------------------------- wsd

WSD = replace(RECIPES["first-run"], schedule="wsd", max_steps=100, warmup_steps=10, decay_steps=20)


def test_wsd_is_constant_between_warm_up_and_decay_and_falls_to_zero():
    rates = [learning_rate(step, WSD) / WSD.learning_rate for step in range(101)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10:81] == [1.0] * 71
    assert rates[80:] == pytest.approx([(100 - step) / 20 for step in range(80, 101)])


def test_muons_rate_follows_the_schedule():
    model = tiny_model()
    optim = train_gpt2.build_optimizer(model, WSD)
    train_gpt2.set_learning_rate(optim, learning_rate(90, WSD))
    assert sorted({group["lr"] for group in optim.param_groups}) == pytest.approx([4e-3, 0.01])


def test_the_trunk_is_saved_where_the_decay_begins_and_never_pruned(here):
    flags = ("--schedule", "wsd", "--decay-steps", 5, "--save-every", 2, "--keep", 1)
    assert train("--data", "text", *TINY, *flags, "--out", "r") == 0
    steps = [folder.name for folder in run_directory.step_directories(Path("r"))]
    assert steps == ["step_000007", "step_000012"]


def test_a_longer_trunk_from_the_trunk_is_the_run_that_was_longer_from_the_start(here):
    flags = ("--schedule", "wsd", "--decay-steps", 4, "--save-every", 4)
    assert train("--data", "text", *TINY, *flags, "--out", "short") == 0
    assert train("--data", "text", *TINY, *flags, "--max-steps", 20, "--out", "long") == 0
    assert train("--fork", "short/step_000008", "--max-steps", 20, "--out", "fork") == 0
    assert same_checkpoint("long/step_000020", "fork/step_000020")


@pytest.mark.parametrize("decay", [0, 11])
def test_a_wsd_without_room_for_its_decay_is_refused(here, capfd, decay):
    flags = ("--schedule", "wsd", "--decay-steps", decay, "--out", "r")
    assert train("--data", "text", *TINY, *flags) == 2
    assert f"--decay-steps {decay}" in capfd.readouterr().err


@pytest.mark.parametrize("warmup", [12, 13])
def test_a_wsd_whose_warm_up_takes_the_whole_run_is_refused(here, capfd, warmup):
    flags = ("--schedule", "wsd", "--decay-steps", 2, "--warmup-steps", warmup, "--out", "r")
    assert train("--data", "text", *TINY, *flags) == 2
    assert f"--warmup-steps {warmup} of --max-steps 12; expected fewer" in capfd.readouterr().err
