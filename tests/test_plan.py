"""The plan of a run: every formula against something that counts for itself, and docs/scaling.md against the code."""

import re
import shlex
import subprocess

import pytest
import torch
from conftest import ROOT

import plan
from model import GPT, SIZES, GPTConfig, NextTokenLoss
from plan import (
    activation_bytes,
    all_reduce_seconds,
    checkpoint_bytes,
    checkpoint_interval,
    flops_per_token,
    memory,
    parameters,
)
from run_directory import save_step
from runtime import Runtime, start
from tokens import get_encoding
from train_gpt2 import RECIPES, main, make_optimizer, read_config

DOC = (ROOT / "docs" / "scaling.md").read_text()


@pytest.mark.parametrize("config", [*SIZES.values(), GPTConfig(3, 2, 34, 77, 257)])
def test_parameters_are_those_of_the_network(config):
    with torch.device("meta"):
        assert parameters(config) == GPT(config).num_parameters()


def kept_bytes(config: GPTConfig, B: int, rt: Runtime) -> int:
    """Bytes of the distinct tensors that autograd saves in one forward pass, parameters aside."""
    loss_fn, sizes, alive = NextTokenLoss(GPT(config)), {}, []
    own = {p.untyped_storage().data_ptr() for p in loss_fn.parameters()}

    def pack(tensor):
        alive.append(tensor)  # so that no address is used twice
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    idx = torch.randint(config.vocab_size, (B, config.block_size))
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        rt.autocast(),
        rt.attention(config.block_size),
    ):
        loss_fn(idx, idx)
    return sum(size for address, size in sizes.items() if address not in own)


