"""The plan of a run: every formula against something that counts by itself.

And docs/scaling.md against the code.
"""

import json
import re
import shlex
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tools import ROOT, configuration, run_main, run_python
from torch.nn.parallel import DistributedDataParallel

from model import GPT, SIZES, GPTConfig, NextTokenLoss
from support import plan
from support.plan import (
    activation_bytes,
    all_reduce_seconds,
    checkpoint_bytes,
    checkpoint_interval,
    flops_per_token,
    memory,
    parameters,
)
from support.runtime import Runtime, start
from train_gpt2 import RECIPES, build_optimizer, main

DOC = (ROOT / "docs" / "scaling.md").read_text()


@pytest.mark.parametrize("config", [*SIZES.values(), GPTConfig(3, 2, 34, 77, 257)])
def test_parameters_are_those_of_the_network(config):
    with torch.device("meta"):
        assert parameters(config) == GPT(config).num_parameters()


def kept_bytes(config: GPTConfig, B: int, rt: Runtime) -> int:
    """Bytes of the distinct tensors that autograd saves in one forward pass, parameters aside."""
    loss_fn = NextTokenLoss(GPT(config))
    parameter_addresses = {p.untyped_storage().data_ptr() for p in loss_fn.parameters()}
    sizes = {}
    alive = []  # so that no address is used twice

    def pack(tensor):
        alive.append(tensor)
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    idx = torch.randint(config.vocab_size, (B, config.block_size))
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, rt.autocast(), rt.attention(config.block_size):
        loss_fn(idx, idx)
    return sum(size for address, size in sizes.items() if address not in parameter_addresses)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    "T,dtype,width,fused",
    [(576, "bfloat16", 2, True), (128, "bfloat16", 2, False), (128, "float32", 4, True)],
)
def test_activations_are_what_autograd_keeps(T, dtype, width, fused, dropout):
    config = GPTConfig(2, 4, 64, T, 300, dropout)
    rt = start("cpu", dtype)
    measured = (kept_bytes(config, 4, rt) - kept_bytes(config, 2, rt)) / (2 * T)
    assert activation_bytes(config, width, fused, "cpu") == pytest.approx(measured, rel=0.01)


