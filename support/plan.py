"""What a run costs: parameters, FLOPs, memory, communication, time, checkpoints.

    python train_gpt2.py --dry-run                        # a run on this machine, before it starts
    python -m support.plan --gpus 8 --gpu h100            # GPT-2 124M on a machine that is not here
    python -m support.plan --run runs/gpt2 --gpus 64      # a run that there is, on another machine

Everything here is arithmetic on sizes. `c` is any object with n_layer, n_head, n_embd, block_size,
vocab_size and dropout, such as model.GPTConfig. The tests check the arithmetic against torch's own
counters. Units: bytes, seconds, FLOPs; GB is 10^9 bytes.

Letters: B sequences per micro-batch, T tokens each, W ranks, C channels, H heads, L layers,
V vocabulary.
"""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch

from support.files import read_json
from support.runtime import (
    LOGIT_ROWS,
    PEAK_FLOPS,
    Runtime,
    peak_flops,
    unfused_attention_is_faster,
)
from support.script import Range, check_fields, parse_flags, require, run_script, say
from support.shards import ENCODINGS

# The part of a device's matrix throughput that training reaches. docs/scaling.md compares it with
# published runs.
ASSUMED_MFU = 0.4

# Seconds of arithmetic in a step, below which they say nothing of the time that it takes. A step of
# GPT-2 124M is some 700 operations, and to start one takes several microseconds.
LEAST_STEP = 0.01

# What a training process on a CPU holds beside its tensors: Python, torch, its kernels' code and
# matplotlib. Measured on Linux with torch 2.13: 240 MB after the imports, 350 MB after a step,
# 370 MB after a picture.
LIBRARY_BYTES = 370_000_000


def parameters(c) -> int:
    """The number of parameters. The head is the embedding, so it counts once."""
    embeddings = (c.vocab_size + c.block_size) * c.n_embd
    matrices = 12 * c.n_embd**2  # of a layer: 3 C² and C² in attention, 4 C² and 4 C² in the MLP
    biases = 9 * c.n_embd
    norm = 2 * c.n_embd
    return embeddings + c.n_layer * (matrices + biases + 2 * norm) + norm


def flops_per_token(c) -> int:
    """Training FLOPs per token, forward and backward (PaLM, appendix B).

    A parameter of a matrix product costs 6, the head's included. Attention's two products are
    counted over the whole context, without a discount for its causal mask.
    """
    in_matrix_products = 12 * c.n_layer * c.n_embd**2 + c.vocab_size * c.n_embd
    attention = 12 * c.n_layer * c.n_embd * c.block_size
    return 6 * in_matrix_products + attention


# ---------------------------------------------------------------------------------------- memory


def activation_bytes(c, width: int = 2, fused: bool = True, device: str = "cuda") -> int:
    """Bytes per token that the forward pass keeps for the backward pass.

    width: bytes per element of matrix products, 2 under bfloat16 autocast. fused: attention
    without its T × T matrix. torch.compile keeps less.
    """
    C, H, T = c.n_embd, c.n_head, c.block_size
    residual_stream = 2 * 4 * C  # the inputs of both norms, which stay float32
    inputs_of_linears = (C + C + C + 4 * C) * width  # attention keeps its output too: counted once
    queries_keys_values = 3 * C * width
    input_of_gelu = 4 * C * width
    log_sum_exps = 4 * H  # in float32
    rows_of_attention = width * H * T
    attention = log_sum_exps if fused else rows_of_attention
    norms = 2 * 8  # mean and 1/std of both, in float32
    noise_of_block = noise_of_embedding = 0
    if c.dropout:
        # What is dropped is kept as a bool on a GPU, and as a factor of 0 or 1/(1-p) on a CPU.
        on_cpu = device == "cpu"
        noise_of_block = 2 * C * (width if on_cpu else 1)
        noise_of_embedding = C * (4 if on_cpu else 1)
        if on_cpu:  # its fused attention knows no dropout
            probabilities_noise_and_product = 3 * rows_of_attention
            attention = probabilities_noise_and_product
    layer = (
        residual_stream
        + inputs_of_linears
        + queries_keys_values
        + input_of_gelu
        + attention
        + norms
        + noise_of_block
    )
    last_norm = 4 * C + 8
    gradient_of_loss = width * C  # which the loss computes in the forward pass
    token = 8
    return c.n_layer * layer + noise_of_embedding + last_norm + gradient_of_loss + token