@pytest.mark.parametrize(
    "T,dtype,width,fused",
    [(576, "bfloat16", 2, True), (128, "bfloat16", 2, False), (128, "float32", 4, True)],
)
def test_activations_are_what_autograd_keeps(T, dtype, width, fused):
    config = GPTConfig(2, 4, 64, T, 300)
    rt = start("cpu", dtype)
    measured = (kept_bytes(config, 4, rt) - kept_bytes(config, 2, rt)) / (2 * T)
    assert activation_bytes(config, width, fused) == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize(
    "dtype,width,B", [(torch.bfloat16, 2, 1), (torch.bfloat16, 2, 3), (torch.float32, 4, 3)]
)  # B: chunks of the loss
def test_memory_is_the_peak_that_torch_tracks(dtype, width, B):
    """torch's MemTracker watches every allocation of two micro-batches and an update, on tensors without data."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    config = GPTConfig(2, 4, 512, 1024, 4096)
    with FakeTensorMode():
        loss_fn = NextTokenLoss(GPT(config))
        optimizer = make_optimizer(loss_fn.model, RECIPES["gpt2"])
        tracker, idx = MemTracker(), torch.zeros(B, 1024, dtype=torch.long)
        tracker.track_external(loss_fn, optimizer)
        with tracker:
            for step in range(2):  # the moments exist from the first update on
                for _ in range(2):
                    with torch.autocast("cpu", dtype, enabled=width == 2):
                        loss = loss_fn(idx, idx)
                    loss.backward()
                    tracker.reset_mod_stats()
                optimizer.step()
                optimizer.zero_grad()
        peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert sum(memory(config, B, width, "cpu").values()) == pytest.approx(peak, rel=0.03)


def test_a_ring_sends_what_the_formula_says():
    """A ring played through: W ranks with W chunks each pass one chunk a turn, first summing, then copying."""
    W, size = 5, 4 * parameters(SIZES["gpt2"])
    have = [
        [{rank} for _ in range(W)] for rank in range(W)
    ]  # whose gradients each rank's chunks hold
    sent = 0.0
    for turn in range(2 * (W - 1)):
        passed = [((rank - turn) % W, have[rank][(rank - turn) % W]) for rank in range(W)]
        for rank, (chunk, ranks) in enumerate(passed):
            have[(rank + 1) % W][chunk] = have[(rank + 1) % W][chunk] | ranks
        sent += size / W
    assert all(chunk == set(range(W)) for chunks in have for chunk in chunks)
    assert all_reduce_seconds(SIZES["gpt2"], W, bandwidth=1e9) == pytest.approx(sent / 1e9)
    assert all_reduce_seconds(SIZES["gpt2"], 1, bandwidth=1e9) == 0


def test_the_checkpoint_interval_loses_the_least():
    write, mtbf = 20.0, 5000.0

    def lost(
        interval: float,
    ) -> float:  # share of time: writing, and half an interval of work at each failure
        return write / interval + interval / 2 / mtbf

    best = checkpoint_interval(write, mtbf)
    assert lost(best) < min(lost(0.9 * best), lost(1.1 * best))


def test_a_checkpoint_has_the_planned_size(tmp_path):
    config = GPTConfig(2, 2, 64, 64, 257)
    model = GPT(config)
    optimizer = make_optimizer(model, RECIPES["gpt2"])
    model(torch.zeros(1, 8, dtype=torch.long)).sum().backward()
    optimizer.step()
    folder = save_step(tmp_path, 1, model, get_encoding("bytes"), optimizer, {})
    written = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert written == pytest.approx(checkpoint_bytes(config), rel=0.02)


@pytest.mark.parametrize(
    "dtype,width,fused", [("float32", 4, True), ("bfloat16", 2, False)]
)  # see Runtime.attention
def test_dry_run_prints_the_plan_and_leaves_no_trace(
    dtype, width, fused, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "matmul_speed", lambda rt: 1e12)
    main(
        [
            "--dry-run",
            "--device",
            "cpu",
            "--recipe",
            "first-run",
            "--n-embd",
            "256",
            "--seq-len",
            "256",
            "--max-steps",
            "600",
            "--total-batch-tokens",
            "8192",
            "--micro-batch",
            "8",
            "--dtype",
            dtype,
        ]
    )
    out = capsys.readouterr().out
    config = GPTConfig(4, 4, 256, 256, 257)
    seconds = 600 * 8192 * flops_per_token(config) / 0.4e12
    for words in (
        f"{parameters(config):,} parameters",
        "600 steps of 8,192 tokens = 4,915,200 tokens",
        "4 micro-batches of 8 × 256 tokens on each rank",
        f"memory         about {plan.amount(sum(memory(config, 8, width, 'cpu', fused).values()))}",
        f"time           {plan.duration(seconds)} at",
        "40% (assumed) of each rank's 1 TFLOP/s (of matrix products timed here)",
        f"checkpoints    {plan.amount(checkpoint_bytes(config))}",
    ):
        assert words in out
    assert not list(tmp_path.iterdir())


def test_a_known_gpu_is_planned_from_its_datasheet(monkeypatch):
    monkeypatch.setattr(plan, "peak_flops", lambda device: 989e12)
    rt = Runtime(0, 8, torch.device("cuda"), torch.bfloat16)
    line, _ = plan.plan_time(SIZES["gpt2"], rt, 19073, 524288)
    assert (
        "45 minutes at 3,70" in line and "989 TFLOP/s (in its datasheet)" in line
    )  # 8 × 0.4 × 989e12 / 854e6 = 3.70M tokens/s


def test_matmul_speed_counts_flops(monkeypatch):
    clock = iter(i * 0.25 for i in range(100))
    monkeypatch.setattr(plan.time, "perf_counter", lambda: next(clock))
    assert plan.matmul_speed(start("cpu", "float32")) == 2 * 512**3 / 0.25


def test_scaling_holds_the_output_of_plan():
    for table in plan.tables():
        assert table in DOC
    assert {name: RECIPES[name].total_batch_tokens for name in SIZES} == plan.BATCH


def test_commands_in_scaling_are_understood(tmp_path, monkeypatch):
    """Each torchrun line is parsed by torchrun's parser and its end by the trainer's; shell blocks by bash."""
    from torch.distributed.run import get_args_parser

    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```bash\n(.*?)```", DOC, re.S)
    commands = [
        line
        for block in blocks
        for line in block.replace("\\\n", " ").splitlines()
        if "torchrun" in line
    ]
    assert len(commands) == 2
    for block in blocks:
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)
    for command in commands:
        args = get_args_parser().parse_args(
            shlex.split(command)[shlex.split(command).index("torchrun") + 1 :]
        )
        config, _ = read_config(args.training_script_args)
        assert (
            args.training_script == "train_gpt2.py"
            and config.resume
            and config.out == f"runs/{config.recipe}"
        )


def test_datatrove_lines_in_scaling_build_a_pipeline(tmp_path, monkeypatch):
    executor = pytest.importorskip("datatrove.executor")
    monkeypatch.chdir(tmp_path)
    started = []
    monkeypatch.setattr(executor.SlurmPipelineExecutor, "run", lambda self: started.append(self))
    (code,) = re.findall(r"```python\n(.*?)```", DOC, re.S)
    exec(code, {"__name__": "__main__"})
    assert len(started) == 1 and len(started[0].pipeline) == 2