# B decides into how many chunks the loss cuts its rows.
@pytest.mark.parametrize(
    "dtype,width,B",
    [(torch.bfloat16, 2, 1), (torch.bfloat16, 2, 3), (torch.float32, 4, 3)],
)
def test_memory_is_the_peak_that_torch_tracks(dtype, width, B):
    """torch's MemTracker watches every allocation of two updates, on tensors without data."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    config = GPTConfig(2, 4, 512, 1024, 4096)
    with FakeTensorMode():
        loss_fn = NextTokenLoss(GPT(config))
        optimizer = build_optimizer(loss_fn.model, RECIPES["gpt2"])
        idx = torch.zeros(B, 1024, dtype=torch.long)
        tracker = MemTracker()
        tracker.track_external(loss_fn, optimizer)
        with tracker:
            for _update in range(2):  # the moments exist from the first one on
                for _micro_batch in range(2):
                    with torch.autocast("cpu", dtype, enabled=width == 2):
                        loss = loss_fn(idx, idx)
                    loss.backward()
                    tracker.reset_mod_stats()
                optimizer.step()
                optimizer.zero_grad()
        peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert sum(memory(config, B, width, "cpu").values()) == pytest.approx(peak, rel=0.03)


def test_a_ring_sends_what_the_formula_says():
    """A ring played through: W ranks with W chunks each, of which each passes one a turn.

    In the first W - 1 turns what arrives is added, in the others it replaces what was there.
    """
    W = 5
    size = 4 * parameters(SIZES["gpt2"])
    summands = []  # summands[rank][chunk]: whose gradients are in that rank's chunk
    for rank in range(W):
        summands.append([{rank} for _ in range(W)])
    sent = 0.0  # by each rank
    for turn in range(2 * (W - 1)):
        messages = []
        for rank in range(W):
            chunk = (rank - turn) % W
            messages.append((chunk, summands[rank][chunk]))
        for rank, (chunk, ranks) in enumerate(messages):
            summands[(rank + 1) % W][chunk] = summands[(rank + 1) % W][chunk] | ranks
        sent += size / W
    for chunks in summands:
        assert all(ranks == set(range(W)) for ranks in chunks)
    assert all_reduce_seconds(SIZES["gpt2"], W, bandwidth=1e9) == pytest.approx(sent / 1e9)
    assert all_reduce_seconds(SIZES["gpt2"], 1, bandwidth=1e9) == 0


def test_the_checkpoint_interval_loses_the_least():
    write, mtbf = 20.0, 5000.0

    def lost(interval: float) -> float:
        """Part of the time: writing, and half an interval of work at each failure."""
        return write / interval + interval / 2 / mtbf

    best = checkpoint_interval(write, mtbf)
    assert lost(best) < min(lost(0.9 * best), lost(1.1 * best))


def test_a_checkpoint_has_the_planned_size(tmp_path):
    """Weights as they are saved, and AdamW's moments as tensors."""
    config = GPTConfig(2, 2, 64, 64, 257)
    model = GPT(config)
    optimizer = build_optimizer(model, RECIPES["gpt2"])
    model(torch.zeros(1, 8, dtype=torch.long)).sum().backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    moments = {}
    for number, state in optimizer.state_dict()["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            moments[f"{name}.{number}"] = state[name]
    save_file(moments, tmp_path / "optimizer.safetensors")
    written = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert written == pytest.approx(checkpoint_bytes(model.num_parameters()), rel=0.02)


SMALL = GPTConfig(2, 2, 32, 32, 257)


def bytes_outside_buckets(set_to_none: bool) -> int:
    """Bytes of gradients outside DDP's buckets while two micro-batches accumulate."""
    model = GPT(SMALL)
    ddp = DistributedDataParallel(NextTokenLoss(model), gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters())
    idx = torch.zeros(1, 32, dtype=torch.long)
    for _ in range(3):  # DDP arranges its buckets anew after the first backward
        with ddp.no_sync():
            ddp(idx, idx).backward()
        outside = sum(p.grad.nbytes for p in model.parameters() if not shares_storage(p.grad))
        ddp(idx, idx).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    return outside


def shares_storage(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().nbytes() > tensor.nbytes


@pytest.mark.parametrize("set_to_none,bytes_a_parameter", [(False, 0), (True, 4)])
def test_gradients_stay_in_ddps_buckets_only_if_they_are_zeroed(
    set_to_none, bytes_a_parameter, tmp_path
):
    """What `memory` says of DDP, with one rank: its buckets do not depend on their number."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        # In a function of its own: a DDP that outlives its process group may end in a deadlock. Its
        # destructor holds Python's lock, and waits for a thread of gloo that wants the same lock.
        outside = bytes_outside_buckets(set_to_none)
    finally:
        torch.distributed.destroy_process_group()
    assert outside == bytes_a_parameter * GPT(SMALL).num_parameters()


def test_a_training_process_holds_what_the_plan_says_of_libraries():
    """Resident memory after a step of a model whose tensors weigh nothing."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("reads /proc, which only Linux has")
    code = """
import torch, train_gpt2
from matplotlib.figure import Figure
from model import GPT, GPTConfig, NextTokenLoss
loss_fn = NextTokenLoss(GPT(GPTConfig(1, 1, 8, 8, 257)))
idx = torch.zeros(1, 8, dtype=torch.long)
loss_fn(idx, idx).backward()
torch.optim.AdamW(loss_fn.parameters(), fused=True).step()
import os
print(int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
"""
    done = run_python("-c", code)
    resident = int(done.stdout)
    assert resident == pytest.approx(plan.LIBRARY_BYTES, rel=0.3)


TINY_RUN = (
    "--recipe=first-run",
    "--n-embd=256",
    "--seq-len=256",
    "--max-steps=600",
    "--total-batch-tokens=8192",
    "--micro-batch=8",
)


# In bfloat16 a CPU attends without the fused kernel at this context.
@pytest.mark.parametrize("dtype,width,fused", [("float32", 4, True), ("bfloat16", 2, False)])
def test_dry_run_prints_the_plan_and_leaves_no_trace(
    dtype, width, fused, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "matmul_speed", lambda rt: 1e12)
    code = run_main(main, "--dry-run", "--device", "cpu", "--dtype", dtype, *TINY_RUN)
    out = capsys.readouterr().out
    config = GPTConfig(4, 4, 256, 256, 257)
    seconds = 600 * 8192 * flops_per_token(config) / 0.4e12
    bytes_in_all = sum(memory(config, 8, width, "cpu", fused).values()) + plan.LIBRARY_BYTES
    assert code == 0
    for words in (
        f"{parameters(config):,} parameters",
        "600 steps of 8,192 tokens = 4,915,200 tokens",
        "4 micro-batches of 8 × 256 tokens on 1 rank",
        f"memory         about {plan.amount(bytes_in_all)} on each rank",
        f"Python and torch themselves {plan.amount(plan.LIBRARY_BYTES)}",
        f"time           {plan.duration(seconds)} at",
        "40% (assumed) of each rank's 1 TFLOP/s (of matrix products timed here, as if no other "
        "work shared it)",
        f"checkpoints    {plan.amount(checkpoint_bytes(parameters(config)))}",
    ):
        assert words in out
    assert not list(tmp_path.iterdir())


def test_a_known_gpu_is_planned_from_its_datasheet(monkeypatch):
    monkeypatch.setattr(plan, "peak_flops", lambda device, dtype: 989e12)
    rt = Runtime(0, 8, device=torch.device("cuda"), dtype=torch.bfloat16)
    line = plan.plan_time(SIZES["gpt2"], rt, 19073, 524288)
    # 8 × 0.4 × 989e12 / 854e6 = 3.70M tokens/s
    assert "45 minutes at 3,70" in line
    assert "989 TFLOP/s (in its datasheet)" in line


def planned(capsys, *flags) -> tuple[int, str, str]:
    code = run_main(plan.main, *flags)
    return code, *capsys.readouterr()


def test_another_machine_is_planned_without_being_here(capsys):
    _, out, _ = planned(capsys, "--gpus", 8, "--gpu", "h100")
    assert "4 micro-batches of 16 × 1024 tokens on each of 8 ranks" in out
    assert "45 minutes at 3,70" in out
    assert "989 TFLOP/s (in the datasheet of H100)" in out


def test_without_flags_it_is_the_recipe_gpt2(capsys):
    recipe = RECIPES["gpt2"]
    values = asdict(plan.PlanConfig())
    assert {name: getattr(recipe, name) for name in plan.FROM_RUN} == {
        name: values[name] for name in plan.FROM_RUN
    }


def test_a_run_is_planned_for_another_machine(capsys, tmp_path):
    saved = asdict(RECIPES["first-run"]) | {"dropout": 0.1}
    (tmp_path / "train.json").write_text(json.dumps(saved))
    _, out, _ = planned(capsys, "--run", tmp_path, "--gpus", 2, "--max-steps", 7)
    assert "4 layers, 4 heads, 128 channels, context 128, vocabulary 257" in out
    assert "7 steps of 1,024 tokens" in out
    assert "1 micro-batch of 4 × 128 tokens on each of 2 ranks" in out
    parts = memory(GPTConfig(4, 4, 128, 128, 257, 0.1), 4)
    assert plan.amount(parts["activations"]) in out


def test_a_step_too_short_for_an_estimate_gets_none(capsys):
    _, out, _ = planned(capsys, "--gpus", 8, "--n-embd", 96, "--n-layer", 2)
    assert "time           no estimate: a step is 5.4 ms of arithmetic" in out
    assert "tokens/s" not in out and "checkpoints    " in out


def test_memory_and_checkpoints_are_those_of_an_edited_network():
    config = SIZES["gpt2"]
    rt = Runtime(device=torch.device("cuda"), dtype=torch.bfloat16)
    lines = plan.plan(config, 2 * parameters(config), rt, 10, 8192, 8)
    assert "weights, gradients and moments 4.0 GB" in lines[-1]
    assert plan.checkpoint_line(2 * parameters(config)) == "checkpoints    3.0 GB each"


def test_a_micro_batch_is_no_larger_than_a_ranks_part_of_the_batch(capsys):
    _, out, _ = planned(capsys, "--gpus", 64)
    assert "1 micro-batch of 8 × 1024 tokens on each of 64 ranks" in out


@pytest.mark.parametrize(
    "flags",
    [("--gpu", "abacus"), ("--gpus", 7), ("--gpus", 0), ("--run", "nowhere"), ("--n-layer", -1)],
)
def test_what_cannot_be_planned_is_refused(flags, capsys):
    code, _, err = planned(capsys, *flags)
    assert code == 2
    assert str(flags[1]) in err.splitlines()[-1]


@pytest.mark.parametrize(
    "seconds,words",
    [
        (0.5, "0.5 seconds"),
        (119, "119 seconds"),
        (120, "2.0 minutes"),
        (7200, "2.0 hours"),
        (864000, "10 days"),
    ],
)
def test_durations_are_in_the_unit_a_person_would_use(seconds, words):
    assert plan.duration(seconds) == words


def test_matmul_speed_counts_flops(monkeypatch):
    clock = iter(i * 0.25 for i in range(100))
    monkeypatch.setattr(plan.time, "perf_counter", lambda: next(clock))
    assert plan.matmul_speed(start("cpu", "float32")) == 2 * 512**3 / 0.25


def test_scaling_holds_the_tables_that_are_computed():
    printed = run_python("benchmarks/scaling_tables.py").stdout
    tables = printed.strip().split("\n\n")
    assert len(tables) == 7
    for table in tables:
        assert table in DOC


def test_commands_in_scaling_are_understood(tmp_path, monkeypatch):
    """bash reads each block, torchrun's parser each torchrun line, and the trainer's its end."""
    from torch.distributed.run import get_args_parser

    monkeypatch.chdir(tmp_path)
    commands = []
    for block in re.findall(r"```bash\n(.*?)```", DOC, re.S):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)
        for line in block.replace("\\\n", " ").splitlines():
            if "torchrun " in line:
                line = line.replace("bash -c '", "").rstrip("'")  # each node fills in its name
                commands.append(shlex.split(line))
    assert len(commands) == 2
    for command in commands:
        after_torchrun = command[command.index("torchrun") + 1 :]
        args = get_args_parser().parse_args(after_torchrun)
        config = configuration(*args.training_script_args)
        assert args.training_script == "train_gpt2.py"
        assert config.resume
        assert config.out == f"runs/{config.recipe}"


def test_datatrove_lines_in_scaling_build_a_pipeline(tmp_path, monkeypatch):
    executor = pytest.importorskip("datatrove.executor")
    monkeypatch.chdir(tmp_path)
    started = []
    monkeypatch.setattr(executor.SlurmPipelineExecutor, "run", lambda self: started.append(self))
    (code,) = re.findall(r"```python\n(from datatrove.*?)```", DOC, re.S)
    exec(code, {"__name__": "__main__"})
    assert len(started) == 1 and len(started[0].pipeline) == 2
