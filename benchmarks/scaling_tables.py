"""Print the tables of docs/scaling.md.

    python benchmarks/scaling_tables.py

They are computed, for H100s at plan.ASSUMED_MFU of their datasheet's peak, with the batches of the
recipes. tests/test_plan.py holds the page to this output.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model import SIZES, GPTConfig
from support.plan import (
    ASSUMED_MFU,
    activation_bytes,
    all_reduce_seconds,
    checkpoint_bytes,
    checkpoint_interval,
    duration,
    flops_per_token,
    memory,
    parameters,
    step_seconds,
)
from support.runtime import PEAK_FLOPS
from train_gpt2 import RECIPES

SPEED = ASSUMED_MFU * PEAK_FLOPS["H100"]  # FLOP/s of each GPU

# Bytes/s each way. The first is one GPU's. The others are a node's network cards together, because
# a ring over nodes enters and leaves each node once.
LINKS = {
    "NVLink, 450 GB/s": 450e9,
    "8 × 400 Gb/s a node": 400e9,
    "1 × 400 Gb/s": 50e9,
    "1 × 100 Gb/s": 12.5e9,
}
GPUS_A_NODE = 8

MICRO_BATCHES = (1, 4, 8, 16, 32, 64)
TOKENS = 10e9  # of a run
WRITE_SPEED = 1e9  # bytes/s of a checkpoint
MANY_GPUS = 1024
LARGE_BATCHES = {"1M": 2**20, "2M": 2**21, "4M": 2**22, "16M": 2**24}  # tokens of a step

CORPORA = {"1T": 1e12, "15T": 15e12}  # tokens
# Tokens of English by one core; docs/scaling.md says how it was measured.
TOKENISED_A_SECOND = 0.4e6
TOKENS_A_TASK = 4e9  # under three hours of a core
TOKENS_A_FILE = 1e9
CORES = 1000
SECONDS_BETWEEN_FAILURES = {"6 hours": 6 * 3600, "1 day": 86400, "33 days": 33 * 86400}


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown; the first column is left-aligned, the others right."""
    alignment = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, alignment, *rows])


def sizes_table() -> str:
    head = [
        "size",
        "parameters",
        "MFLOP per token",
        "weights, gradients, moments",
        "copies in bfloat16",
        "activations per sequence",
        "checkpoint",
    ]
    rows = []
    for name, c in SIZES.items():
        parts = memory(c, micro_batch=1)
        row = [
            name,
            f"{parameters(c):,}",
            f"{flops_per_token(c) / 1e6:,.0f}",
            f"{parts['weights, gradients and moments'] / 1e9:.1f} GB",
            f"{parts['copies in bfloat16'] / 1e9:.1f} GB",
            f"{c.block_size * activation_bytes(c) / 1e9:.2f} GB",
            f"{checkpoint_bytes(parameters(c)) / 1e9:.1f} GB",
        ]
        rows.append(row)
    return table(head, rows)


def memory_table() -> str:
    rows = []
    for name, c in SIZES.items():
        row = [name]
        for micro_batch in MICRO_BATCHES:
            row.append(f"{sum(memory(c, micro_batch).values()) / 1e9:.0f}")
        rows.append(row)
    return table(["GB per GPU at micro-batch", *map(str, MICRO_BATCHES)], rows)


def communication_table() -> str:
    rows = []
    for name, c in SIZES.items():
        batch = RECIPES[name].total_batch_tokens
        for gpus in (GPUS_A_NODE, 64):
            compute = step_seconds(c, batch, gpus, SPEED)
            row = [f"{name}, {gpus} GPUs", f"{batch // gpus:,}", f"{1000 * compute:,.0f} ms"]
            rows.append(row + waits(c, gpus, compute))
    return table(["", "tokens per GPU and step", "arithmetic", *LINKS], rows)


