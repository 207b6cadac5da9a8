"""What a run costs before it starts: parameters, FLOPs, memory, communication, time, checkpoints.

    python train_gpt2.py --dry-run     # this run, on this machine
    python plan.py                     # the tables of docs/scaling.md

Everything here is arithmetic on a GPTConfig; the tests check it against torch's own counters. Units: bytes, seconds,
FLOPs; GB is 10^9 bytes.

Letters: B sequences per micro-batch, T tokens each, W ranks, C channels, H heads, L layers, V vocabulary.
"""

import argparse
import math
import time

import torch

from cli import run_script
from model import LOSS_ROWS, SIZES, GPTConfig
from runtime import PEAK_FLOPS, Runtime, peak_flops

ASSUMED_MFU = 0.4  # share of a device's matrix throughput that training reaches; docs/scaling.md compares it with published runs


def parameters(c: GPTConfig) -> int:
    """Embeddings, then per layer four matrices (12 C²), their biases (9 C) and two norms (4 C), then the last norm."""
    return (
        (c.vocab_size + c.block_size) * c.n_embd
        + c.n_layer * (12 * c.n_embd**2 + 13 * c.n_embd)
        + 2 * c.n_embd
    )


def flops_per_token(c: GPTConfig) -> int:
    """Training FLOPs per token: 6 per parameter of a matrix product, the head's included, and the attention products
    without causal discount (PaLM, appendix B)."""
    matmul = 12 * c.n_layer * c.n_embd**2 + c.vocab_size * c.n_embd
    return 6 * matmul + 12 * c.n_layer * c.n_embd * c.block_size


# ---------------------------------------------------------------------------------------------------- memory


def activation_bytes(c: GPTConfig, width: int = 2, fused: bool = True) -> int:
    """What the forward pass keeps for the backward, per token, without dropout; torch.compile keeps less.

    width: bytes per element of matrix products, 2 under bfloat16 autocast. fused: attention without its T × T matrix.
    """
    C, H = c.n_embd, c.n_head
    residual = 2 * 4 * C  # the inputs of both norms; the residual stream stays float32
    # Inputs of the four linears: C, C, C (attention's output, which attention keeps too) and 4 C; q, k, v: 3 C; GELU's input: 4 C.
    products = 14 * C * width
    attention = (
        4 * H if fused else width * H * c.block_size
    )  # a log-sum-exp, or a row of the matrix, per head
    norms = 2 * 8  # mean and 1/std of both
    last = 4 * C + 8 + width * C  # the last norm, and the gradient that the loss hands back
    return c.n_layer * (residual + products + attention + norms) + last + 8  # 8: the token


def memory(
    c: GPTConfig, micro_batch: int, width: int = 2, device: str = "cuda", fused: bool = True
) -> dict[str, int]:
    """Peak bytes of training on one rank, by part; DDP adds nothing, its buckets are the gradients."""
    tokens = micro_batch * c.block_size
    # Bytes per logit of a chunk: itself and what log_softmax makes of it.
    logits = c.vocab_size * min(tokens, LOSS_ROWS[device]) * (10 if width == 2 else 8)
    return {
        "weights, gradients and moments": 16 * parameters(c),  # 4 × float32
        "copies in bfloat16": 2 * 12 * c.n_layer * c.n_embd**2
        if width == 2
        else 0,  # which autocast makes of the linears
        "activations": tokens * activation_bytes(c, width, fused),
        "loss": (width + 4) * c.vocab_size * c.n_embd + logits,  # with the head's copy and gradient
    }


# ---------------------------------------------------------------------------------------------------- time


def step_seconds(c: GPTConfig, batch_tokens: int, world_size: int, speed: float) -> float:
    """Arithmetic of one update; speed: FLOP/s that each rank sustains."""
    return batch_tokens * flops_per_token(c) / (world_size * speed)


