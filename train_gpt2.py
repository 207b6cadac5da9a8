"""Train GPT-2: from scratch or from existing weights, on a CPU, on one GPU, or on many.

    python train_gpt2.py                                     what can be trained here and now
    torchrun --standalone --nproc_per_node=8 train_gpt2.py   GPT-2 124M on eight GPUs
    python train_gpt2.py --init-from gpt2 --data novel.txt   fine-tune OpenAI's weights on your text

Reads token shards (tokens.py). Writes a run directory (support/run_directory.py). Ctrl-C finishes
the step in hand, saves and exits; the same command with --resume goes on from there.

Read it from the top: the configuration, the pieces of a training step, the loop, `main`. What
follows `main` are the details of the command line.

Shapes: B sequences per micro-batch, T = seq_len tokens per sequence, W ranks.
"""

if __name__ == "__main__":  # before the imports, which take seconds, so that Ctrl-C ends them too
    from support import script

    script.begin()


import argparse
import contextlib
import dataclasses
import datetime
import functools
import gc
import math
import os
import re
import secrets
import shlex
import sys
import tempfile
import time
import typing
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import tiktoken
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import fineweb
import hellaswag
from fineweb import FINEWEB_EDU_FOLDER, FIRST_RUN_FOLDER
from model import GPT, SIZES, GPTConfig, NextTokenLoss
from sample import load_model as load_model_of
from sample import sample_text
from support import run_directory, script
from support.files import plain_name, read_bytes, read_json, same_folder, write_file
from support.huggingface import load_model
from support.network import probe
from support.optimizer import (
    Optimizer,
    blank_tensors,
    load_optimizer_tensors,
    make_optimizer,
    set_learning_rate,
    state_tensors,
)
from support.plan import flops_per_token, parameters, plan, plan_time
from support.plot import draw_curves
from support.ranks import ALONE, GradientTree, Ranks, check_tree, require_named_run
from support.run_directory import Checkpoint, RunDirectory
from support.runtime import Runtime, multiplies_bfloat16, peak_flops, peak_memory, start
from support.script import (
    Stopped,
    StopRequest,
    TransientError,
    UserError,
    parse_flags,
    run_script,
)
from support.shards import ENCODINGS, SUFFIXES
from support.spikes import SpikeGuard
from tokens import (
    TokenArray,
    TokenData,
    get_encoding,
    open_data,
    token_bytes,
    training_windows,
)

# ------------------------------------------------------------------------------- configuration


