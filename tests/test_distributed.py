"""Several ranks: what they learn together, resume after kills, agreement, signals, errors."""

import hashlib
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from chaos import FLAGS, campaign, run_ranks, start_ranks
from tools import read_log, torchrun, write_bytes_data

import hellaswag

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


def wait_for_steps(folder: Path, count: int, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    log = folder / "log.jsonl"
    while not (log.exists() and log.read_text().count('"train"') >= count):
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ------------------------------------------------------------------------------- kill and resume


@pytest.fixture(scope="module")
def campaigns(tmp_path_factory) -> tuple[Path, dict]:
    """For each number of ranks a run with dropout, and the same run killed twice and resumed."""
    folder = tmp_path_factory.mktemp("campaigns")
    seed = random.randrange(2**32)
    scores = {}
    for world_size in (1, 2, 3, 4):
        scores[world_size] = campaign(2, [world_size], folder, seed, FLAGS.split())
    return folder, scores


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_killed_and_resumed_run_ends_with_the_bits_of_an_undisturbed_one(campaigns, world_size):
    """Weights, optimizer state, log without timing, best.json, and the list of checkpoints."""
    score = campaigns[1][world_size]
    assert score.faults == []
    assert score.kills == 2


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("event, key", [("train", "loss"), ("eval", "val_loss")])
def test_ranks_learn_with_dropout_what_one_process_learns(campaigns, world_size, event, key):
    folder, _ = campaigns
    one = values(folder / "calm-1", event, key)
    several = values(folder / f"calm-{world_size}", event, key)
    assert np.allclose(one, several, atol=1e-4, rtol=0)


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


# --------------------------------------------------------------------------- agreement and errors


def test_ranks_with_other_flags_end_with_one_line_that_names_them(data, tmp_path):
    args = ["--data", data, *CALM, "--out", tmp_path / "run"]
    other = {1: ["--seed", 1]}
    with start_ranks(2, args, tmp_path / "output", args_of_rank=other) as ranks:
        assert ranks.wait() == [2, 2]
    text = outputs(ranks)
    assert text.count("error:") == 1
    assert "the flags or the data of rank 1 differ from rank 0's" in text
    assert "Traceback" not in text


def test_bad_input_that_only_rank_0_reads_ends_all_ranks_with_one_line(tmp_path):
    args = ["--data", tmp_path / "missing", *CALM, "--out", tmp_path / "run"]
    with start_ranks(4, args, tmp_path / "output") as ranks:
        assert ranks.wait(60) == [2, 2, 2, 2]
    text = outputs(ranks)
    assert text.count("error:") == 1
    assert str(tmp_path / "missing") in text
    assert "Traceback" not in text


def test_a_directory_in_use_ends_all_ranks_with_one_line(data, tmp_path):
    args = ["--data", data, *CALM, "--max-steps", 100_000, "--out", tmp_path / "run"]
    with start_ranks(1, args, tmp_path / "first") as first:
        wait_for_steps(tmp_path / "run", 1)
        with start_ranks(2, [*args, "--resume"], tmp_path / "second") as second:
            assert second.wait(60) == [2, 2]
        assert first.running()
    text = outputs(second)
    assert text.count("error:") == 1
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


def test_torchrun_trains_and_its_restart_count_does_not_disturb(data, tmp_path):
    args = ("--data", data, *CALM, "--max-steps", 1, "--out", tmp_path / "run")
    done = torchrun(2, "train_gpt2.py", *args)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("recipe first-run") == 1
    job = json.loads((tmp_path / "run/train.json").read_text())["started"]["job"]
    assert job


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
    item = hellaswag.Item("A cat", ("sat.", "flew.", "sang songs.", "was."), 0)
    items = [item] * 7  # no multiple of the ranks
    hellaswag.find_items = lambda rt: items


def test_hellaswag_in_a_distributed_run_scores_what_one_process_scores(data, tmp_path):
    args = ["--data", data, *CALM, "--hellaswag-every", 3, "--save-every", 0]
    for world_size in (1, 2):
        out = ["--out", tmp_path / f"ranks-{world_size}"]
        run_ranks(world_size, [*args, *out], tmp_path / "output", prepare=use_a_few_hellaswag_items)
    one = read_log(tmp_path / "ranks-1", "hellaswag")
    assert [entry["step"] for entry in one] == [3, 6]
    assert one[0]["items"] == 7
    assert read_log(tmp_path / "ranks-2", "hellaswag") == one


def lose_hellaswag() -> None:
    hellaswag.find_items = lambda rt: None


def test_without_hellaswags_items_the_run_goes_on(data, tmp_path):
    args = ["--data", data, *CALM, "--hellaswag-every", 3, "--out", tmp_path / "run"]
    run_ranks(2, args, tmp_path / "output", prepare=lose_hellaswag)
    assert len(values(tmp_path / "run", "train", "loss")) == 6