def memory(
    c,
    micro_batch: int,
    width: int = 2,
    device: str = "cuda",
    fused: bool = True,
    num_parameters: int | None = None,
) -> dict[str, int]:
    """Peak bytes of training on one rank, by part.

    num_parameters: the network's, where it is not GPT-2.

    DDP adds nothing to it as long as gradients are set to zero between updates. They are then
    views of DDP's buckets (gradient_as_bucket_view). Gradients that are set to None instead are
    made anew outside the buckets by each update that accumulates under no_sync, which takes
    another 4 bytes per parameter.
    """
    tokens = micro_batch * c.block_size
    copies = 0
    if width == 2:
        copies = 2 * 12 * c.n_layer * c.n_embd**2  # which autocast makes of the linears' weights
    rows_of_logits = min(tokens, LOGIT_ROWS[device])
    bytes_per_logit = 10 if width == 2 else 8  # itself and what log_softmax makes of it
    logits = c.vocab_size * rows_of_logits * bytes_per_logit
    head = (width + 4) * c.vocab_size * c.n_embd  # its copy in `width`, its gradient in float32
    return {
        # In float32, and two moments.
        "weights, gradients and moments": 4 * 4 * (num_parameters or parameters(c)),
        "copies in bfloat16": copies,
        "activations": tokens * activation_bytes(c, width, fused, device),
        "loss": head + logits,
    }


# ---------------------------------------------------------------------------------------- time


def step_seconds(c, batch_tokens: int, world_size: int, speed: float) -> float:
    """The arithmetic of one update; speed: FLOP/s that each rank sustains."""
    return batch_tokens * flops_per_token(c) / (world_size * speed)


def all_reduce_seconds(c, world_size: int, bandwidth: float) -> float:
    """A ring all-reduce of the float32 gradients.

    Each rank sends 2 (W - 1) / W of them over the slowest link. bandwidth: of that link, in
    bytes/s; it is what nccl-tests calls the bus bandwidth.
    """
    return 2 * (world_size - 1) / world_size * 4 * parameters(c) / bandwidth


def checkpoint_bytes(num_parameters: int) -> int:
    """Weights and AdamW's two moments, float32."""
    return 3 * 4 * num_parameters


def checkpoint_interval(write_seconds: float, mtbf: float) -> float:
    """Seconds between checkpoints that lose the least time (Young 1974, Daly 2006).

    mtbf: mean seconds between failures of the job.
    """
    return math.sqrt(2 * write_seconds * mtbf)


def matmul_speed(rt: Runtime, seconds: float = 0.5) -> float:
    """FLOP/s of a square matrix product on this device, now.

    It is the best of as many as fit into `seconds`, to see past what else the device is doing.
    """
    # Large enough to be efficient, small enough to be repeated.
    size = 512 if rt.device.type == "cpu" else 4096
    a = torch.randn(size, size, device=rt.device, dtype=rt.dtype)
    best = math.inf
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ a
        rt.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


# ---------------------------------------------------------------------------------------- one run


def dry_run(c, num_parameters: int, rt: Runtime, config) -> list[str]:
    """All lines of a run on this machine; config: the trainer's."""
    length_and_batch = (config.max_steps, config.total_batch_tokens)
    return [
        *plan(c, num_parameters, rt, *length_and_batch, config.micro_batch),
        plan_time(c, rt, *length_and_batch),
        checkpoint_line(num_parameters),
    ]


