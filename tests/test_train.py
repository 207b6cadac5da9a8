"""The trainer: schedule, accumulation, evaluation, resume, exactness across ranks, and its command line."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GPT2LMHeadModel

import run_directory
import train_gpt2
from cli import run_script
from model import GPT, GPTConfig, NextTokenLoss
from runtime import start
from tokens import get_encoding, open_data, token_bytes, write_shard
from train_gpt2 import (
    RECIPES,
    evaluate,
    flops_per_token,
    learning_rate,
    main,
    make_optimizer,
    step_batch,
    train_step,
)

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
    "20",
    "--warmup-steps",
    "2",
    "--eval-every",
    "10",
    "--eval-tokens",
    "1000",
    "--sample-every",
    "0",
    "--save-every",
    "10",
    "--dtype",
    "float32",
    "--device",
    "cpu",
    "--no-compile",
]
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
TIMING = ("tokens_per_second", "mfu", "elapsed", "seconds")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A prepared directory of bytes: the sample text, the last tenth validating."""
    folder = tmp_path_factory.mktemp("data")
    tokens = np.frombuffer((ROOT / "input.txt").read_bytes(), dtype=np.uint8).astype(np.uint16)
    cut = len(tokens) * 9 // 10
    shards = [
        write_shard(folder / "text_val_000000.bin", tokens[cut:]),
        write_shard(folder / "text_train_000001.bin", tokens[:cut]),
    ]
    (folder / "manifest.json").write_text(
        json.dumps({"encoding": "bytes", "vocab_size": 257, "shards": shards})
    )
    return folder


@pytest.fixture
def in_tmp(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*args) -> int:
    """Exit code of train_gpt2.py with these arguments, in this process."""
    with pytest.raises(SystemExit) as stopped:
        run_script(lambda: main([str(a) for a in args]))
    return stopped.value.code


def log(folder: Path, event: str | None = None) -> list[dict]:
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in e.items() if k not in TIMING}
        for e in entries
        if event in (None, e["event"])
    ]


def losses(folder: Path) -> list[float]:
    return [e["loss"] for e in log(folder, "train")]


# ------------------------------------------------------------------------------------------- pure pieces


def test_schedule_warms_up_linearly_then_follows_a_cosine_to_its_end():
    config = replace(CONFIG, learning_rate=1e-3, min_lr=1e-4, warmup_steps=10, max_steps=110)
    assert learning_rate(0, config) == pytest.approx(1e-4)
    assert learning_rate(9, config) == learning_rate(10, config) == pytest.approx(1e-3)
    assert learning_rate(60, config) == pytest.approx(5.5e-4)
    assert learning_rate(110, config) == pytest.approx(1e-4)


def test_gpt2_recipe_is_gpt3_table_2_1():
    c = RECIPES["gpt2"]
    assert (c.learning_rate, c.total_batch_tokens, c.warmup_steps, c.max_steps, c.min_lr) == (
        6e-4,
        524_288,
        715,
        19_073,
        pytest.approx(6e-5),
    )
    for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        c = RECIPES[name]
        assert c.max_steps * c.total_batch_tokens == pytest.approx(10e9, rel=1e-3)
        assert c.warmup_steps * c.total_batch_tokens == pytest.approx(375e6, rel=2e-3)
        assert c.min_lr == pytest.approx(c.learning_rate / 10)