# What --help says above the flags: the head of this file, without what is for readers of the code.
HELP = (__doc__ or "").partition("\nRead it from the top")[0]


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run. Each field is a flag, and its comment is the flag's help."""

    # What is trained, on what, and where it is kept.

    # complete configuration that the other flags override: first-run, finetune, gpt2, gpt2-medium,
    # gpt2-large, gpt2-xl, gpt2-fast
    recipe: str = "gpt2"
    # directory of token shards, or text: a file, a folder, or a glob in quotes. Text is tokenised
    # once, into data/<name>-<hash of the contents>; changed text is tokenised anew, beside it
    data: str = FINEWEB_EDU_FOLDER
    # encoding for text that has yet to be tokenised; token shards say themselves what they hold
    tokenizer: Literal["gpt2", "bytes"] = "gpt2"
    # weights to start from: a name on the hub, a run, one of its checkpoints, or a Hugging Face
    # directory; empty: random ones
    init_from: str = ""
    # run directory; empty: runs/<recipe>, or runs/<recipe>-2, -3, … if that one holds a run
    out: str = ""
    # continue the run in --out, or without --out the newest of runs/<recipe>, runs/<recipe>-2, …;
    # start one if there is none
    resume: bool = False
    # a run, or its train.json, to take all values from; other flags override them
    config: str = ""
    eval_only: bool = False  # measure --init-from on --data, and train nothing
    dry_run: bool = False  # print what the run would cost, and train nothing

    # The model.

    n_layer: int = 12  # transformer blocks
    n_head: int = 12  # attention heads
    n_embd: int = 768  # channels
    seq_len: int = 1024  # tokens per sequence, which is the model's context
    dropout: float = 0.0  # share of embeddings, attention weights and block outputs set to zero

    # How it learns.

    max_steps: int = 19_073  # updates in all: the end of the run and of its learning rate
    total_batch_tokens: int = 524_288  # tokens per update, over all ranks and micro-batches
    # sequences that go through the model at once on each rank; lower it when memory runs out (with
    # dropout they go through one by one in any case)
    micro_batch: int = 16
    # what updates the weights; muon: Muon for the blocks' matrices, AdamW for the rest
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 6e-4  # AdamW's peak rate, reached at the end of the warm-up
    muon_learning_rate: float = 0.02  # Muon's peak, where it is used
    schedule: Literal["cosine", "linear"] = "cosine"  # how the rate falls after the warm-up
    min_lr: float = 6e-5  # learning rate that the cosine ends at; the linear schedule ends at zero
    warmup_steps: int = 715  # updates in which the learning rate grows from zero to its peak
    beta1: float = 0.9  # AdamW's decay of the mean gradient
    beta2: float = 0.95  # AdamW's decay of the mean squared gradient
    weight_decay: float = 0.1  # decay of matrices and embeddings; biases and norms have none
    grad_clip: float = 1.0  # largest gradient norm; a longer gradient is scaled down to it
    skip_spikes: bool = False  # leave out an update whose loss jumps; without it, only warn
    seed: int = 1337  # seed of the initial weights, of the order of the data, and of dropout
    deterministic: bool = False  # compute the same bits on 1, 2, 4, 8, … ranks

    # What is reported and kept. An interval of 0 means never.

    eval_every: int = 1000  # updates between two validations
    eval_tokens: int = 10_485_760  # validation tokens read each time, from the start of the split
    hellaswag_every: int = 1000  # updates between two HellaSwag scores
    sample_every: int = 1000  # updates between two samples
    save_every: int = 1000  # updates between two checkpoints
    keep: int = 2  # number of newest checkpoints that are kept
    keep_best: bool = False  # keep the checkpoint of lowest validation loss too, and load that one
    # send the log to Weights & Biases too (pip install wandb; WANDB_MODE=offline keeps it here)
    wandb: bool = False

    # The machine.

    device: str = "auto"  # device to compute on: cuda, mps or cpu; auto: the first that is there
    # dtype of matrix products; auto: bfloat16 where the hardware has it
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = True  # compile the training step with torch.compile

    def __post_init__(self):
        at_least_one = ("n_layer", "n_head", "n_embd", "seq_len", "max_steps", "micro_batch")
        for name in (*at_least_one, "total_batch_tokens", "eval_tokens", "keep"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        intervals = ("eval_every", "hellaswag_every", "sample_every", "save_every")
        for name in (*intervals, "warmup_steps", "weight_decay", "min_lr"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "0 or more")
        for name in ("learning_rate", "muon_learning_rate", "grad_clip"):
            self._require(name, 0 < getattr(self, name) < math.inf, "a positive number")
        for name in ("dropout", "beta1", "beta2"):
            self._require(name, 0 <= getattr(self, name) < 1, "a number from 0 to below 1")
        self._require("seed", 0 <= self.seed < 2**63, "0 or more, below 2^63")
        for field in dataclasses.fields(self):  # train.json holds no larger ones
            if type(field.default) is int:
                self._require(field.name, getattr(self, field.name) < 2**63, "below 2^63")
        self._require("max_steps", self.max_steps <= 10**9, "at most 10^9")
        self._require("total_batch_tokens", self.total_batch_tokens <= 2**28, "at most 2^28")
        self._require("recipe", plain_name(self.recipe), "a name")  # of a folder below runs/
        # safetensors would write a checkpoint to any other path, but could not read it again.
        self._require("out", not re.search("[\0\ud800-\udfff]", self.out), "a path in UTF-8")
        for field in dataclasses.fields(self):
            choices = typing.get_args(field.type)
            if choices:
                good = getattr(self, field.name) in choices
                self._require(field.name, good, f"one of {', '.join(choices)}")
        if self.total_batch_tokens % self.seq_len:
            nearest = max(1, round(self.total_batch_tokens / self.seq_len)) * self.seq_len
            raise UserError(
                f"--total-batch-tokens {self.total_batch_tokens}; expected a multiple of --seq-len "
                f"{self.seq_len}; for example {nearest}"
            )

    def _require(self, name: str, good: bool, expected: str) -> None:
        if not good:
            value = getattr(self, name)
            raise UserError(f"{flag(name)} {value}; expected {expected}; give another value")

    @property
    def sequences_per_step(self) -> int:
        """Sequences per update, over all ranks and micro-batches."""
        return self.total_batch_tokens // self.seq_len


def flag(name: str) -> str:
    """How the command line spells a field."""
    return f"--{name.replace('_', '-')}"


def gpt2_recipe(size: str, **changes) -> TrainConfig:
    """GPT-2 of a named size, trained as GPT-3 table 2.1 says; see RECIPES."""
    shape = SIZES[size]
    return TrainConfig(
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        n_embd=shape.n_embd,
        seq_len=shape.block_size,
        **({"recipe": size} | changes),
    )


# The learning rates, batches and warm-ups of GPT-2's sizes are those of the GPT-3 paper (table 2.1
# and appendix B): 0.5M tokens a batch, 1M for XL, a warm-up over 375M tokens, then a cosine down to
# a tenth of the peak. Each trains on 10B tokens.
RECIPES = {
    "first-run": TrainConfig(
        recipe="first-run",
        data=FIRST_RUN_FOLDER,
        tokenizer="bytes",
        n_layer=4,
        n_head=4,
        n_embd=128,
        seq_len=128,
        max_steps=3_600,
        total_batch_tokens=1024,
        micro_batch=8,
        optimizer="muon",
        schedule="linear",
        learning_rate=8e-3,
        min_lr=0.0,
        warmup_steps=180,
        eval_every=600,
        eval_tokens=131_072,
        hellaswag_every=0,
        sample_every=1800,
        save_every=1800,
        compile=False,
    ),
    "finetune": TrainConfig(
        recipe="finetune",
        data="",
        max_steps=100,
        total_batch_tokens=8192,
        micro_batch=4,
        learning_rate=3e-5,
        min_lr=1.5e-5,
        warmup_steps=10,
        dropout=0.1,
        eval_every=10,
        eval_tokens=131_072,
        hellaswag_every=0,
        sample_every=50,
        save_every=10,
        keep=1,
        keep_best=True,
        compile=False,
    ),
    "gpt2": gpt2_recipe("gpt2"),
    "gpt2-medium": gpt2_recipe("gpt2-medium", micro_batch=8, learning_rate=3e-4, min_lr=3e-5),
    "gpt2-large": gpt2_recipe("gpt2-large", micro_batch=2, learning_rate=2.5e-4, min_lr=2.5e-5),
    "gpt2-xl": gpt2_recipe(
        "gpt2-xl",
        micro_batch=4,
        learning_rate=2e-4,
        min_lr=2e-5,
        max_steps=9_536,
        total_batch_tokens=1_048_576,
        warmup_steps=358,
    ),
    # Half the tokens by Muon (docs/recipes.md). Its rates are those of modded-nanogpt's early
    # records, on a model that is nearly GPT-2. It has not been run at this size.
    "gpt2-fast": gpt2_recipe(
        "gpt2",
        recipe="gpt2-fast",
        optimizer="muon",
        schedule="linear",
        learning_rate=3.6e-3,
        muon_learning_rate=0.02,
        min_lr=0.0,
        weight_decay=0.05,
        max_steps=9_536,
        warmup_steps=250,
    ),
}

# Flags whose value may change when a run is continued. A changed value of any other flag is
# refused: it would change what is learned, what validations compare, or which checkpoint is the
# best. The path of the data may change, since the data are known by their fingerprint.
FREE_ON_RESUME = {
    "out",
    "resume",
    "config",
    "data",
    "device",
    "micro_batch",
    "compile",
    "wandb",
    "eval_every",
    "hellaswag_every",
    "sample_every",
    "save_every",
    "keep",
    "eval_only",
    "dry_run",
}


# Values that older versions have not written into train.json; the runs were made with the default.
ADDED_LATER = {"skip_spikes"}


# ---------------------------------------------------------------------------------- the pieces


def learning_rate(step: int, config: TrainConfig) -> float:
    """AdamW's learning rate of an update; `step` counts from 0 to max_steps - 1.

    1) Warm-up: it grows linearly and reaches its peak with update `warmup_steps`.
    2) cosine: half a cosine wave down to min_lr at max_steps (GPT-3, appendix B).
       linear: a straight line down to zero at max_steps.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    if config.schedule == "linear":
        return config.learning_rate * (1 - progress)
    height = 0.5 * (1 + math.cos(math.pi * progress))  # from 1 down to 0
    return config.min_lr + height * (config.learning_rate - config.min_lr)


def step_batch(
    data: TokenArray, config: TrainConfig, step: int, rank: int, world_size: int
) -> torch.Tensor:
    """The windows that `rank` trains on in `step`, int64 (sequences_per_step / W, T + 1).

    They are the rank's part of the step's samples; see tokens.training_windows.
    """
    count = config.sequences_per_step // world_size
    first = step * config.sequences_per_step + rank * count
    indices = training_windows(first, count, data.num_windows(config.seq_len), config.seed)
    return torch.from_numpy(data.windows(indices, config.seq_len))


def step_batches(
    data: TokenArray, config: TrainConfig, first_step: int, rt: Runtime
) -> Iterator[torch.Tensor]:
    """This rank's batches from `first_step` to the end, each read while the one before is used."""

    def read(step: int) -> torch.Tensor:
        batch = step_batch(data, config, step, rt.rank, rt.world_size)
        return batch.pin_memory() if rt.device.type == "cuda" else batch

    with ThreadPoolExecutor(1, thread_name_prefix="batches") as background:
        upcoming = background.submit(read, first_step)
        for step in range(first_step, config.max_steps):
            batch = upcoming.result()
            upcoming = background.submit(read, step + 1)
            yield batch


def make_loss_function(model: GPT, config: TrainConfig, rt: Runtime) -> nn.Module:
    """The module that training calls: `loss_fn(idx, targets)` is the loss of a micro-batch.

    Up to three layers, from the inside:
    1) NextTokenLoss runs the model and computes the loss.
    2) With several ranks, DDP (DistributedDataParallel) is around it. Each rank has a copy of the
       model and its own part of the batch. In the backward pass DDP replaces each gradient by its
       mean over the ranks, so that all copies make the same update. It gathers the gradients in
       buckets, large pieces of memory that are sent at once; each `p.grad` is a part of a bucket.
       DDP acts on what is computed by the forward that it wraps. So the loss must be a forward.
    3) torch.compile, if it is asked for, compiles forward and backward together.

    `model` itself stays plain: samples, HellaSwag and checkpoints use it.
    """
    loss_fn = NextTokenLoss(model)
    uses_ddp = rt.world_size > 1 and not config.deterministic
    if uses_ddp:
        devices = [rt.device] if rt.device.type == "cuda" else None
        loss_fn = DistributedDataParallel(loss_fn, device_ids=devices, gradient_as_bucket_view=True)
    if config.compile:
        loss_fn = rt.compile(loss_fn, config.seq_len)
    if uses_ddp:
        warm_up_ddp(loss_fn, model, config, rt)
    return loss_fn


def warm_up_ddp(loss_fn: nn.Module, model: GPT, config: TrainConfig, rt: Runtime) -> None:
    """Let DDP choose its final buckets before the first step, in two backward passes on zeros.

    In its first pass DDP guesses which gradients share a bucket. After that pass it knows in which
    order gradients come, and makes other buckets. The last bits of a sum over three ranks or more
    depend on the buckets. A run that is stopped and continued has two first passes. If a first pass
    were part of a step, the continued run would differ from an undisturbed one.
    """
    # Laid out in memory as a micro-batch of a step: for others torch.compile would compile again.
    windows = torch.zeros(sequences_at_once(config), config.seq_len + 1, dtype=torch.long)
    for _ in range(2):
        micro_batch_loss(loss_fn, windows, config, rt, step=0, i=0).backward()
    model.zero_grad(set_to_none=False)


def train_step(
    loss_fn: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: torch.Tensor,
    config: TrainConfig,
    rt: Runtime,
    step: int = 0,
    leave_out: Callable[[float], bool] = lambda loss: False,
) -> tuple[float, float]:
    """One update from this rank's windows, int64 (sequences_per_step / W, T + 1).

    Returns the mean loss of the global batch before the update, in nats per token, and the norm of
    its gradient before clipping. Ends every rank with UserError, before anything is updated, when
    loss or norm is not finite. `step` seeds dropout. Where `leave_out(loss)` is true nothing is
    updated.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # 1) After this line every rank holds the gradient of the mean loss of the global batch.
    if config.deterministic:
        loss = backward_in_fixed_order(loss_fn, parameters, batch, config, rt, step)
    else:
        loss = backward(loss_fn, batch, config, rt, step)
    # 2) After this line it is no longer than grad_clip.
    gradient_norm = nn.utils.clip_grad_norm_(parameters, config.grad_clip)
    # Both numbers in one transfer: each one makes the host wait for the GPU.
    loss, gradient_norm = torch.stack([loss, gradient_norm.to(loss)]).tolist()
    if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
        error = UserError(
            f"loss {loss}, gradient norm {gradient_norm} in update {step + 1}; expected finite "
            "numbers; nothing was updated; start anew with a lower --learning-rate, from the last "
            "checkpoint's weights with --init-from if there is one"
        )
        rt.raise_on_all(error)
    # 3) After this line the weights are updated, the same on every rank.
    if not leave_out(loss):
        optimizer.step()
    # With one rank the gradients are freed. With several they are set to zero: under DDP each is a
    # part of a bucket, and a freed one would have to be copied into its bucket again.
    optimizer.zero_grad(set_to_none=rt.world_size == 1)
    return loss, gradient_norm


def backward(
    loss_fn: nn.Module, batch: torch.Tensor, config: TrainConfig, rt: Runtime, step: int
) -> torch.Tensor:
    """Accumulate the gradient over micro-batches and ranks; returns the mean loss of all."""
    micro_batches = batch.split(sequences_at_once(config))
    total = torch.zeros((), device=rt.device)
    for i, windows in enumerate(micro_batches):
        is_last = i == len(micro_batches) - 1
        # Each rank adds up the gradients of its micro-batches by itself (no_sync). Only in the
        # backward pass of the last one does DDP take the mean over the ranks of what they have
        # added up. Gradients meet at no other place of a step.
        without_averaging = contextlib.nullcontext()  # has no effect
        if rt.world_size > 1 and not is_last:
            without_averaging = loss_fn.no_sync()  # a compiled module hands this on to DDP
        with without_averaging:
            loss = micro_batch_loss(loss_fn, windows, config, rt, step, i)
            loss = loss / len(micro_batches)
            loss.backward()
        total += loss.detach()
    return rt.sum(total) / rt.world_size  # DDP has divided the gradients, not this number


def backward_in_fixed_order(
    loss_fn: nn.Module,
    parameters: list[nn.Parameter],
    batch: torch.Tensor,
    config: TrainConfig,
    rt: Runtime,
    step: int,
) -> torch.Tensor:
    """What `backward` does, with sums in an order that does not depend on the number of ranks."""
    micro_batches = batch.split(sequences_at_once(config))
    tree = GradientTree(parameters, rt)
    for i, windows in enumerate(micro_batches):
        loss = micro_batch_loss(loss_fn, windows, config, rt, step, i)
        loss = loss / (len(micro_batches) * rt.world_size)
        loss.backward()
        tree.take(loss)
    return tree.finish()


def sequences_at_once(config: TrainConfig) -> int:
    """Sequences per micro-batch; with dropout one, see `micro_batch_loss`."""
    return 1 if config.dropout else config.micro_batch


def micro_batch_loss(
    loss_fn: nn.Module, windows: torch.Tensor, config: TrainConfig, rt: Runtime, step: int, i: int
) -> torch.Tensor:
    """The mean loss of micro-batch i of this rank, windows int64 (B, T + 1)."""
    if config.dropout:
        # sequences_at_once is 1, so this is one sequence. Its noise depends on the seed and on the
        # number of the sequence in the run. So neither the number of ranks nor --micro-batch
        # changes what is learned.
        sequences_per_rank = config.sequences_per_step // rt.world_size
        first_of_rank = step * config.sequences_per_step + rt.rank * sequences_per_rank
        sequence = first_of_rank + i
        torch.manual_seed((config.seed + 1_000_003 * sequence) % 2**63)
    windows = windows.to(rt.device, non_blocking=True)
    with rt.autocast(), rt.attention(config.seq_len):
        return loss_fn(windows[:, :-1], windows[:, 1:])


@torch.no_grad()
def evaluate(
    model: GPT,
    data: TokenArray,
    config: TrainConfig,
    rt: Runtime,
    bytes_per_token: np.ndarray,
    between_batches: Callable[[], None] = lambda: None,
) -> dict:
    """Validation loss over the first `eval_tokens` tokens of a split.

    Returns val_loss in nats per token, bits_per_byte, and eval_tokens, the number of tokens
    predicted. bytes_per_token is tokens.token_bytes of the encoding. Rank i mod W reads batch i, so
    the same tokens are read with any number of ranks. `between_batches` is called equally often on
    every rank, and may raise to end the evaluation.
    """
    model.eval()
    loss_fn = NextTokenLoss(model)
    compiled_loss_fn = rt.compile(loss_fn, config.seq_len) if config.compile else loss_fn
    batches = evaluation_batches(data, config)
    # A row for each batch: nats, tokens, bytes. A rank fills the rows of the batches that it reads,
    # and leaves zeros in the others, so that the sum over ranks has every row.
    results = torch.zeros(len(batches), 3, dtype=torch.float64)
    try:
        for first in range(0, len(batches), rt.world_size):
            between_batches()
            i = first + rt.rank
            if i >= len(batches):
                continue
            windows = batches[i]()
            # The last batch can be smaller: compiling for it alone would cost more than it saves.
            is_full = windows.shape == (config.micro_batch, config.seq_len + 1)
            batch_loss_fn = compiled_loss_fn if is_full else loss_fn
            on_device = windows.to(rt.device, non_blocking=True)
            with rt.autocast(), rt.attention(config.seq_len):
                loss = batch_loss_fn(on_device[:, :-1], on_device[:, 1:])
            targets = windows[:, 1:].numpy()
            text_bytes = bytes_per_token[targets].sum()
            # The one place where the host waits for the GPU.
            results[i] = torch.tensor([loss.item() * targets.size, targets.size, text_bytes])
    finally:
        model.train()
    nats = tokens = text_bytes = 0.0
    for row in rt.sum(results).tolist():
        nats += row[0]
        tokens += row[1]
        text_bytes += row[2]
    return {
        "val_loss": nats / tokens,
        "bits_per_byte": nats / math.log(2) / max(text_bytes, 1),
        "eval_tokens": int(tokens),
    }


def evaluation_batches(data: TokenArray, config: TrainConfig) -> list[Callable[[], torch.Tensor]]:
    """What an evaluation reads, in order: functions that return windows, int64 (B, up to T + 1)."""
    T = config.seq_len
    tokens = min(config.eval_tokens, len(data) - 1)  # tokens to predict
    full_windows = tokens // T

    def read_windows(first: int) -> torch.Tensor:
        last = min(first + config.micro_batch, full_windows)
        return torch.from_numpy(data.windows(np.arange(first, last), T))

    def read_rest() -> torch.Tensor:
        rest = data.read(full_windows * T, tokens + 1)
        return torch.from_numpy(rest.astype(np.int64))[None]

    starts = range(0, full_windows, config.micro_batch)
    batches = [lambda first=first: read_windows(first) for first in starts]
    if tokens % T:
        batches.append(read_rest)
    return batches


# ------------------------------------------------------------------------------------ the loop


@dataclass(frozen=True)
class Training:
    """What `main` has built and the loop uses."""

    config: TrainConfig
    rt: Runtime
    data: TokenData
    encoding: tiktoken.Encoding
    model: GPT  # the plain one, neither compiled nor distributed
    optimizer: torch.optim.Optimizer
    guard: SpikeGuard
    run: RunDirectory
    extras: "Extras"
    hellaswag_items: list[hellaswag.Item] | None


# How a run stops. A signal makes script.StopRequest note its number, and nothing else. The ranks
# compare these numbers at certain points, all at the same ones. If one rank has been
# signalled, AllRanksStop is raised on every rank. The loop then saves, and raises script.Stopped,
# which becomes the exit code. What rank 0 could not write is told to the others in the same way,
# and the error is raised instead.


class AllRanksStop(BaseException):
    """One rank has been asked to stop, or cannot go on, and every rank has heard of it.

    No Exception, so that none of the side activities that must not end a run can lose it.
    """


def train(training: Training) -> None:
    """Train from the step that the run stands at to max_steps.

    At the head of the loop the model has seen exactly `step` updates. Whether to stop is asked
    there, and between the batches of an evaluation. A stop saves the checkpoint before anything
    else that falls on the step. The rest of it is done when the run is continued.
    """
    config, rt, run = training.config, training.rt, training.run
    loss_fn = make_loss_function(training.model, config, rt)
    batches = step_batches(training.data.train, config, run.step, rt)
    spare_garbage_collector()
    step = run.step
    with StopRequest() as stop, Progress(config, rt, run.step) as progress:
        check_stop = functools.partial(raise_if_any_rank_stops, stop, run, rt)
        try:
            # The last round, at max_steps, only saves and reports.
            for step in range(run.step, config.max_steps + 1):
                check_stop()
                if is_due("save", step, training):
                    save(step, training)
                if is_due("eval", step, training):
                    progress.validation_loss = validate(step, training, check_stop)
                if is_due("hellaswag", step, training):
                    score_hellaswag(step, training, check_stop)
                if is_due("sample", step, training):
                    rt.on_main(write_sample, step, training)
                if step == config.max_steps:
                    break
                began = time.perf_counter()
                rate = learning_rate(step, config)
                set_learning_rate(training.optimizer, rate)
                batch = next(batches)
                loss, norm = train_step(
                    loss_fn, training.optimizer, batch, config, rt, step, training.guard.leave_out
                )
                seconds = time.perf_counter() - began
                run.elapsed += seconds
                speed = progress.step_done(step + 1, loss, seconds)
                run.log(
                    "train",
                    step + 1,
                    loss=loss,
                    lr=rate,
                    grad_norm=norm,
                    **speed,
                    elapsed=round(run.elapsed, 3),
                )
                if training.guard.sees_spike:
                    report_spike(step + 1, loss, training)
        except AllRanksStop:
            rt.on_main(run.wait_for_commit)
            if config.save_every:
                save(step, training)
            rt.on_main(run.wait_for_commit)
            rt.say(how_to_go_on(step, config, run))
            raise Stopped(rt.max_over_ranks(stop.signum)) from None
    rt.on_main(run.wait_for_commit)
    # A crash may have come between the last save and its pruning, and the best may be another now.
    rt.on_main(run_directory.prune, run.folder, config.keep)
    rt.say("", *progress.summary(run.elapsed))


def raise_if_any_rank_stops(stop: StopRequest, run: RunDirectory, rt: Runtime) -> None:
    """Raise AllRanksStop on every rank once one is signalled, or rank 0 could not write."""
    if rt.max_over_ranks(max(stop.signum, int(run.has_failed()))):
        raise AllRanksStop


def report_spike(step: int, loss: float, training: Training) -> None:
    """Log a loss that has jumped, and warn of it."""
    guard = training.guard
    training.run.log("spike", step, loss=loss, z=round(guard.z, 2), left_out=guard.skips)
    outcome = "its update was made; in a new run --skip-spikes would leave such updates out"
    if guard.skips:
        outcome = "its update was left out"
    training.rt.say(
        f"warning: step {step}: loss {loss:.4f} is a spike, {guard.z:.1f} standard deviations "
        f"above the mean of those before it; {outcome}"
    )


def is_due(event: str, step: int, training: Training) -> bool:
    """Whether an event falls on this step: at multiples of its interval, and after the last update.

    Before the first update only validation does. A continued run repeats nothing of the step that
    it continues from.
    """
    every = getattr(training.config, f"{event}_every")
    if every == 0 or (step == 0 and event != "eval"):
        return False
    if event == "hellaswag" and training.hellaswag_items is None:  # they could not be had
        return False
    if training.run.has_logged(event, step):
        return False
    return step % every == 0 or step == training.config.max_steps


def save(step: int, training: Training) -> None:
    """Save the checkpoint of this step, unless it is there already.

    It counts only when it is whole: run_directory.py writes all its files under another name,
    then a manifest with their hashes, and renames the directory last. A resumed run verifies the
    hashes.
    """
    run = training.run
    if step == run.last_saved:
        return
    moments = state_tensors(training.model, training.optimizer).values()
    training.rt.check_equal(
        [*training.model.parameters(), *moments], f"step {step}: weights or moments"
    )
    end_of_text = training.encoding.eot_token
    saved_config, weights = training.model.saved_form(
        encoding=training.encoding.name, bos_token_id=end_of_text, eos_token_id=end_of_text
    )
    save_on_main = functools.partial(
        run.save,
        step,
        saved_config,
        weights,
        state_tensors(training.model, training.optimizer),
        training.encoding,
        state={
            "data": training.data.fingerprint,
            "samples": step * training.config.sequences_per_step,
            "spikes": training.guard.state(),
        },
        keep=training.config.keep,
    )
    training.rt.on_main(save_on_main)
    run.last_saved = step


def validate(step: int, training: Training, check_stop: Callable[[], None]) -> float:
    """Log the validation loss, keep the checkpoint if it is the best and the recipe wants it."""
    config, rt, run = training.config, training.rt, training.run
    bytes_per_token = token_bytes(training.encoding)
    result = evaluate(training.model, training.data.val, config, rt, bytes_per_token, check_stop)
    loss = result["val_loss"]
    # The best is marked before the result is logged. A run that is killed in between validates this
    # step again when the run is continued, and finds the same.
    if config.keep_best and step > 0 and loss < rt.on_main(run.lowest_validation_loss):
        save(step, training)
        rt.on_main(run.mark_best, step, loss)
    run.log("eval", step, **result)
    rt.say(
        f"step {step:>6}  validation loss {loss:.4f} nats per token, "
        f"{result['bits_per_byte']:.4f} bits per byte"
    )
    if rt.is_main:
        run.in_background(functools.partial(draw_run, training))
    return loss


def score_hellaswag(step: int, training: Training, check_stop: Callable[[], None]) -> None:
    """Log the HellaSwag score."""
    with training.extras.attempt("HellaSwag is not scored"):
        result = hellaswag.evaluate(
            training.model,
            training.encoding,
            training.hellaswag_items,
            rt=training.rt,
            between_batches=check_stop,
        )
        values = {"acc": result.acc, "acc_norm": result.acc_norm, "items": result.items}
        training.run.log("hellaswag", step, **values)
        training.rt.say(
            f"step {step:>6}  HellaSwag acc {result.acc:.4f}, acc_norm {result.acc_norm:.4f} "
            f"on {result.items:,} items"
        )


def write_sample(step: int, training: Training) -> None:
    """Log a text that the model writes from nothing, the same seed each time. Rank 0 alone."""
    rt = training.rt
    generator = torch.Generator(rt.device).manual_seed(training.config.seed)
    with training.extras.attempt("no sample is written"), rt.autocast():
        (text,) = sample_text(
            training.model,
            training.encoding,
            prompt="",
            num=1,
            max_new_tokens=300,
            temperature=0.8,
            top_k=50,
            generator=generator,
        )
        training.run.log("sample", step, text=text)
        rt.say(f"step {step:>6}  sample:", text)


def draw_run(training: Training) -> None:
    """Draw curves.png."""
    folder = training.run.folder
    with training.extras.attempt("no curves are drawn"):
        draw_curves([folder], folder / "curves.png")


class Extras:
    """What a run does beside training. A fault there is a warning, once of each kind.

    Not so a lost rank, little memory, and what rank 0 cannot write: training would meet them next.
    """

    def __init__(self, rt: Runtime):
        self.rt = rt
        self.warned: set[str] = set()

    @contextlib.contextmanager
    def attempt(self, if_it_fails: str) -> Iterator[None]:
        """Let a block fail, and say then what does not happen and why."""
        try:
            yield
        except Exception as error:
            is_of_training = isinstance(error, TransientError)
            if is_of_training or script.has_lost_contact(error) or script.is_out_of_memory(error):
                raise
            if if_it_fails not in self.warned:
                self.warned.add(if_it_fails)
                reason = f"{type(error).__name__}: {error}"
                self.rt.say(f"warning: {if_it_fails} ({reason}); training goes on")


# --------------------------------------------------------------------------------------- main


def main(args: list[str] | None = None) -> None:
    """Configuration, runtime, run directory, data, model, optimizer, loop."""
    args = sys.argv[1:] if args is None else args
    config, why = config_of_command_line(args)
    rt = start(config.device, config.dtype)
    flags = {flag(name): value for name, value in asdict(replace(config, out="")).items()}
    versions = {"the code": run_directory.hash_of_code(), "torch": torch.__version__}
    rt.same_on_all(flags | versions, "the same flags, train.json and code on every rank")
    if config.eval_only:
        evaluate_only(config, rt)
        return
    rt.say(why)
    rt.say(describe_runtime(rt, config))
    check_batch(config, rt.world_size)
    if config.dry_run:
        rt.say(*dry_run(config, rt))
        return
    check_restarts(config)
    batch = config.total_batch_tokens
    with run_directory.opened(config.out, config.recipe, config.resume, batch, rt) as run:
        data = prepare_data(config, rt)
        config = replace(config, tokenizer=data.encoding)  # shards say what they hold
        contents = {"the contents of --data": data.fingerprint}
        rt.same_on_all(contents, "the same shards on every rank")
        checkpoint = None
        if config.resume:
            check_newest_is_on_main(run, rt)
            checkpoint = load_newest(run, rt)
        model = build_model(config, data, rt, checkpoint)
        optimizer = build_optimizer(model, config, rt)
        guard = SpikeGuard(config.skip_spikes)
        if checkpoint:
            load_checkpoint(checkpoint, model, optimizer, guard, run, data, rt)
        else:
            # Without what only says where these values come from and where they go to.
            saved = replace(config, resume=False, out="", config="")
            rt.on_main(lambda: run.begin(asdict(saved), rt.device))
        extras = Extras(rt)
        if config.wandb:
            rt.on_main(open_wandb, config, run, extras)
        items = hellaswag.find_items(rt) if config.hellaswag_every else None
        encoding = get_encoding(data.encoding)
        training = Training(config, rt, data, encoding, model, optimizer, guard, run, extras, items)
        rt.say(*describe_run(training, checkpoint))
        train(training)
        rt.say(*what_next(training))


def describe_runtime(rt: Runtime, config: TrainConfig) -> str:
    kernels = [kernel.name for kernel in rt.attention_kernels(config.seq_len)]
    names = " > ".join(name.removesuffix("_ATTENTION").lower() for name in kernels)
    dtype = str(rt.dtype).removeprefix("torch.")
    ranks = f"{rt.world_size} rank{'s' * (rt.world_size > 1)}"
    line = f"running on     {rt.device.type}, {dtype}, {ranks}, attention kernels {names}"
    if rt.device.type == "cuda" and not multiplies_bfloat16(rt.device):
        line += "\nnote: this GPU has no bfloat16, so it trains in float32, which takes several "
        line += "times as long as on one that has; --dry-run says how long"
    return line


def note_on_busy_cores(rt: Runtime) -> list[str]:
    """A line where other work leaves fewer cores than torch has threads.

    A small model is many short matrix products. Each ends when its slowest thread does, and a
    thread that waits for a core is slow.
    """
    threads = torch.get_num_threads()
    if rt.device.type != "cpu" or threads == 1 or not hasattr(os, "getloadavg"):  # as on Windows
        return []
    cores = os.cpu_count() or 1
    load, _, _ = os.getloadavg()  # processes that wanted a core in the last minute, as a mean
    if cores - load > threads - 1:
        return []
    return [
        f"note: other work keeps the cores busy ({cores} cores, load {load:.1f}); while it does, a "
        "small model trains faster with OMP_NUM_THREADS=1 before the command"
    ]


def describe_run(training: Training, checkpoint: Checkpoint | None) -> list[str]:
    """The plan of the run, and where its data and its directory are."""
    config, data, run = training.config, training.data, training.run
    lines = plan(
        training.model.config,
        training.rt,
        config.max_steps,
        config.total_batch_tokens,
        config.micro_batch,
    )
    lines.append(
        f"data           {config.data}: {len(data.train):,} training and {len(data.val):,} "
        f"validation tokens ({data.encoding})"
    )
    passes = config.max_steps * config.total_batch_tokens / len(data.train)
    if passes >= 2:
        lines.append(f"               the run reads the training tokens {passes:,.0f} times")
    where = f"run directory  {run.folder}"
    if run.step == config.max_steps:
        where += f", complete with {run.step} steps"
    elif checkpoint:
        where += f", continuing after step {run.step}"
    lines += [where, ""]
    if config.warmup_steps >= config.max_steps:
        lines.append(
            f"note: {config.warmup_steps} steps of warm-up in a run of {config.max_steps}: the "
            "learning rate stays below its peak; --warmup-steps lowers it"
        )
    return lines + note_on_busy_cores(training.rt)


def dry_run(config: TrainConfig, rt: Runtime) -> list[str]:
    """What the run would cost."""
    if Path(config.data).is_dir() and holds_shards(config.data):
        config = replace(config, tokenizer=open_data(config.data).encoding)
    shape = model_config(config)
    length_and_batch = (config.max_steps, config.total_batch_tokens)
    return [
        *plan(shape, rt, *length_and_batch, config.micro_batch),
        *plan_time(shape, rt, *length_and_batch),
    ]


def how_to_go_on(step: int, config: TrainConfig, run: RunDirectory) -> str:
    """The last line of a run that was stopped."""
    if run.last_saved != step:
        return f"stopped after step {step}; this step was not saved, since --save-every is 0"
    command = [*launcher(), "--out", str(run.folder), "--resume"]
    if config.resume:  # its data may lie elsewhere now than where train.json says
        command += ["--data", config.data]
    return f"stopped after step {step}; to go on: {shlex.join(command)}"


def launcher() -> list[str]:
    """The command that this process was started with, up to the script's flags."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return ["torchrun", f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}", "train_gpt2.py"]
    return ["python", "train_gpt2.py"]


def what_next(training: Training) -> list[str]:
    """What can be done with the finished run."""
    config, run = training.config, training.run
    folder = shlex.quote(str(run.folder))
    if not config.save_every:
        return [f"The log and the curves are in {folder}/. No checkpoint: --save-every is 0."]
    lines = [f"Saved in {folder}/: checkpoints, log.jsonl, curves.png. Next:"]
    lines.append(f"  python sample.py --model {folder} --num-samples 3")
    if config.recipe == "first-run" and same_folder(config.data, FIRST_RUN_FOLDER):
        lines.append(f"  python train_gpt2.py --init-from {folder} --data input.txt")
    if training.encoding.name != "bytes":  # such a model knows too few words to be asked
        lines.append(f"  python hellaswag.py --model {folder}")
    if config.hellaswag_every and training.hellaswag_items is None:
        lines.append(
            "HellaSwag was not scored in this run, since its items could not be had when it began. "
            "With a network, the last command fetches them."
        )
    return lines


def evaluate_only(config: TrainConfig, rt: Runtime) -> None:
    """Print loss, perplexity and bits per byte of --init-from on --data; keep nothing.

    Of token shards the first --eval-tokens of the validation split are read, of a text all tokens.
    """
    if not config.init_from:
        raise UserError(
            "--eval-only without --init-from; expected the model to measure; for example "
            "--init-from gpt2"
        )
    with tempfile.TemporaryDirectory() as scratch:
        data, split, what = data_to_measure(config, rt, Path(scratch))
        if split is not data.val:
            config = replace(config, eval_tokens=len(split))
        model = build_model(config, data, rt, None)
        bytes_per_token = token_bytes(get_encoding(data.encoding))
        result = evaluate(model, split, config, rt, bytes_per_token)
    rt.say(
        f"validation loss {result['val_loss']:.4f} nats per token",
        f"perplexity      {math.exp(result['val_loss']):.2f} per token",
        f"bits per byte   {result['bits_per_byte']:.4f}",
        f"measured on     {result['eval_tokens']:,} of the {len(split):,} tokens of {what}, "
        f"in windows of {config.seq_len:,}",
    )


def data_to_measure(
    config: TrainConfig, rt: Runtime, scratch: Path
) -> tuple[TokenData, TokenArray, str]:
    """The data of --eval-only, the part of it to read, and what to call that part."""
    if os.path.isdir(config.data) and holds_shards(config.data):
        data = open_data(config.data)
        return data, data.val, f"the validation split of {config.data}"
    if not config.data:
        raise missing_data()
    text = fineweb.PrepareConfig(
        input=(config.data,), tokenizer=config.tokenizer, out=str(scratch / "text")
    )
    folder = rt.on_main(lambda: fineweb.prepare(text, say=lambda *lines: None))
    data = open_data(folder)
    whole = TokenArray([*data.train.shards, *data.val.shards], ENCODINGS[data.encoding])
    return data, whole, config.data


# ------------------------------------------------------------------------- building the pieces


def load_newest(run: RunDirectory, rt: Runtime) -> Checkpoint | None:
    """The newest checkpoint of a run, on ranks other than 0 without its tensors."""
    found = None

    def load() -> Checkpoint | None:
        nonlocal found
        found = run.load_newest()
        return found and found.without_tensors()

    head = rt.on_main(load)
    return found or head


def prepare_data(config: TrainConfig, rt: Runtime) -> TokenData:
    """Open --data. Where it is text it is tokenised first, by rank 0 for all."""
    if not config.data:
        raise missing_data()
    folder = rt.on_main(prepared_folder, config, rt)
    data = rt.on_all(open_data, folder)
    if data.train.num_windows(config.seq_len) == 0:
        raise UserError(
            f"{config.data}: {len(data.train):,} training tokens; expected at least one window of "
            f"{config.seq_len + 1:,}; use more text or a lower --seq-len"
        )
    if len(data.val) < 2:
        raise UserError(
            f"{config.data}: {len(data.val):,} validation tokens; expected at least 2; use more "
            "text"
        )
    return data


def prepared_folder(config: TrainConfig, rt: Runtime) -> Path:
    """The directory of token shards that --data stands for, made if need be.

    Shards are read where they are. Text is tokenised into data/<name>-<hash>, where the hash is of
    the names and contents of its files. The same text is found there again. Changed text has
    another hash and is tokenised anew, and what was made before stays, for the runs that read it.
    """
    if same_folder(config.data, FIRST_RUN_FOLDER):
        return fineweb.prepare_first_run(rt.say)
    if same_folder(config.data, FINEWEB_EDU_FOLDER) and not Path(config.data).exists():
        raise UserError(
            f"{config.data}: not there; expected the FineWeb-Edu corpus; prepare it with python "
            "fineweb.py, or name other data with --data"
        )
    return fineweb.tokens_for(config.data, config.tokenizer, rt.say)


def missing_data() -> UserError:
    return UserError(
        "--data is missing; expected the text or the token shards to read; for example --data "
        "novel.txt"
    )


def holds_shards(folder: str) -> bool:
    """Whether a folder is a prepared corpus, and not one of texts."""
    names = os.listdir(folder)
    return "manifest.json" in names or any(name.endswith(SUFFIXES) for name in names)


def build_model(
    config: TrainConfig, data: TokenData, rt: Runtime, checkpoint: Checkpoint | None
) -> GPT:
    """The model on its device, in training mode: from a checkpoint, from --init-from, or fresh.

    Rank 0 alone reads weights, and sends them to the others. So all begin with the same ones, and
    another machine need not see a checkpoint.
    """
    torch.manual_seed(config.seed)
    if not (checkpoint or config.init_from):
        return GPT(model_config(config)).to(rt.device)
    model = None

    def read() -> GPTConfig:
        nonlocal model
        if checkpoint:
            saved, folder, weights = checkpoint.config, checkpoint.folder, checkpoint.weights
            build = functools.partial(GPT, model_config(config))
            model = load_model(folder, saved, build, probe(GPT.tiny), weights)
        else:
            model = read_model(config, data, rt, config.init_from)
        return model.config

    shape = rt.on_main(read)
    model = (model or GPT(shape)).to(rt.device).train()
    rt.send_from_main(model.parameters())
    return model


def build_optimizer(model: GPT, config: TrainConfig, ranks: Ranks = ALONE) -> Optimizer:
    """The optimizer that a configuration describes."""
    return make_optimizer(
        model.named_parameters(),
        config.optimizer,
        config.learning_rate,
        config.muon_learning_rate,
        config.weight_decay,
        config.beta1,
        config.beta2,
        ranks,
    )


def read_model(config: TrainConfig, data: TokenData, rt: Runtime, name: str) -> GPT:
    """The model that `name` stands for. Raises UserError unless it fits flags and data."""
    model, encoding, picked = load_model_of(name, config.dropout)
    rt.say(f"weights        {picked}")
    for field in ("n_layer", "n_head", "n_embd"):
        if getattr(config, field) != getattr(model.config, field):
            raise UserError(
                f"{flag(field)} {getattr(config, field)}; expected {getattr(model.config, field)} "
                f"as in {picked}; drop the flag"
            )
    if encoding.name != data.encoding:
        raise UserError(
            f"{config.data}: tokens of the encoding {data.encoding}; expected {encoding.name}, "
            f"which {picked} reads; prepare the data again with fineweb.py --tokenizer "
            f"{encoding.name}"
        )
    if config.seq_len > model.config.block_size:
        raise UserError(
            f"--seq-len {config.seq_len}; expected at most {model.config.block_size}, the "
            f"positions that {picked} has learned; lower it"
        )
    model.crop_context(config.seq_len)
    return model


def model_config(config: TrainConfig) -> GPTConfig:
    """The shape of the model that a configuration describes."""
    return GPTConfig(
        config.n_layer,
        config.n_head,
        config.n_embd,
        config.seq_len,
        ENCODINGS[config.tokenizer],
        config.dropout,
    )


def load_checkpoint(
    checkpoint: Checkpoint,
    model: GPT,
    optimizer: torch.optim.Optimizer,
    guard: SpikeGuard,
    run: RunDirectory,
    data: TokenData,
    rt: Runtime,
) -> None:
    """Set all else back to a checkpoint whose weights the model has already, as rank 0 reads it."""
    state = checkpoint.state
    run.continue_from(checkpoint)
    if state["data"] != data.fingerprint:
        error = UserError(
            f"the data are not those that {checkpoint.folder} was trained on; expected the same "
            "shards, wherever they lie; restore them, name their place with --data, or start a new "
            "run"
        )
        rt.raise_on_all(error)
    if "spikes" in state:  # checkpoints of older versions are without
        guard.load(state["spikes"])
    updates = run.step - guard.left_out

    def read() -> bool:
        load_optimizer_tensors(model, optimizer, checkpoint.moments, updates)
        return bool(checkpoint.moments)

    has_state = rt.on_main(read)  # false before the first update
    if has_state and not rt.is_main:
        load_optimizer_tensors(model, optimizer, blank_tensors(model, optimizer), updates)
    rt.send_from_main(state_tensors(model, optimizer).values())


def check_batch(config: TrainConfig, world_size: int) -> None:
    """Refuse a batch that does not divide among ranks and micro-batches; name sizes that do."""
    sequences = config.sequences_per_step
    if sequences % (config.micro_batch * world_size) == 0:
        if config.deterministic:
            check_tree(sequences // (sequences_at_once(config) * world_size), world_size)
        return
    sizes = []
    if sequences % world_size == 0:
        per_rank = sequences // world_size
        sizes = [str(n) for n in range(1, min(per_rank, 1024) + 1) if per_rank % n == 0]
    expected = f"a multiple of {world_size * config.seq_len:,} tokens a batch"
    if sizes:
        expected = f"--micro-batch one of {', '.join(sizes)}"
    raise UserError(
        f"--micro-batch {config.micro_batch} on {world_size} rank(s) with --total-batch-tokens "
        f"{config.total_batch_tokens:,}, which is {sequences} sequences of {config.seq_len}; "
        f"expected {expected}; change --micro-batch or --total-batch-tokens"
    )


def check_restarts(config: TrainConfig) -> None:
    """Refuse a job that torchrun restarts, and that would then begin a second run."""
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if config.resume or restarts == "0":
        return
    raise UserError(
        f"--max-restarts {restarts} without --resume; expected both: a restarted worker goes on "
        "with the run in --out; add --out and --resume to train_gpt2.py's flags: it starts the "
        "run if there is none yet"
    )


def check_newest_is_on_main(run: RunDirectory, rt: Runtime) -> None:
    """Refuse a run directory that lies on each machine by itself, where rank 0's is behind.

    Rank 0 decides where a run goes on. It would begin anew, or go back, where it was on another
    machine before.
    """
    folders = run_directory.step_directories(run.folder)
    newest = rt.gather(folders[-1].name if folders else "")
    steps = [run_directory.step_number(Path(name)) if name else -1 for name in newest]
    if max(steps) > steps[0]:
        ahead = steps.index(max(steps))
        error = TransientError(
            f"{run.folder}: rank {ahead} sees {newest[ahead]} there, and rank 0 "
            f"{newest[0] or 'no checkpoint'}; expected one directory that all machines see, or the "
            "newest checkpoint with rank 0; name a directory of a shared file system with --out, "
            "or copy the checkpoint"
        )
        rt.raise_on_all(error)


def open_wandb(config: TrainConfig, run: RunDirectory, extras: Extras) -> None:
    """From now on send the log to the Weights & Biases run that belongs to the run directory.

    Without the package the run is refused. Whatever the service does, from a login that is missing
    to a network that is down, the run goes on.
    """
    try:
        import wandb
    except ImportError:
        raise UserError(
            "--wandb: the wandb package is not installed; expected it beside the other packages; "
            "pip install wandb, or drop the flag"
        ) from None
    folder = run.folder
    if (folder / "wandb").is_symlink():
        raise UserError(
            f"{folder / 'wandb'}: a symbolic link; expected the folder that wandb has made in the "
            "run directory; remove the link"
        )
    if os.path.lexists(folder / "wandb" / "settings"):
        raise UserError(
            f"{folder / 'wandb' / 'settings'}: is there; expected no such file in a run: it says "
            "which server gets the log and your key; remove it"
        )
    name = wandb_id(folder / "wandb_id")
    if_it_fails = "nothing is sent to Weights & Biases"

    def send(event: str, step: int, values: dict) -> None:
        with extras.attempt(if_it_fails):
            tracker.log({f"{event}/{key}": value for key, value in values.items()}, step=step)

    with extras.attempt(if_it_fails):
        tracker = wandb.init(
            project="pygpt2",
            name=script.escaped(folder.name),  # which wandb prints
            id=name,
            resume="allow",
            dir=folder,
            config=asdict(config),
        )
        run.listeners.append(send)


def wandb_id(file: Path) -> str:
    """The name under which a continued run goes on, made when the run is first tracked."""
    if not file.exists():
        write_file(file, secrets.token_hex(4).encode())
    found = read_bytes(file, limit=64)
    # A link may have led to a private file, and this is sent.
    if not re.fullmatch(rb"[0-9a-f]{8}", found):
        raise UserError(
            f"{file}: {len(found)} bytes; expected eight hexadecimal digits; remove it, and the "
            "run is tracked under a new name"
        )
    return found.decode()


def spare_garbage_collector() -> None:
    """Exempt what exists now, and lives as long as the run, from Python's garbage collection."""
    gc.collect()
    gc.freeze()


# ------------------------------------------------------------------------------------ progress


class Progress:
    """A bar on a terminal; elsewhere a line at the first step and then every 30 seconds."""

    LINE_SECONDS = 30

    def __init__(self, config: TrainConfig, rt: Runtime, first_step: int):
        self.config = config
        self.rt = rt
        self.validation_loss: float | None = None
        self.peak = peak_flops(rt.device, rt.dtype)
        self.on_terminal = rt.is_main and sys.stderr.isatty()
        self.bar = tqdm(
            total=config.max_steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            disable=not self.on_terminal,
        )
        self.first_step = first_step
        self.losses: list[float] = []  # since the last line
        self.seconds = 0.0  # of training since the start of this process
        self.next_line = 0.0

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info) -> None:
        self.bar.close()

    def step_done(self, step: int, loss: float, seconds: float) -> dict:
        """Show a step; returns its speed for the log."""
        tokens_per_second = self.config.total_batch_tokens / seconds
        self.seconds += seconds
        self.losses.append(loss)
        self.bar.update()
        self.bar.set_postfix_str(f"loss {loss:.4f}, {tokens_per_second:,.0f} tok/s")
        if not self.on_terminal and time.monotonic() >= self.next_line:
            self.rt.say(self.line(step))
            self.losses = []
            self.next_line = time.monotonic() + self.LINE_SECONDS
        return {
            "tokens_per_second": round(tokens_per_second, 1),
            "mfu": self.mfu(tokens_per_second),
        }

    def line(self, step: int) -> str:
        """`step 551/600  loss 2.41 (mean of 42)  val 2.19  19.9k tok/s  eta 0:02`."""
        steps = step - self.first_step
        seconds_per_step = self.seconds / steps
        left = (self.config.max_steps - step) * seconds_per_step
        rate = self.config.total_batch_tokens / seconds_per_step
        loss = sum(self.losses) / len(self.losses)
        parts = [f"step {step}/{self.config.max_steps}", f"loss {loss:.3f}"]
        if len(self.losses) > 1:
            parts[-1] += f" (mean of {len(self.losses)})"
        if self.validation_loss is not None:
            parts.append(f"val {self.validation_loss:.3f}")
        parts.append(f"{rate / 1000:.1f}k tok/s")
        parts.append(f"eta {datetime.timedelta(seconds=round(min(left, 1e10)))}")
        return "  ".join(parts)

    def mfu(self, tokens_per_second: float) -> float | None:
        """Model FLOPs a second over the devices' peak; None where no peak is known."""
        if not self.peak:
            return None
        flops = flops_per_token(model_config(self.config))
        return tokens_per_second * flops / (self.peak * self.rt.world_size)

    def summary(self, elapsed: float) -> list[str]:
        """What is said at the end of a run: time, last validation, memory, utilisation."""
        line = f"Done: {elapsed:,.0f} s of training"
        if self.validation_loss is not None:
            line += f", validation loss {self.validation_loss:.4f} nats per token"
        lines = [line + "."]
        steps = self.config.max_steps - self.first_step
        if steps > 0:
            rate = steps * self.config.total_batch_tokens / self.seconds
            text = f"Peak memory {peak_memory(self.rt.device) / 1e9:.2f} GB"
            text += f", {rate:,.0f} tokens per second"
            if self.peak:
                text += f", {self.mfu(rate):.1%} of the datasheet's peak"
            lines.append(text + ".")
        return lines


# ---------------------------------------------------------------------- the command line, read


def config_of_command_line(args: list[str]) -> tuple[TrainConfig, str]:
    """The configuration of a command line, and one line that says where it comes from.

    All values come from one source, and flags replace single ones. The source is:
    with --resume, the train.json of the run, if there is one;
    with --config, that file;
    else a recipe, with the shape of the model that --init-from names, if it is given.
    """
    source = parse_source_flags(args)
    require_named_run(source.out, source.resume)
    recipe, why = choose_recipe(source)
    out = ""
    if source.resume:
        folder = run_to_continue(source, recipe)
        out = str(folder)
        if run_directory.is_run(folder):
            return config_of_run(folder, source, args), f"continuing {folder}"
        why += f"; there is no run in {folder} yet, so it is started"
    defaults = RECIPES[recipe]
    asks_for_help = "-h" in args or "--help" in args
    if source.config:
        file = Path(source.config)
        if file.is_dir():  # a run stands for its train.json
            file = file / "train.json"
        defaults = read_train_json(file)
        recipe = source.recipe or defaults.recipe
        why = f"with the values of {file}"
    elif source.init_from and not asks_for_help:  # help must not fetch a model
        defaults = shaped_like(defaults, source.init_from)
        rate = defaults.learning_rate
        why += f"; for a model of this size --learning-rate is {rate:g} by default"
    if source.eval_only:  # as many as published figures are measured on
        defaults = replace(defaults, eval_tokens=TrainConfig.eval_tokens)
    defaults = replace(defaults, recipe=recipe, out=out)
    config = parse_flags(TrainConfig, defaults, HELP, args)
    return config, f"recipe {recipe}, {why}"


def config_of_run(folder: Path, source: argparse.Namespace, args: list[str]) -> TrainConfig:
    """The configuration of a run that is continued, with the flags that may change."""
    if source.config:
        raise UserError(
            f"--config with --resume, and there is a run in {folder}; expected one of the two: a "
            "run is continued with its own configuration; leave out --config, or start a new run"
        )
    saved = replace(read_train_json(folder / "train.json"), out=str(folder), resume=True)
    config = parse_flags(TrainConfig, saved, HELP, args)
    refuse_changes(saved, config)
    return config


def parse_source_flags(args: list[str]) -> argparse.Namespace:
    """The flags that say where the other values come from.

    They are looked at first, without any check, because tyro needs the default of every flag before
    it reads the command line. It reads and checks these again, with all the others.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("recipe", "data", "out", "config"):
        parser.add_argument(f"--{name}", nargs="?", default="")
    parser.add_argument("--init-from", "--init_from", nargs="?", default="")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--eval-only", "--eval_only", action="store_true")
    return parser.parse_known_args(args)[0]


def choose_recipe(source: argparse.Namespace) -> tuple[str, str]:
    """The recipe, and why: as asked, or what the other flags and the data that are here suggest."""
    if source.recipe:
        if source.recipe not in RECIPES:
            raise UserError(
                f"--recipe {source.recipe}; expected one of {', '.join(RECIPES)}; choose one of "
                "them"
            )
        return source.recipe, "as asked"
    if source.init_from:
        return "finetune", "because --init-from is given"
    data = source.data or FINEWEB_EDU_FOLDER
    if same_folder(data, FINEWEB_EDU_FOLDER) and Path(FINEWEB_EDU_FOLDER).is_dir():
        return "gpt2", f"because {FINEWEB_EDU_FOLDER}/ is here"
    if source.data:
        return "first-run", f"on {source.data}"
    return "first-run", f"because there is no {FINEWEB_EDU_FOLDER}/ here (fineweb.py makes it)"


def run_to_continue(source: argparse.Namespace, recipe: str) -> Path:
    """--out, or without it the newest of runs/<recipe>, runs/<recipe>-2, …"""
    if source.out:
        return Path(source.out)
    newest = Path("runs", recipe)
    for folder in run_directory.directories_to_try("", recipe):
        if not run_directory.is_run(folder):
            return newest
        newest = folder
    return newest


def read_train_json(file: Path) -> TrainConfig:
    """A saved configuration. Every value must be there, and of its field's type."""
    fields = {field.name: type(field.default) for field in dataclasses.fields(TrainConfig)}
    shape = {}
    for name, kind in fields.items():
        shape[f"{name}?" if name in ADDED_LATER else name] = kind
    values = read_json(file, shape)
    values.pop("started", None)
    values.pop("origin", None)
    unknown = values.keys() - fields.keys()
    if unknown:
        raise UserError(
            f"{file}: has a value {min(unknown)!r}; expected the values that this version writes; "
            "use the version that wrote it, or start a new run"
        )
    # Only the command line says where a run is kept and whether anything is trained.
    never_from_file = {
        "out": "",
        "resume": False,
        "config": "",
        "eval_only": False,
        "dry_run": False,
    }
    try:
        return TrainConfig(**(values | never_from_file))
    except UserError as error:
        raise UserError(
            f"{file}: {str(error).partition(';')[0]}; expected values that make a run; restore it, "
            "or start a new run"
        ) from None


def refuse_changes(saved: TrainConfig, config: TrainConfig) -> None:
    """Refuse flags whose values may not change when a run is continued."""
    changed = []
    for field in dataclasses.fields(TrainConfig):
        old, new = getattr(saved, field.name), getattr(config, field.name)
        if field.name not in FREE_ON_RESUME and new != old:
            changed.append(f"{flag(field.name)} {new} (the run has {old})")
    if changed:
        raise UserError(
            f"{', '.join(changed)}; expected the values that {saved.out} was started with; drop "
            f"the flags, or go on from its weights in a new run, with --init-from {saved.out} and "
            "another --out"
        )


def shaped_like(defaults: TrainConfig, name: str) -> TrainConfig:
    """The recipe with the shape and the encoding of the model to start from.

    Fine-tuning takes a larger learning rate for a smaller model: 3e-5 at 124M parameters, 1e-3 at
    the first run's 0.84M and below, and in between by the power law through these two, which were
    tried.
    """
    model, encoding = run_directory.describe_model(name)
    if defaults.recipe == "finetune":
        size = parameters(model) / parameters(SIZES["gpt2"])
        rate = min(1e-3, float(f"{defaults.learning_rate * size**-0.7:.1g}"))
        defaults = replace(defaults, learning_rate=rate, min_lr=rate / 2)
    return replace(
        defaults,
        n_layer=model.n_layer,
        n_head=model.n_head,
        n_embd=model.n_embd,
        seq_len=min(defaults.seq_len, model.block_size),
        tokenizer=encoding,
    )


if __name__ == "__main__":
    run_script(main, out_of_memory="lower --micro-batch or --seq-len")