def plan(
    c, num_parameters: int, rt: Runtime, steps: int, batch_tokens: int, micro_batch: int
) -> list[str]:
    """The run in a few lines, before it starts: model, training, one step, memory.

    num_parameters: the network's, which an edit of model.py changes.
    """
    tokens = steps * batch_tokens
    sequences = batch_tokens // (c.block_size * rt.world_size)  # of one rank in one step
    micro_batch = min(micro_batch, sequences)
    micro_steps = math.ceil(sequences / micro_batch)
    return [
        f"model          {num_parameters:,} parameters: {count(c.n_layer, 'layer', 'layers')}, "
        f"{count(c.n_head, 'head', 'heads')}, {c.n_embd} channels, "
        f"context {c.block_size}, vocabulary {c.vocab_size:,}",
        f"training       {steps:,} steps of {batch_tokens:,} tokens = {tokens:,} tokens, "
        f"{tokens * flops_per_token(c):.2e} FLOPs",
        f"each step      {count(micro_steps, 'micro-batch', 'micro-batches')} of {micro_batch} × "
        f"{c.block_size} tokens on {'each of ' * (rt.world_size > 1)}"
        f"{count(rt.world_size, 'rank', 'ranks')}",
        memory_line(c, num_parameters, rt, micro_batch),
    ]


def memory_line(c, num_parameters: int, rt: Runtime, micro_batch: int) -> str:
    """What each rank needs, its parts, and what comes on top."""
    width = rt.dtype.itemsize
    fused = not unfused_attention_is_faster(rt.device, rt.dtype, c.block_size)
    parts = memory(c, micro_batch, width, rt.device.type, fused, num_parameters)
    if rt.device.type == "cpu":
        parts["Python and torch themselves"] = LIBRARY_BYTES
    words = [f"{name} {amount(size)}" for name, size in parts.items() if size]
    total = amount(sum(parts.values()))
    line = f"memory         about {total} on each rank: {', '.join(words)}"
    if rt.device.type == "cuda":
        line += "; CUDA's own context and the allocator's slack come on top"
    return line


def plan_time(c, rt: Runtime, steps: int, batch_tokens: int) -> str:
    """How long the run would take here.

    The device's speed is its datasheet's peak, or that of matrix products timed now.
    """
    peak = peak_flops(rt.device, rt.dtype)
    if peak:
        return time_line(c, rt.world_size, steps, batch_tokens, peak, "in its datasheet")
    speed = matmul_speed(rt)
    source = "of matrix products timed here, as if no other work shared it"
    return time_line(c, rt.world_size, steps, batch_tokens, speed, source)


def time_line(c, world_size: int, steps: int, batch_tokens: int, flops: float, source: str) -> str:
    """How long a run takes. flops: each rank's peak in FLOP/s. source: where that is from."""
    one_step = step_seconds(c, batch_tokens, world_size, ASSUMED_MFU * flops)
    if one_step < LEAST_STEP:
        return (
            f"time           no estimate: a step is {1000 * one_step:.2g} ms of arithmetic, and "
            f"below {1000 * LEAST_STEP:.0f} ms other things take longer, such as starting kernels"
        )
    return (
        f"time           {duration(steps * one_step)} at {batch_tokens / one_step:,.0f} tokens/s, "
        f"if training reaches {ASSUMED_MFU:.0%} (assumed) of each rank's "
        f"{flops / 1e12:.3g} TFLOP/s ({source}); evaluations come on top"
    )


def checkpoint_line(num_parameters: int) -> str:
    return f"checkpoints    {amount(checkpoint_bytes(num_parameters))} each"