def test_weight_decay_is_on_matrices_only():
    model = GPT(GPTConfig(2, 2, 32, 32, 257))
    decayed, free = make_optimizer(model, CONFIG).param_groups
    assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0.0
    names = {p: n for n, p in model.named_parameters()}
    assert all(names[p].endswith("weight") and "ln_" not in names[p] for p in decayed["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(names)


def test_flops_agree_with_torchs_counter():
    from torch.utils.flop_counter import FlopCounterMode

    model = GPT(GPTConfig(2, 2, 32, 64, 257))
    idx = torch.randint(0, 257, (1, 64))
    with (
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):  # the counter does not know the fused kernel
        model(idx).sum().backward()
    assert counter.get_total_flops() == flops_per_token(model.config) * 64


def gradients(micro_batch: int) -> torch.Tensor:
    torch.manual_seed(0)
    model = GPT(GPTConfig(2, 2, 32, 32, 257))
    config = replace(CONFIG, micro_batch=micro_batch, grad_clip=1e9)
    optimizer = make_optimizer(model, config)
    seen = {}
    optimizer.step = lambda: seen.update(
        g=torch.cat([p.grad.flatten() for p in model.parameters()])
    )
    train_step(
        NextTokenLoss(model),
        optimizer,
        torch.randint(0, 257, (16, 33), generator=torch.Generator().manual_seed(1)),
        config,
        start("cpu", "float32"),
    )
    return seen["g"]


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_accumulated_gradient_is_the_big_batchs(micro_batch):
    big = gradients(16)
    assert torch.linalg.norm(gradients(micro_batch) - big) <= 1e-5 * torch.linalg.norm(big)


def test_evaluation_is_the_mean_loss_of_transformers_over_the_split(data, tmp_path):
    """Full windows and the shorter one at the end of the budget, weighted by their tokens."""
    model = GPT(GPTConfig(2, 2, 32, 32, 257))
    model.save_pretrained(tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    val = open_data(data).val
    ours = evaluate(
        model,
        val,
        replace(CONFIG, eval_tokens=1000),
        start("cpu", "float32"),
        token_bytes(get_encoding("bytes")),
    )
    tokens = torch.from_numpy(val.read(0, 1001).astype(np.int64))
    windows = [tokens[i : i + 33] for i in range(0, 1000, 32)]
    nats = sum(
        F.cross_entropy(theirs(w[None, :-1]).logits[0], w[1:], reduction="sum").item()
        for w in windows
    )
    assert ours["eval_tokens"] == 1000
    assert ours["val_loss"] == pytest.approx(nats / 1000, abs=1e-5)
    assert ours["bits_per_byte"] == pytest.approx(
        nats / 1000 / math.log(2), abs=1e-5
    )  # one byte a token


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_together_read_what_one_process_reads(data, world_size):
    train = open_data(data).train
    for step in (0, 3, 60):
        alone = step_batch(train, CONFIG, step, 0, 1)
        together = torch.cat(
            [step_batch(train, CONFIG, step, rank, world_size) for rank in range(world_size)]
        )
        assert torch.equal(alone, together)


# ------------------------------------------------------------------------------------------- whole runs


def test_a_run_logs_evaluates_saves_and_draws(data, in_tmp):
    assert run("--data", data, *TINY, "--sample-every", 20, "--out", "r") == 0
    folder = in_tmp / "r"
    raw = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in log(folder, "train")] == list(range(1, 21))
    assert [e["step"] for e in log(folder, "eval")] == [0, 10, 20]
    assert [e["step"] for e in log(folder, "sample")] == [20] and [
        e["step"] for e in log(folder, "save")
    ] == [10, 20]
    keys = {
        "event",
        "step",
        "tokens",
        "loss",
        "lr",
        "grad_norm",
        "tokens_per_second",
        "mfu",
        "elapsed",
    }
    assert all(set(e) == keys for e in raw if e["event"] == "train")
    assert all(
        {"val_loss", "bits_per_byte", "eval_tokens"} <= set(e) for e in raw if e["event"] == "eval"
    )
    assert log(folder, "eval")[-1]["val_loss"] < log(folder, "eval")[0]["val_loss"]
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert {p.name for p in (folder / "step_000020").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
        "manifest.json",
    }


def test_a_second_bare_run_takes_the_next_directory(data, in_tmp):
    assert (
        run("--data", data, *TINY, "--max-steps", 1)
        == run("--data", data, *TINY, "--max-steps", 1)
        == 0
    )
    assert {p.name for p in (in_tmp / "runs").iterdir()} == {"first-run", "first-run-2"}


def stop_after(monkeypatch, step: int) -> None:
    """Send this process SIGTERM in the middle of the given update."""
    real, done = train_gpt2.train_step, []

    def step_with_signal(*args):
        done.append(1)
        if len(done) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(train_gpt2, "train_step", step_with_signal)


def test_interrupted_and_resumed_equals_uninterrupted(data, in_tmp, monkeypatch):
    """With dropout, so that random state counts; losses, log and weights are the same to the last bit."""
    flags = ("--data", data, *TINY, "--dropout", 0.1, "--save-every", 7)
    assert run(*flags, "--out", "whole") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 10)
        assert run(*flags, "--out", "halves") == 143
    assert (
        run_directory.steps(in_tmp / "halves")[-1].name == "step_000011"
    )  # the stop is seen one step on, by all ranks alike
    assert run("--out", "halves", "--resume") == 0
    without_saves = lambda folder: [e for e in log(folder) if e["event"] != "save"]
    assert without_saves(in_tmp / "halves") == without_saves(in_tmp / "whole")
    whole, halves = (
        load_file(in_tmp / name / "step_000020/model.safetensors") for name in ("whole", "halves")
    )
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def test_resume_goes_back_to_the_newest_checkpoint_that_verifies(data, in_tmp, capfd):
    assert run("--data", data, *TINY, "--out", "r") == 0
    before = losses(in_tmp / "r")
    weights = in_tmp / "r/step_000020/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert run("--out", "r", "--resume") == 0
    out = capfd.readouterr().out
    assert "model.safetensors is damaged" in out and "continuing after step 10" in out
    assert losses(in_tmp / "r") == before


def test_the_printed_command_resumes_any_recipe_and_a_complete_run_says_so(data, in_tmp, capfd):
    assert run("--data", data, *TINY, "--out", "base") == 0
    assert (
        run(
            "--init-from",
            "base",
            "--data",
            data,
            "--max-steps",
            8,
            "--save-every",
            4,
            "--sample-every",
            0,
            "--out",
            "tuned",
        )
        == 0
    )
    shutil.rmtree("tuned/step_000008")
    assert run("--out", "tuned", "--resume") == 0
    assert (
        losses(in_tmp / "tuned") and run_directory.steps(in_tmp / "tuned")[-1].name == "step_000008"
    )
    capfd.readouterr()
    assert run("--out", "tuned", "--resume") == 0
    assert "tuned is complete, 8 steps" in capfd.readouterr().out


def test_flags_are_judged_together_with_their_recipe(in_tmp):
    """1,280 tokens are ten sequences of the first run, and no multiple of GPT-2's context."""
    assert (
        run("--recipe", "first-run", "--total-batch-tokens", 1280, "--micro-batch", 5, "--dry-run")
        == 0
    )


def test_resume_refuses_flags_that_change_what_is_learned_by_name(data, in_tmp, capfd):
    assert run("--data", data, *TINY, "--max-steps", 2, "--out", "r") == 0
    assert run("--out", "r", "--resume", "--learning-rate", 1, "--micro-batch", 2) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert "--learning-rate 1.0" in last and "micro" not in last


def test_a_loss_that_is_not_finite_stops_before_the_update(data, in_tmp, capfd, monkeypatch):
    real = train_gpt2.train_step

    def poisoned(loss_fn, *args):
        if torch.is_tensor(args[1]) and not hasattr(poisoned, "calls"):
            poisoned.calls = 0
        poisoned.calls += 1
        if poisoned.calls == 5:
            with torch.no_grad():
                loss_fn.model.transformer.ln_f.weight[0] = torch.nan
        return real(loss_fn, *args)

    monkeypatch.setattr(train_gpt2, "train_step", poisoned)
    assert run("--data", data, *TINY, "--save-every", 2, "--out", "r") == 2
    assert "loss nan" in capfd.readouterr().err.splitlines()[-1]
    assert (
        len(losses(in_tmp / "r")) == 4
        and run_directory.steps(in_tmp / "r")[-1].name == "step_000004"
    )


def test_best_checkpoint_is_kept_and_preferred(data, in_tmp, monkeypatch):
    """Of losses that fall until step 8 and rise after it, the best outlives pruning and is what is loaded."""
    val_losses = iter([5, 4, 3, 2, 1, 2, 3, 4, 5, 6, 7])  # before step 0, after 2, 4, …, 20
    monkeypatch.setattr(
        train_gpt2, "evaluate", lambda *args: evaluate(*args) | {"val_loss": next(val_losses)}
    )
    assert (
        run(
            "--data",
            data,
            *TINY,
            "--keep-best",
            "--keep",
            1,
            "--eval-every",
            2,
            "--save-every",
            2,
            "--out",
            "r",
        )
        == 0
    )
    assert {p.name for p in run_directory.steps(in_tmp / "r")} == {"step_000008", "step_000020"}
    assert run_directory.load_model("r")[2].endswith("step_000008")


def test_eval_only_measures_and_writes_nothing(data, in_tmp, capfd):
    assert run("--data", data, *TINY, "--max-steps", 2, "--out", "r") == 0
    wanted = log(in_tmp / "r", "eval")[-1]["val_loss"]
    capfd.readouterr()
    assert (
        run(
            "--eval-only",
            "--init-from",
            "r",
            "--data",
            data,
            "--eval-tokens",
            1000,
            "--dtype",
            "float32",
            "--device",
            "cpu",
        )
        == 0
    )
    out = capfd.readouterr().out
    assert (
        f"validation loss {wanted:.4f}" in out and f"perplexity      {math.exp(wanted):.2f}" in out
    )
    assert {p.name for p in in_tmp.iterdir()} == {"r"}


@pytest.mark.parametrize(
    "flags, culprit",
    [
        (["--no-such-flag"], "--no-such-flag"),
        (["--data", "missing"], "missing"),
        (["--micro-batch", "5"], "--micro-batch one of 1, 2, 4, 8, 16"),
        (["--total-batch-tokens", "500"], "--total-batch-tokens 500"),
        (["--recipe", "gpt5"], "gpt5"),
        (["--out", "taken"], "taken"),
        (["--device", "tpu"], "--device tpu"),
        (["--learning-rate", "nan"], "--learning-rate nan"),
        (["--data", "truncated"], "text_train_000001.bin"),
        (["--data", "unfinished"], "manifest.partial.json"),
    ],
)
def test_bad_input_exits_2_and_names_the_culprit(data, in_tmp, capfd, flags, culprit):
    for name in ("truncated", "unfinished"):
        (in_tmp / name).mkdir()
        for file in data.iterdir():
            (in_tmp / name / file.name).write_bytes(
                file.read_bytes()[:5000] if "train" in file.name else file.read_bytes()
            )
    (in_tmp / "unfinished/manifest.partial.json").write_text("{}")
    (in_tmp / "taken").mkdir()
    (in_tmp / "taken/train.json").write_text("{}")
    assert run("--data", data, *TINY, *flags) == 2
    captured = capfd.readouterr()
    assert "Traceback" not in captured.err
    place = (
        captured.err if flags == ["--no-such-flag"] else captured.err.splitlines()[-1]
    )  # the box of the flag parser
    assert culprit in place


# ------------------------------------------------------------------------------------------- several processes


def test_two_ranks_learn_what_one_process_learns(data, in_tmp):
    assert run("--data", data, *TINY, "--out", "one") == 0
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        ROOT / "train_gpt2.py",
        "--data",
        data,
        *TINY,
        "--out",
        "two",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.allclose(losses(in_tmp / "one"), losses(in_tmp / "two"), atol=1e-4, rtol=0)
    one, two = ([e["val_loss"] for e in log(in_tmp / name, "eval")] for name in ("one", "two"))
    assert np.allclose(one, two, atol=1e-4, rtol=0)
    assert done.stdout.count("recipe first-run") == 1  # rank 1 is silent


def test_ctrl_c_saves_and_the_resumed_run_starts_there(data, in_tmp):
    """The real thing, in a process of its own: SIGINT after about ten steps, exit code 130, no traceback."""
    command = [
        sys.executable,
        str(ROOT / "train_gpt2.py"),
        "--data",
        str(data),
        *TINY,
        "--max-steps",
        "100000",
        "--save-every",
        "50000",
        "--eval-every",
        "0",
        "--out",
        "r",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None and not (
            (in_tmp / "r/log.jsonl").exists() and len(losses_so_far(in_tmp / "r")) >= 10
        ):
            pass
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    stopped_at = int(run_directory.steps(in_tmp / "r")[-1].name[5:])
    assert 10 <= stopped_at == len(losses(in_tmp / "r"))


def losses_so_far(folder: Path) -> list[str]:
    return [line for line in (folder / "log.jsonl").read_text().splitlines() if '"train"' in line]


def test_compiled_training_learns_the_same(data, in_tmp):
    assert run("--data", data, *TINY, "--max-steps", 5, "--eval-every", 5, "--out", "eager") == 0
    assert (
        run(
            "--data",
            data,
            *TINY,
            "--max-steps",
            5,
            "--eval-every",
            5,
            "--compile",
            "--out",
            "compiled",
        )
        == 0
    )
    assert np.allclose(losses(in_tmp / "eager"), losses(in_tmp / "compiled"), atol=1e-4, rtol=0)
    names = load_file(in_tmp / "compiled/step_000005/model.safetensors").keys()
    assert (
        names == dict(GPT(GPTConfig(2, 2, 32, 32, 257)).named_parameters()).keys()
    )  # no prefix of the wrapper's


def test_wandb_works_offline_and_a_resumed_run_stays_the_same_run(data, in_tmp):
    command = [
        sys.executable,
        str(ROOT / "train_gpt2.py"),
        "--data",
        str(data),
        *TINY,
        "--wandb",
        "--out",
        "r",
    ]
    offline = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    subprocess.run(command, check=True, env=offline, stdout=subprocess.DEVNULL)
    shutil.rmtree("r/step_000020")
    subprocess.run([*command, "--resume"], check=True, env=offline, stdout=subprocess.DEVNULL)
    parts = sorted(Path("r/wandb").glob("offline-run-*/run-*.wandb"))
    assert (
        len(parts) == 2 and len({part.name for part in parts}) == 1
    )  # the file is named after the run's id
    for part, steps in zip(parts, (20, 10)):
        assert part.read_bytes().count(b"train/loss") >= steps
