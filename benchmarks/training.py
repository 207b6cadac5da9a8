"""Subjects `train` and `growth`: updates of the training step."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from harness import Case, Ready, Setting, random_tokens

from model import GPT, SIZES, GPTConfig, NextTokenLoss
from support import runtime
from support.plan import flops_per_token
from support.shards import write_manifest, write_shard
from tokens import open_data, training_windows

LEARNING_RATE = 1e-5  # small: random tokens are learned by heart, and nothing must overflow


class Work(NamedTuple):
    """A round of training, the same for every contender."""

    setting: Setting
    folder: str  # the weights to start from
    B: int  # sequences per update
    T: int  # tokens per sequence
    steps: int  # updates per round


Step = Callable[[], torch.Tensor]  # makes an update; returns the loss, which nobody has waited for


def first_loss_and_step(exact: float, step: Step, steps: int) -> Ready:
    """The output that is compared: the loss in float32, and that of the first step as timed."""
    return Ready(np.array([exact, float(step())]), lambda: [step() for _ in range(steps)])


def train_ours(work: Work, compiled: bool, micro_batch: int) -> Ready:
    exact, step = our_step(work, compiled, micro_batch)
    return first_loss_and_step(exact, step, work.steps)


def our_step(work: Work, compiled: bool, micro_batch: int) -> tuple[float, Step]:
    """The first loss in float32 on the CPU, and the step that is timed."""
    from train_gpt2 import TrainConfig, build_optimizer, make_loss_function, train_step

    rt = work.setting.our_runtime()
    model = GPT.from_pretrained(work.folder).train()
    windows = random_tokens(work.B, work.T + 1)
    config = TrainConfig(
        seq_len=work.T,
        micro_batch=micro_batch,
        total_batch_tokens=work.B * work.T,
        learning_rate=LEARNING_RATE,
        min_lr=0.0,
        compile=compiled,
    )
    with torch.no_grad():
        exact = NextTokenLoss(model)(windows[:4, :-1], windows[:4, 1:]).item()  # float32, on a CPU
    optimizer = build_optimizer(model.to(rt.device), config)
    loss_fn = make_loss_function(model, config, rt)
    if work.setting.device == "cuda":
        windows = windows.pin_memory()

    def step() -> torch.Tensor:
        return train_step(loss_fn, optimizer, windows, config, rt)["loss"]

    return exact, step


def train_transformers(work: Work, compiled: bool, micro_batch: int, keep_memory: bool) -> Ready:
    """The same step as users of transformers write it, as fast as it gets with equal results.

    Fused AdamW, SDPA, the loss inside the compiled graph, and nothing else returned from it.
    """
    from transformers import GPT2LMHeadModel

    rt = work.setting.peer_runtime(keep_memory)
    windows = random_tokens(work.B, work.T + 1)
    model = GPT2LMHeadModel.from_pretrained(work.folder, dtype=torch.float32).train()

    def loss_fn(idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return model(input_ids=idx, labels=targets, shift_labels=targets, use_cache=False).loss

    with torch.no_grad():
        exact = loss_fn(windows[:4, :-1], windows[:4, 1:].contiguous()).item()
    optimizer = torch.optim.AdamW(
        model.to(rt.device).parameters(),
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        fused=True,
    )
    if compiled:
        loss_fn = torch.compile(loss_fn, dynamic=False)
    if work.setting.device == "cuda":
        windows = windows.pin_memory()

    def step() -> torch.Tensor:
        total = torch.zeros((), device=rt.device)
        for part in windows.split(micro_batch):
            part = part.to(rt.device, non_blocking=True)
            with rt.autocast():
                loss = loss_fn(part[:, :-1], part[:, 1:].contiguous()) * (len(part) / work.B)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return first_loss_and_step(exact, step, work.steps)


# ---------------------------------------------------------------------------------------- train


def train(setting: Setting) -> Iterator[Case]:
    """Updates of GPT-2 124M, and on a CPU of a small model too."""
    if setting.device == "cuda":
        yield from train_on_cuda(setting, "124M", SIZES["gpt2"], B=64, T=1024, steps=10)
        return
    small = GPTConfig(n_layer=6, n_head=6, n_embd=384, block_size=256)
    yield from train_on_cpu(setting, "124M", SIZES["gpt2"], B=4, T=512)
    yield from train_on_cpu(setting, "6 layers × 384", small, B=16, T=256)


def train_on_cuda(
    setting: Setting, name: str, config: GPTConfig, B: int, T: int, steps: int
) -> Iterator[Case]:
    work = make_work(setting, config, B, T, steps)
    few = min(work.B, 16)  # eager transformers at 64 sequences wants more than 100 GB
    contenders = {
        "PyGPT2, compiled": (train_ours, work, True, work.B),
        "transformers, compiled": (train_transformers, work, True, work.B, True),
        f"transformers, eager, micro-batches of {few}": (
            train_transformers,
            work,
            False,
            few,
            True,
        ),
    }
    yield train_case(name, config, work, contenders)


def train_on_cpu(setting: Setting, name: str, config: GPTConfig, B: int, T: int) -> Iterator[Case]:
    """Two tables, because idle contenders keep their memory: all would want 25 GB at 124M."""
    work = make_work(setting, config, B, T, steps=1)
    ours = (train_ours, work, False, work.B)
    for keep_memory, how in (
        (False, "memory as by default"),
        (True, "memory kept as by ours"),
    ):
        contenders = {"PyGPT2": ours}
        if not keep_memory:
            contenders["PyGPT2, compiled"] = (train_ours, work, True, work.B)
        for kind, compiled in (("compiled", True), ("eager", False)):
            peer = (train_transformers, work, compiled, work.B, keep_memory)
            contenders[f"transformers, {kind}, {how}"] = peer
        yield train_case(name, config, work, contenders)


def make_work(setting: Setting, config: GPTConfig, B: int, T: int, steps: int) -> Work:
    B = setting.size(B, 4)
    T = setting.size(T, 32)
    return Work(setting, setting.weights(config), B, T, steps)


def train_case(name: str, config: GPTConfig, work: Work, contenders: dict[str, tuple]) -> Case:
    setting = work.setting
    peak = runtime.peak_flops(torch.device(setting.device), getattr(torch, setting.dtype))
    flops = flops_per_token(GPTConfig(config.n_layer, config.n_head, config.n_embd, work.T))

    def mfu(rows: dict[str, dict]) -> str:
        if not peak:
            return ""
        parts = [f"{name} {row['rate'] * flops / peak:.1%}" for name, row in rows.items()]
        return f"MFU: {', '.join(parts)}"

    return Case(
        f"train {name}, {work.B}×{work.T}, {setting.dtype}",
        "tok",
        work.steps * work.B * work.T,
        contenders,
        tolerance=np.array([1e-5, 1e-3 if setting.dtype == "bfloat16" else 1e-5]),
        remark=mfu,
    )


# ---------------------------------------------------------------------------------------- growth


def open_shards(folder: Path, shards: int, windows: int) -> Ready:
    """Open this many shards of 10,000 tokens, as a run does, and read windows all over them."""
    folder.mkdir()
    entries = []
    for i in range(shards):
        split = "train" if i else "val"
        tokens = np.full(10_000, i % 50257, np.uint16)
        entries.append(write_shard(folder / f"corpus_{split}_{i:06d}.bin", tokens))
    write_manifest(folder, {"encoding": "gpt2", "shards": entries})

    def work() -> np.ndarray:
        data = open_data(folder).train
        indices = training_windows(0, windows, data.num_windows(1024), seed=0)
        return data.windows(indices, 1024)

    work()
    return Ready(np.zeros(1), work)


def growth(setting: Setting) -> Iterator[Case]:
    """Time and memory of our code alone, as one thing grows."""
    T = setting.size(256, 32)
    B = setting.size(16, 4)
    yield growth_with_micro_batch(setting, B, T)
    yield growth_with_context(setting, B * T)
    yield growth_with_model(setting, T)
    yield growth_with_shards(setting)


def ours(setting: Setting, config: GPTConfig, B: int, T: int, micro_batch: int) -> tuple:
    work = Work(setting, setting.weights(config), B, T, steps=1)
    return train_ours, work, False, micro_batch


def middle_size(setting: Setting) -> GPTConfig:
    return GPTConfig(n_layer=6, n_head=6, n_embd=384, block_size=setting.size(2048, 256))


def growth_with_micro_batch(setting: Setting, B: int, T: int) -> Case:
    contenders = {}
    for micro_batch in (1, 2, 4, 8, 16):
        if micro_batch <= B:
            contender = ours(setting, middle_size(setting), B, T, micro_batch)
            contenders[f"micro-batch {micro_batch}"] = contender
    return Case(
        f"growth with the micro-batch: 6 layers × 384, {B}×{T} tokens a step, {setting.dtype}",
        "tok",
        B * T,
        contenders,
        tolerance=np.array([1e-5, 1e-2]),
    )


def growth_with_context(setting: Setting, tokens: int) -> Case:
    """As many tokens a step at every context, in fewer and longer sequences."""
    contenders = {}
    shortest = setting.size(64, 4)
    for doublings in range(6):
        T = shortest * 2**doublings
        B = tokens // T
        contenders[f"T = {T}"] = ours(setting, middle_size(setting), B, T, B)
    return Case(
        f"growth with the context: 6 layers × 384, {tokens} tokens a step, {setting.dtype}",
        "tok",
        tokens,
        contenders,
        tolerance=np.inf,
    )


def growth_with_model(setting: Setting, T: int) -> Case:
    configs = {
        "4 × 128": GPTConfig(4, 4, 128, T),
        "6 × 384": GPTConfig(6, 6, 384, T),
        "12 × 768": GPTConfig(12, 12, 768, T),
        "24 × 1024": GPTConfig(24, 16, 1024, T),
    }

    def speeds(rows: dict[str, dict]) -> str:
        parts = []
        for name, row in rows.items():
            parts.append(f"{name} {row['rate'] * flops_per_token(configs[name]) / 1e9:,.0f}")
        return f"GFLOP/s: {', '.join(parts)}"

    return Case(
        f"growth with the model: 4×{T} tokens a step, {setting.dtype}",
        "tok",
        4 * T,
        {name: ours(setting, config, 4, T, 4) for name, config in configs.items()},
        tolerance=np.inf,
        remark=speeds,
    )


def growth_with_shards(setting: Setting) -> Case:
    contenders = {}
    for shards in (10, 100, 1000, setting.size(10_000, 2000)):
        folder = setting.scratch / f"shards{shards}"
        contenders[f"{shards:,} shards"] = (open_shards, folder, shards, 512)
    return Case(
        "growth with the shards: open them all, read 512 windows of 1,024 tokens",
        "openings",
        1,
        contenders,
    )