def count(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"


def amount(size: float) -> str:
    """A number of bytes in GB or MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def duration(seconds: float) -> str:
    """Two digits of it, in the unit that a person would use."""
    unit, length = "seconds", 1
    for longer_unit, longer in (("minutes", 60), ("hours", 3600), ("days", 86400)):
        if seconds >= 2 * longer:
            unit, length = longer_unit, longer
    value = seconds / length
    return f"{value:.1f} {unit}" if value < 10 else f"{value:,.0f} {unit}"


# ---------------------------------------------------------------------------------------- script


@dataclass(frozen=True)
class PlanConfig:
    """A run, and the GPUs that it is planned for. It is a size `c` as well."""

    # run directory to take sizes, steps and batch from; other flags override them
    run: str = ""
    gpus: Annotated[int, Range(1, 2**20)] = 8  # number of GPUs
    gpu: str = "H100"  # kind of these GPUs
    n_layer: Annotated[int, Range(1, 400)] = 12  # transformer blocks
    n_head: Annotated[int, Range(1, 2**12)] = 12  # attention heads
    n_embd: Annotated[int, Range(1, 2**16)] = 768  # channels
    seq_len: Annotated[int, Range(1, 2**20)] = 1024  # tokens per sequence
    vocab_size: Annotated[int, Range(1, 2**20)] = 50_257  # tokens of the encoding
    dropout: Annotated[float, Range(0, 1, below=True)] = 0.0  # matters for memory
    max_steps: Annotated[int, Range(1, 10**9)] = 19_073  # updates in all
    total_batch_tokens: Annotated[int, Range(1, 2**28)] = 524_288  # tokens per update, of all GPUs
    micro_batch: Annotated[int, Range(1)] = 16  # sequences at once on each GPU

    @property
    def block_size(self) -> int:
        return self.seq_len


# What train.json says of a run that matters here.
FROM_RUN = {
    "n_layer": int,
    "n_head": int,
    "n_embd": int,
    "seq_len": int,
    "dropout": float,
    "max_steps": int,
    "total_batch_tokens": int,
    "micro_batch": int,
}


def values_of_run(folder: str) -> dict:
    """What a run's train.json says, as values of a PlanConfig."""
    saved = read_json(Path(folder, "train.json"), FROM_RUN | {"tokenizer": str})
    encoding = saved["tokenizer"]
    require(
        encoding in ENCODINGS,
        f"{folder}/train.json: tokenizer {encoding!r}; expected one of {', '.join(ENCODINGS)}; "
        "give the sizes as flags",
    )
    return {name: saved[name] for name in FROM_RUN} | {"vocab_size": ENCODINGS[encoding]}


def plan_elsewhere(config: PlanConfig) -> list[str]:
    """The plan of a run on a machine that need not be here, in bfloat16."""
    peaks = {name.lower(): flops for name, flops in PEAK_FLOPS.items()}
    require(
        config.gpu.lower() in peaks,
        f"--gpu {config.gpu}: no datasheet figure is known for a GPU of that name; expected one of "
        f"{', '.join(sorted(peaks))}; name the one whose speed is nearest",
    )
    sequences = config.total_batch_tokens // config.seq_len
    require(
        sequences > 0 and sequences % config.gpus == 0,
        f"--gpus {config.gpus}; expected a number that divides the {sequences} sequences of a step "
        f"(--total-batch-tokens {config.total_batch_tokens} / --seq-len {config.seq_len}); change "
        "one of the three",
    )
    device = torch.device("cuda")
    rt = Runtime(world_size=config.gpus, device=device, dtype=torch.bfloat16)
    steps, batch_tokens = config.max_steps, config.total_batch_tokens
    peak = peaks[config.gpu.lower()]
    source = f"in the datasheet of {config.gpu.upper()}"
    return [
        *plan(config, parameters(config), rt, steps, batch_tokens, config.micro_batch),
        time_line(config, config.gpus, steps, batch_tokens, peak, source),
        checkpoint_line(parameters(config)),
    ]


def main(args: list[str] | None = None) -> None:
    help_text = (__doc__ or "").partition("\nEverything here")[0]
    config = parse_flags(PlanConfig, PlanConfig(), help_text, args)
    if config.run:
        of_run = replace(PlanConfig(), **values_of_run(config.run))
        config = parse_flags(PlanConfig, of_run, help_text, args)
    check_fields(config)
    say(*plan_elsewhere(config))


if __name__ == "__main__":
    run_script(main)