def all_reduce_seconds(c: GPTConfig, world_size: int, bandwidth: float) -> float:
    """A ring all-reduce of the float32 gradients: each rank sends 2 (W - 1) / W of them over the slowest link
    (bandwidth, bytes/s: the bus bandwidth of nccl-tests)."""
    return 2 * (world_size - 1) / world_size * 4 * parameters(c) / bandwidth


def checkpoint_bytes(c: GPTConfig) -> int:
    """Weights and AdamW's two moments, float32."""
    return 12 * parameters(c)


def checkpoint_interval(write_seconds: float, mtbf: float) -> float:
    """Seconds between checkpoints that lose the least time (Young 1974, Daly 2006); mtbf: mean seconds between failures of the job."""
    return math.sqrt(2 * write_seconds * mtbf)


def matmul_speed(rt: Runtime, seconds: float = 0.5) -> float:
    """FLOP/s of a square matrix product on this device, now: the best of many, to see past what else it is doing."""
    size = (
        512 if rt.device.type == "cpu" else 4096
    )  # large enough to be efficient, small enough to be repeated
    a = torch.randn(size, size, device=rt.device, dtype=rt.dtype)
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        a @ a
        rt.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


# ---------------------------------------------------------------------------------------------------- one run


def plan(c: GPTConfig, rt: Runtime, steps: int, batch_tokens: int, micro_batch: int) -> list[str]:
    """The run in a few lines, before it starts."""
    tokens, width = steps * batch_tokens, 2 if rt.dtype == torch.bfloat16 else 4
    micro_steps = batch_tokens // (micro_batch * c.block_size * rt.world_size)
    fused = (
        rt.device.type != "cpu" or rt.dtype != torch.bfloat16 or c.block_size > 512
    )  # see Runtime.attention
    parts = memory(c, micro_batch, width, rt.device.type, fused)
    return [
        f"model          {parameters(c):,} parameters: {c.n_layer} layers, {c.n_head} heads, {c.n_embd} channels, "
        f"context {c.block_size}, vocabulary {c.vocab_size:,}",
        f"training       {steps:,} steps of {batch_tokens:,} tokens = {tokens:,} tokens, {tokens * flops_per_token(c):.2e} FLOPs",
        f"each step      {micro_steps} micro-batch{'es' * (micro_steps > 1)} of {micro_batch} × {c.block_size} tokens on each rank",
        f"memory         about {amount(sum(parts.values()))} on each rank: "
        + ", ".join(f"{name} {amount(size)}" for name, size in parts.items() if size),
    ]


def plan_time(c: GPTConfig, rt: Runtime, steps: int, batch_tokens: int) -> list[str]:
    """How long the run would take, with what that assumes: the datasheet's peak, else matrix products timed here."""
    peak = peak_flops(rt.device)
    flops = peak or matmul_speed(rt)
    seconds = steps * step_seconds(c, batch_tokens, rt.world_size, ASSUMED_MFU * flops)
    source = "in its datasheet" if peak else "of matrix products timed here"
    return [
        f"time           {duration(seconds)} at {steps * batch_tokens / seconds:,.0f} tokens/s, if training reaches {ASSUMED_MFU:.0%} (assumed) "
        f"of each rank's {flops / 1e12:.3g} TFLOP/s ({source}); evaluations come on top",
        f"checkpoints    {amount(checkpoint_bytes(c))} each",
    ]