def waits(c: GPTConfig, gpus: int, compute: float) -> list[str]:
    """The all-reduce over each link, in ms and in relation to the arithmetic."""
    cells = []
    for link, bandwidth in LINKS.items():
        inside_a_node = link.startswith("NVLink")
        if inside_a_node == (gpus <= GPUS_A_NODE):
            seconds = all_reduce_seconds(c, gpus, bandwidth)
            cells.append(f"{1000 * seconds:.0f} ms ({seconds / compute:.0%})")
        else:
            cells.append("–")
    return cells


def times_table() -> str:
    """The all-reduce is added to the arithmetic, as if nothing overlapped."""
    rows = []
    for name, c in SIZES.items():
        batch = RECIPES[name].total_batch_tokens
        rate = SPEED / flops_per_token(c)  # tokens/s of one GPU
        row = [name, f"{rate / 1000:,.0f}k", f"{2 * 64 * rate / 1e6:.0f} MB/s"]
        links = {1: math.inf, 8: LINKS["NVLink, 450 GB/s"], 64: LINKS["8 × 400 Gb/s a node"]}
        for gpus, bandwidth in links.items():
            compute = step_seconds(c, batch, gpus, SPEED)
            step = compute + all_reduce_seconds(c, gpus, bandwidth)
            row.append(duration(TOKENS / batch * step))
        rows.append(row)
    head = [
        "10B tokens",
        "tokens/s per GPU",
        "tokens read by 64 GPUs",
        "1 GPU",
        "8 GPUs",
        "64 GPUs",
    ]
    return table(head, rows)


def checkpoints_table() -> str:
    rows = []
    for name, c in SIZES.items():
        write = checkpoint_bytes(parameters(c)) / WRITE_SPEED
        row = [name, f"{write:.1f} s"]
        for seconds in SECONDS_BETWEEN_FAILURES.values():
            row.append(duration(checkpoint_interval(write, seconds)))
        rows.append(row)
    return table(["a failure every", "write at 1 GB/s", *SECONDS_BETWEEN_FAILURES], rows)


def corpora_table() -> str:
    rows = []
    for name, tokens in CORPORA.items():
        seconds = tokens / TOKENISED_A_SECOND  # of one core
        c = SIZES["gpt2-xl"]
        row = [
            name,
            f"{tokens / TOKENS_A_TASK:,.0f}",
            f"{seconds / 3600:,.0f}",
            duration(seconds / CORES),
            f"{tokens / TOKENS_A_FILE:,.0f}",
            f"{2 * tokens / 1e12:,.0f} TB",
            f"{tokens / c.block_size / 1e9:.1f} × 10⁹",
            duration(step_seconds(c, tokens, MANY_GPUS, SPEED)),
        ]
        rows.append(row)
    head = [
        "tokens",
        "tasks",
        "core hours",
        f"on {CORES:,} cores",
        "files",
        "disk",
        "windows",
        f"gpt2-xl reads it on {MANY_GPUS:,} GPUs in",
    ]
    return table(head, rows)


def many_gpus_table() -> str:
    """The all-reduce beside the arithmetic, in ms and in relation, over a card for each GPU."""
    rows = []
    for name, c in SIZES.items():
        seconds = all_reduce_seconds(c, MANY_GPUS, LINKS["8 × 400 Gb/s a node"])
        row = [name, f"{1000 * seconds:.0f} ms"]
        for batch in LARGE_BATCHES.values():
            compute = step_seconds(c, batch, MANY_GPUS, SPEED)
            row.append(f"{1000 * compute:,.0f} ms ({seconds / compute:.0%})")
        rows.append(row)
    batches = [f"arithmetic at {name} tokens" for name in LARGE_BATCHES]
    return table([f"{MANY_GPUS:,} GPUs", "all-reduce", *batches], rows)


def tables() -> list[str]:
    """Everything that docs/scaling.md shows in figures, in its order."""
    return [
        sizes_table(),
        memory_table(),
        communication_table(),
        times_table(),
        corpora_table(),
        checkpoints_table(),
        many_gpus_table(),
    ]


def main() -> None:
    argparse.ArgumentParser(description="Print the tables of docs/scaling.md.").parse_args()
    print("\n\n".join(tables()))


if __name__ == "__main__":
    main()