def amount(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def duration(seconds: float) -> str:
    """Two digits of it, in the unit a person would use."""
    unit, size = next(
        (u, s)
        for u, s in (("days", 86400), ("hours", 3600), ("minutes", 60), ("seconds", 1))
        if seconds >= 2 * s or s == 1
    )
    value = seconds / size
    return f"{value:.1f} {unit}" if value < 10 else f"{value:,.0f} {unit}"


# ---------------------------------------------------------------------------------------------------- the tables of docs/scaling.md

BATCH = {
    "gpt2": 2**19,
    "gpt2-medium": 2**19,
    "gpt2-large": 2**19,
    "gpt2-xl": 2**20,
}  # tokens per update, as in the recipes
SPEED = ASSUMED_MFU * PEAK_FLOPS["H100"]
# Bytes/s each way. One GPU's NVLink; a node's network cards together, since a ring over nodes enters and leaves each node once.
LINKS = {
    "NVLink, 450 GB/s": 450e9,
    "8 × 400 Gb/s a node": 400e9,
    "1 × 400 Gb/s": 50e9,
    "1 × 100 Gb/s": 12.5e9,
}
FAILURES = {"6 hours": 6 * 3600, "1 day": 86400, "33 days": 33 * 86400}


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown; the first column is left-aligned."""
    return "\n".join(
        "| " + " | ".join(row) + " |" for row in [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    )


def tables() -> list[str]:
    """Everything that docs/scaling.md shows in figures, for H100s at ASSUMED_MFU."""
    sizes = table(
        [
            "size",
            "parameters",
            "MFLOP per token",
            "weights, gradients, moments",
            "copies in bfloat16",
            "activations per sequence",
            "checkpoint",
        ],
        [
            [
                name,
                f"{parameters(c):,}",
                f"{flops_per_token(c) / 1e6:,.0f}",
                f"{16 * parameters(c) / 1e9:.1f} GB",
                f"{memory(c, 1)['copies in bfloat16'] / 1e9:.1f} GB",
                f"{c.block_size * activation_bytes(c) / 1e9:.2f} GB",
                f"{checkpoint_bytes(c) / 1e9:.1f} GB",
            ]
            for name, c in SIZES.items()
        ],
    )

    micro_batches = (1, 4, 8, 16, 32, 64)
    totals = table(
        ["GB per GPU at micro-batch", *map(str, micro_batches)],
        [
            [name, *(f"{sum(memory(c, b).values()) / 1e9:.0f}" for b in micro_batches)]
            for name, c in SIZES.items()
        ],
    )

    rows = []
    for name, c in SIZES.items():
        for world_size in (8, 64):
            compute = step_seconds(c, BATCH[name], world_size, SPEED)
            waits = [all_reduce_seconds(c, world_size, b) for b in LINKS.values()]
            cells = [f"{1000 * w:.0f} ms ({w / compute:.0%})" for w in waits]
            cells = (
                cells[:1] + ["–"] * 3 if world_size == 8 else ["–"] + cells[1:]
            )  # 8 GPUs are one node
            rows.append(
                [
                    f"{name}, {world_size} GPUs",
                    f"{BATCH[name] // world_size:,}",
                    f"{1000 * compute:,.0f} ms",
                    *cells,
                ]
            )
    communication = table(["", "tokens per GPU and step", "arithmetic", *LINKS], rows)

    rows = []
    for name, c in SIZES.items():
        times = []
        for world_size, link in ((1, math.inf), (8, 450e9), (64, 400e9)):
            step = step_seconds(c, BATCH[name], world_size, SPEED) + all_reduce_seconds(
                c, world_size, link
            )
            times.append(10e9 / BATCH[name] * step)
        rate = SPEED / flops_per_token(c)
        rows.append(
            [name, f"{rate / 1000:,.0f}k", f"{2 * 64 * rate / 1e6:.0f} MB/s", *map(duration, times)]
        )
    times = table(
        ["10B tokens", "tokens/s per GPU", "tokens read by 64 GPUs", "1 GPU", "8 GPUs", "64 GPUs"],
        rows,
    )

    rows = []
    for name, c in SIZES.items():
        write = checkpoint_bytes(c) / 1e9
        rows.append(
            [
                name,
                f"{write:.1f} s",
                *(duration(checkpoint_interval(write, mtbf)) for mtbf in FAILURES.values()),
            ]
        )
    intervals = table(["a failure every", "write at 1 GB/s", *FAILURES], rows)
    return [sizes, totals, communication, times, intervals]


def main() -> None:
    argparse.ArgumentParser(description="Print the tables of docs/scaling.md.").parse_args()
    print("\n\n".join(tables()))


if __name__ == "__main__":
    run_script(main)
