"""Train GPT-2: from scratch or from existing weights, on a CPU, on one GPU, or on many.

    python train_gpt2.py                                     what can be trained here and now
    torchrun --standalone --nproc_per_node=8 train_gpt2.py   GPT-2 124M on eight GPUs
    python train_gpt2.py --init-from gpt2 --data novel.txt   fine-tune OpenAI's weights on your text
    python train_gpt2.py --fork runs/gpt2 --max-steps 40000  train a finished run for longer

Reads token shards (tokens.py). Writes a run directory: train.json, log.jsonl, curves.png and
checkpoints. Ctrl-C finishes the step in hand, saves and exits. The same command with --resume goes
on from there.

In this file: configuration, recipes, the pieces of a step, the loop, what falls on a step, `main`.

Shapes: B sequences per micro-batch, T = seq_len tokens per sequence, W ranks.
"""

if __name__ == "__main__":  # before the imports, which take seconds, so that Ctrl-C ends them too
    from support import script

    script.begin()


import gc
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tiktoken
import torch
import tyro
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fineweb
import hellaswag
from fineweb import FINEWEB_EDU_FOLDER, FIRST_RUN_FOLDER
from model import GPT, SIZES, GPTConfig, KVCache, NextTokenLoss
from sample import load_model, sample_text
from support import launch, plan, report, run_directory
from support.huggingface import load_into
from support.mixture import parse_data
from support.network import check_network
from support.optimizer import (
    Optimizer,
    make_optimizer,
    restore,
    set_learning_rate,
    state_tensors,
)
from support.ranks import ALONE, GradientTree, Ranks
from support.run_directory import Checkpoint, RunDirectory
from support.runtime import Runtime, start
from support.script import (
    Range,
    Stopped,
    StopRequest,
    check_fields,
    require,
    run_script,
)
from support.shards import holds_tokens
from support.spikes import SpikeGuard
from support.trackers import open_trackers
from tokens import (
    ENCODINGS,
    Mixture,
    TokenArray,
    get_encoding,
    open_data,
    token_bytes,
)

# ------------------------------------------------------------------------------- configuration

# What --help says above the flags: the head of this file, without what is for readers of the code.
HELP = (__doc__ or "").partition("\nIn this file")[0]

Count = Annotated[int, Range(1, 2**31)]
Interval = Annotated[int, Range(0, 2**31)]
Positive = Annotated[float, Range(0, 1e9, above=True)]
Share = Annotated[float, Range(0, 1, below=True)]


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run. Each field is a flag, and its comment is the flag's help."""

    # Where the values come from, and where the run is kept.

    # complete configuration that the other flags override: first-run, finetune, gpt2, gpt2-medium,
    # gpt2-large, gpt2-xl, gpt2-fast
    recipe: str = "gpt2"
    # a run, or its train.json, to take all values from; other flags override them
    config: str = ""
    # a run, or one of its checkpoints, to begin a new run from: with its values, weights, moments,
    # step and place in the data; other flags override the values
    fork: str = ""
    # weights alone to start from: a name on the hub, a run, one of its checkpoints, or a Hugging
    # Face directory; empty: random ones
    init_from: str = ""
    # run directory; empty: runs/<recipe>, or runs/<recipe>-2, -3, … if that one holds a run
    out: str = ""
    # continue the run in --out, or without --out the newest of runs/<recipe>, runs/<recipe>-2, …;
    # start one if there is none
    resume: bool = False
    eval_only: bool = False  # measure --init-from on --data, and train nothing
    dry_run: bool = False  # print what the run would cost, and train nothing

    # The data.

    # directory of token shards, or text: files, folders and globs. Text is tokenised once, into
    # data/<name>-<hash of the contents>; changed text is tokenised anew, beside it. Several corpora
    # are mixed by weights: --data edu_fineweb10B=0.7 code=0.3
    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH …")] = (FINEWEB_EDU_FOLDER,)
    # encoding for text that has yet to be tokenised; token shards say themselves what they hold
    tokenizer: Literal["gpt2", "bytes"] = "gpt2"

    # The model.

    n_layer: Count = 12  # transformer blocks
    n_head: Count = 12  # attention heads
    n_embd: Count = 768  # channels
    seq_len: Count = 1024  # tokens per sequence, which is the model's context
    dropout: Share = 0.0  # share of embeddings, attention weights and block outputs set to zero

    # How it learns.

    max_steps: Annotated[int, Range(1, 10**9)] = 19_073  # updates in all, where the schedule ends
    # tokens per update, over all ranks and micro-batches
    total_batch_tokens: Annotated[int, Range(1, 2**28)] = 524_288
    # sequences that go through the model at once on each rank; lower it when memory runs out
    micro_batch: Count = 16
    # what updates the weights; muon: Muon for the blocks' matrices, AdamW for the rest
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: Positive = 6e-4  # AdamW's peak rate, reached at the end of the warm-up
    muon_learning_rate: Positive = 0.02  # Muon's peak; its rate follows AdamW's in proportion
    # how the rate falls after the warm-up; wsd: not at all until --decay-steps before the end
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    decay_steps: Interval = 0  # last updates, in which the rate of wsd falls to zero
    # learning rate that the cosine ends at; the other schedules end at zero
    min_lr: Annotated[float, Range(0, 1e9)] = 6e-5
    warmup_steps: Interval = 715  # updates in which the learning rate grows from zero to its peak
    beta1: Share = 0.9  # AdamW's decay of the mean gradient
    beta2: Share = 0.95  # AdamW's decay of the mean squared gradient
    # decay of matrices and embeddings; biases and norms have none
    weight_decay: Annotated[float, Range(0, 1e9)] = 0.1
    grad_clip: Positive = 1.0  # largest gradient norm; a longer gradient is scaled down to it
    skip_spikes: bool = False  # leave out an update whose loss jumps; without it, only warn
    # seed of the initial weights, of the order of the data, and of dropout
    seed: Annotated[int, Range(0, 2**63 - 1)] = 1337
    deterministic: bool = False  # compute the same bits on 1, 2, 4, 8, … ranks

    # What is reported and kept. An interval of 0 means never.

    eval_every: Interval = 1000  # updates between two validations
    eval_tokens: Count = 10_485_760  # validation tokens read each time, from the start of the split
    hellaswag_every: Interval = 1000  # updates between two HellaSwag scores
    sample_every: Interval = 1000  # updates between two samples
    save_every: Interval = 1000  # updates between two checkpoints
    keep: Count = 2  # number of newest checkpoints that are kept
    keep_best: bool = False  # keep the checkpoint of lowest validation loss too, and load that one
    # send the log to Weights & Biases too (pip install wandb; WANDB_MODE=offline keeps it here)
    wandb: bool = False
    tensorboard: bool = False  # write the log for TensorBoard too (pip install tensorboard)

    # The machine.

    device: str = "auto"  # device to compute on: cuda, mps or cpu; auto: the first that is there
    # dtype of matrix products; auto: bfloat16 where the hardware has it
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = True  # compile the training step with torch.compile

    def __post_init__(self):
        check_fields(self)
        nearest = max(1, round(self.total_batch_tokens / self.seq_len)) * self.seq_len
        require(
            self.total_batch_tokens % self.seq_len == 0,
            f"--total-batch-tokens {self.total_batch_tokens}; expected a multiple of --seq-len "
            f"{self.seq_len}; for example {nearest}",
        )
        room = self.max_steps - self.warmup_steps
        require(
            self.schedule != "wsd" or room > 0,
            f"--schedule wsd with --warmup-steps {self.warmup_steps} of --max-steps "
            f"{self.max_steps}; expected fewer, since its decay follows the warm-up; lower "
            "--warmup-steps",
        )
        require(
            self.schedule != "wsd" or 1 <= self.decay_steps <= room,
            f"--schedule wsd with --decay-steps {self.decay_steps}; expected 1 to {room}, the "
            "steps after the warm-up; a fifth of --max-steps is usual",
        )
        require(
            self.schedule != "cosine" or self.min_lr <= self.learning_rate,
            f"--min-lr {self.min_lr}; expected at most --learning-rate {self.learning_rate}; a "
            "tenth of it is usual",
        )

    @property
    def sequences_per_step(self) -> int:
        """Sequences per update, over all ranks and micro-batches."""
        return self.total_batch_tokens // self.seq_len

    def shape(self, encoding: str) -> GPTConfig:
        """The shape of the model that is trained, for tokens of this encoding."""
        sizes = (self.n_layer, self.n_head, self.n_embd, self.seq_len)
        return GPTConfig(*sizes, ENCODINGS[encoding], self.dropout)


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
        data=(FIRST_RUN_FOLDER,),
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
        data=(),
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


# ---------------------------------------------------------------------------- the pieces of a step


def learning_rate(step: int, config: TrainConfig) -> float:
    """AdamW's learning rate of the update that follows `step` updates, 0 … max_steps - 1.

    Muon's rate is this one times muon_learning_rate / learning_rate, at every step.

    1) Warm-up: the rate grows linearly and reaches its peak with update `warmup_steps`.
    2) wsd: the peak, and over the last decay_steps a straight line down to zero (MiniCPM 2024,
       arXiv 2404.06395; Hägele et al. 2024, arXiv 2405.18392).
    3) linear: a straight line down to zero.
    4) cosine: half a cosine wave down to min_lr (GPT-3, appendix B).
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    steps_left = config.max_steps - step
    if config.schedule == "wsd":
        return config.learning_rate * min(1.0, steps_left / config.decay_steps)
    left = steps_left / max(1, config.max_steps - config.warmup_steps)  # from 1 down to 0
    if config.schedule == "linear":
        return config.learning_rate * left
    height = 0.5 * (1 - math.cos(math.pi * left))  # from 1 down to 0
    return config.min_lr + height * (config.learning_rate - config.min_lr)


def step_batch(
    data: Mixture, config: TrainConfig, first_sample: int, rank: int, world_size: int
) -> Tensor:
    """What `rank` reads of the step that begins with a sample, int64 (sequences_per_step / W, T+1).

    A step takes the next sequences_per_step samples, and the ranks divide them into equal,
    consecutive parts. tokens.py says which windows these samples are.
    """
    count = config.sequences_per_step // world_size
    first = first_sample + rank * count
    return torch.from_numpy(data.windows_of_samples(first, count, config.seq_len, config.seed))


def step_batches(
    data: Mixture, config: TrainConfig, first_sample: int, rt: Runtime
) -> Iterator[Tensor]:
    """This rank's batches from a sample on, each read while the one before is used."""

    def read(sample: int) -> Tensor:
        batch = step_batch(data, config, sample, rt.rank, rt.world_size)
        return batch.pin_memory() if rt.device.type == "cuda" else batch

    samples = itertools.count(first_sample, config.sequences_per_step)
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as background:
        upcoming = background.submit(read, next(samples))
        while True:
            batch = upcoming.result()
            upcoming = background.submit(read, next(samples))
            yield batch


def make_loss_function(model: GPT, config: TrainConfig, rt: Runtime) -> nn.Module:
    """The module that training calls: `loss_fn(idx, targets)` is the loss of a micro-batch.

    1) NextTokenLoss runs the model and computes the loss.
    2) With several ranks, DDP is around it: in a backward pass it replaces each gradient by its
       mean over the ranks, so that all copies of the model make the same update. (FSDP would take
       its place. Then `save`, `build` and `restore` have to gather and divide weights and moments.)
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
        # After its first backward pass DDP regroups its buckets of gradients, and the last bits of
        # sums depend on them. Without these passes on zeros that would happen after each resume.
        zeros = torch.zeros(config.micro_batch, config.seq_len + 1, dtype=torch.long)
        for _ in range(2):
            micro_batch_loss(loss_fn, zeros, config, rt, number=0).backward()
        model.zero_grad(set_to_none=False)
    return loss_fn


def build_optimizer(model: GPT, config: TrainConfig, ranks: Ranks = ALONE) -> Optimizer:
    """AdamW for all parameters, or Muon for the blocks' matrices and AdamW for the rest.

    Muon takes the weights of c_attn (as three matrices), c_proj and c_fc in all blocks, and several
    ranks share its work. The rest are embeddings, positions, biases and layer norms.
    """
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


def micro_batch_loss(
    loss_fn: nn.Module, windows: Tensor, config: TrainConfig, rt: Runtime, number: int
) -> Tensor:
    """The mean loss of the windows, int64 (B, T + 1), of which targets are the last T tokens.

    number: the index of this micro-batch among all of the run. With 4 micro-batches a step, those
    of step 10 are 40 to 43, and rank 1 of 2 has 42 and 43. It seeds dropout's noise, which so does
    not depend on the number of ranks. Another --micro-batch draws other noise.
    """
    if config.dropout:
        torch.manual_seed((config.seed + 1_000_003 * number) % 2**63)
    windows = windows.to(rt.device, non_blocking=True)
    with rt.autocast(), rt.attention(config.seq_len):
        return loss_fn(windows[:, :-1], windows[:, 1:])


def train_step(
    loss_fn: nn.Module,
    optim: Optimizer,
    batch: Tensor,
    config: TrainConfig,
    rt: Runtime,
    step: int = 0,
    guard: SpikeGuard | None = None,
) -> dict[str, Tensor]:
    """One update from this rank's windows, int64 (sequences_per_step / W, T + 1).

    Returns scalars on the device, the same on every rank: the loss of the global batch before the
    update, in nats per token, and the norm of its gradient before clipping. A scalar that is added
    is logged, sent to trackers, and plotted by its name. The host waits for the device only where
    `guard` has to leave out the update of a loss that jumps (--skip-spikes).
    """
    micro_batches = batch.split(config.micro_batch)
    first_number = (step * rt.world_size + rt.rank) * len(micro_batches)
    parameters = [p for group in optim.param_groups for p in group["params"]]
    tree = GradientTree(parameters, rt) if config.deterministic else None
    # DDP takes the mean over ranks, so it divides by their number. The tree only adds.
    divisor = len(micro_batches) * (rt.world_size if tree else 1)
    loss = torch.zeros((), device=rt.device)
    # 1) Each micro-batch adds its part to p.grad.
    for i, windows in enumerate(micro_batches):
        # The ranks' gradients meet in the last backward pass alone: there DDP takes the mean of
        # what each rank has added up. (A compiled loss_fn hands the attribute on to DDP.)
        loss_fn.require_backward_grad_sync = i == len(micro_batches) - 1
        part = micro_batch_loss(loss_fn, windows, config, rt, first_number + i) / divisor
        part.backward()
        loss += part.detach()
        if tree:
            tree.take(part)  # with the gradients that it has left in p.grad
    loss = tree.finish() if tree else rt.sum(loss) / rt.world_size
    # 2) Every rank holds the gradient of the mean loss of the global batch. It is clipped.
    gradient_norm = nn.utils.clip_grad_norm_(parameters, config.grad_clip)
    # 3) The weights are updated, the same on every rank.
    if guard is None or not guard.leaves_out(loss):
        optim.step()  # an average of weights would follow; `save`, `build`, `validate` need it too
    # DDP keeps gradients in its buckets, so they are set to zero there. One rank frees them.
    optim.zero_grad(set_to_none=rt.world_size == 1)
    return {"loss": loss, "grad_norm": gradient_norm}


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

    Returns val_loss in nats per token, bits_per_byte, and the number of tokens predicted. Batch i
    is read by rank i % W, so any number of ranks reads the same tokens. `between_batches` is
    called equally often on every rank, and may raise to end the evaluation.
    """
    was_training = model.training
    model.eval()
    loss_fn = NextTokenLoss(model)
    compiled_loss_fn = rt.compile(loss_fn, config.seq_len) if config.compile else loss_fn
    batches = evaluation_batches(data, config)
    # Nats, tokens and bytes of each batch: zeros in a rank's rows of batches that others read.
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
        model.train(was_training)
    nats, tokens, text_bytes = rt.sum(results).sum(dim=0).tolist()
    return {
        "val_loss": nats / tokens,
        "bits_per_byte": nats / math.log(2) / max(text_bytes, 1),
        "eval_tokens": int(tokens),
    }


def evaluation_batches(data: TokenArray, config: TrainConfig) -> list[Callable[[], Tensor]]:
    """What an evaluation reads, in order: functions that return windows, int64 (B, up to T + 1)."""
    T = config.seq_len
    tokens = min(config.eval_tokens, len(data) - 1)  # tokens to predict
    full_windows = tokens // T

    def read_windows(first: int) -> Tensor:
        last = min(first + config.micro_batch, full_windows)
        return torch.from_numpy(data.windows(np.arange(first, last), T))

    def read_rest() -> Tensor:
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
    data: Mixture
    encoding: tiktoken.Encoding
    model: GPT  # the plain one, neither compiled nor distributed
    optimizer: Optimizer
    guard: SpikeGuard
    run: RunDirectory  # each rank has one; what returns a value is asked on rank 0 (rt.on_main)
    first_sample: int  # the first that this process reads
    side_work: report.SideWork
    stop: StopRequest
    hellaswag_items: list[hellaswag.Item] | None


class AllRanksStop(BaseException):
    """One rank has been signalled, or rank 0 could not write, and every rank has heard of it.

    A signal only makes StopRequest note its number. The ranks compare these numbers at the head of
    the loop and between the batches of an evaluation. Then all save, and end with that signal's
    exit code. It is no Exception, so that no side work can lose it.
    """


def train(training: Training) -> None:
    """Train from the step that the run stands at to max_steps.

    Eval, sample and checkpoint of step s are of the weights after s updates. The log's train line
    of step s has the loss before update s. On a GPU that line is written when the next update has
    been launched, so that the GPU never waits. A loss or gradient that is not finite ends the run
    there, before any save.
    """
    config, rt, run = training.config, training.rt, training.run
    loss_fn = make_loss_function(training.model, config, rt)
    batches = step_batches(training.data, config, training.first_sample, rt)
    # What exists now lives as long as the run: Python's garbage collection need not look at it.
    gc.collect()
    gc.freeze()
    step = run.step
    sizes = training.model.config
    with training.stop, report.TrainingProgress(config, sizes, run, rt) as progress:
        updates = report.UpdateLog(run, training.guard, progress, rt)
        try:
            # The last round, at max_steps, only saves and reports.
            for step in range(run.step, config.max_steps + 1):
                stop_if_asked(training)
                due = [event for event in EVENTS if is_due(event, step, training)]
                if due:
                    updates.finish()
                    for event in due:
                        EVENTS[event](step, training)
                    updates.restart_clock()
                if step == config.max_steps:
                    break
                rate = learning_rate(step, config)
                set_learning_rate(training.optimizer, rate)
                figures = train_step(
                    loss_fn, training.optimizer, next(batches), config, rt, step, training.guard
                )
                updates.add(step + 1, rate, figures)
        except AllRanksStop:
            updates.finish()
            stop(step, training)
    rt.on_main(run.wait_for_commit)
    # A crash may have come between the last save and its pruning.
    rt.on_main(run_directory.prune, run.folder, config.keep, trunk_steps(config))
    rt.say("", *progress.summary())


def stop(step: int, training: Training) -> None:
    """Save this step before anything else that is due, and end with the signal's exit code.

    What else is due at the step happens when the run is continued.
    """
    rt, run = training.rt, training.run
    rt.on_main(run.wait_for_commit)  # raises what rank 0 could not write
    if training.config.save_every:
        save(step, training)
        rt.on_main(run.wait_for_commit)
    message = report.how_to_go_on(step, training.config, run)
    rt.say(message)
    raise Stopped(rt.max_over_ranks(training.stop.signum), message) from None


def stop_if_asked(training: Training) -> None:
    """Raise AllRanksStop on every rank once one is signalled, or rank 0 could not write."""
    here = max(training.stop.signum, int(training.run.has_failed()))
    if training.rt.max_over_ranks(here):
        raise AllRanksStop


# ------------------------------------------------------------------------ what falls on a step


def trunk_steps(config: TrainConfig) -> set[int]:
    """The step at which a wsd schedule begins to fall. Runs of other lengths fork from there."""
    return {config.max_steps - config.decay_steps} if config.schedule == "wsd" else set()


def is_due(event: str, step: int, training: Training) -> bool:
    """Whether an event falls on this step: at multiples of its interval, and after the last update.

    Before the first update only validation does. A continued run repeats nothing that the log has.
    """
    config = training.config
    every = getattr(config, f"{event}_every")
    if every == 0 or (step == 0 and event != "eval"):
        return False
    if event == "hellaswag" and training.hellaswag_items is None:  # they could not be had
        return False
    if training.run.has_logged(event, step):
        return False
    is_trunk = event == "save" and step in trunk_steps(config)
    return step % every == 0 or step == config.max_steps or is_trunk


def save(step: int, training: Training) -> None:
    """Save the checkpoint of this step, unless it is there already.

    Training waits until rank 0 has copied weights and moments to the CPU; the other ranks wait in
    `on_main`. Writing goes on beside the next steps: all files under another name, then a manifest
    with their hashes; the directory is renamed last. A checkpoint is valid as long as each file is
    as its manifest says, and --resume takes the newest valid one.
    """
    config, rt, run = training.config, training.rt, training.run
    if step == run.last_saved:
        return
    model_config, weights = training.model.saved_form(encoding=training.encoding.name)
    moments = state_tensors(training.model, training.optimizer)
    rt.check_equal([*weights.values(), *moments.values()], f"step {step}: weights or moments")
    state = {
        "data": training.data.fingerprint,
        "samples": training.first_sample + (step - run.step) * config.sequences_per_step,
        "spikes": training.guard.state(),
    }
    spare = trunk_steps(config)
    encoding = training.encoding
    rt.on_main(
        run.save,
        step,
        model_config,
        weights,
        moments,
        encoding,
        state,
        config.keep,
        spare,
    )
    run.last_saved = step


def validate(step: int, training: Training) -> None:
    """Log the validation loss; keep the checkpoint if it is the best and the recipe wants it.

    Of several corpora the loss is the mean by their weights, and each one's is logged beside it.
    """
    config, rt, run = training.config, training.rt, training.run
    result = {}
    of_corpora = {}
    shares = training.data.shares
    for (name, corpus), share in zip(training.data.corpora.items(), shares, strict=True):
        found = evaluate(
            training.model,
            corpus.val,
            config,
            rt,
            token_bytes(training.encoding),
            between_batches=lambda: stop_if_asked(training),
        )
        for key, value in found.items():
            part = value if key == "eval_tokens" else share * value
            result[key] = result.get(key, 0) + part
        of_corpora[f"val_loss {name}"] = found["val_loss"]
    if len(of_corpora) > 1:
        result |= of_corpora
    loss = result["val_loss"]
    # The best is marked before the result is logged. A run that is killed in between validates this
    # step again when it is continued, and finds the same.
    if config.keep_best and step > 0 and loss < rt.on_main(run.lowest_validation_loss):
        save(step, training)
        rt.on_main(run.mark_best, step, loss)
    run.log("eval", step, **result)
    rt.say(report.validation_line(step, result))
    if rt.is_main:
        run.in_background(training.side_work.draw_curves)


def score_hellaswag(step: int, training: Training) -> None:
    """Log the HellaSwag score, which all ranks compute together."""
    with training.side_work.may_fail("HellaSwag is not scored"):
        result = hellaswag.evaluate(
            training.model,
            training.encoding,
            training.hellaswag_items,
            rt=training.rt,
            between_batches=lambda: stop_if_asked(training),
        )
        values = {"acc": result.acc, "acc_norm": result.acc_norm, "items": result.items}
        training.run.log("hellaswag", step, **values)
        training.rt.say(
            f"step {step:>6}  HellaSwag acc {result.acc:.4f}, acc_norm {result.acc_norm:.4f} "
            f"on {result.items:,} items"
        )


def write_sample(step: int, training: Training) -> None:
    """Log a text that the model writes from nothing, the same seed each time."""
    training.rt.on_main(log_sample, step, training)


def log_sample(step: int, training: Training) -> None:
    rt = training.rt
    generator = torch.Generator(rt.device).manual_seed(training.config.seed)
    with training.side_work.may_fail("no sample is written"), rt.autocast():
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


# In the order in which they happen. One of your own needs an entry, a flag <name>_every, and to log
# an event of that name.
EVENTS = {
    "eval": validate,  # first, so that a checkpoint's card has its loss
    "save": save,
    "hellaswag": score_hellaswag,
    "sample": write_sample,
}


# ------------------------------------------------------------------------------------------- main


def main(args: list[str] | None = None) -> None:
    """Configuration, runtime, run directory, data, model and optimizer, loop."""
    args = sys.argv[1:] if args is None else args
    config, why = launch.configuration(TrainConfig, RECIPES, HELP, args)
    rt = start(config.device, config.dtype)
    launch.check_agreement(config, rt)
    if config.eval_only:
        return measure(config, rt)
    rt.say(*why, report.runtime_line(rt, config.seq_len))
    launch.check_batch(config, rt.world_size)
    if config.dry_run:
        encoding = launch.encoding_of_data(config)
        sizes = config.shape(encoding)
        with torch.device("meta"):
            num_parameters = GPT(sizes).num_parameters()
        rt.say(*plan.dry_run(sizes, num_parameters, rt, config))
        return
    with run_directory.opened(
        config.out, config.recipe, config.resume, config.total_batch_tokens, rt
    ) as run:
        data = load_data(config, rt)
        training = build(config, data, run, rt)
        rt.say(*report.before(config, training.model, data, run, rt))
        train(training)
        rt.say(*report.what_next(config, run, data.encoding))


MISSING_DATA = "--data is missing; expected text or token shards; for example --data novel.txt"


def load_data(config: TrainConfig, rt: Runtime) -> Mixture:
    """Open the corpora of --data. Where one is text it is tokenised first, by rank 0 for all."""
    require(any(config.data), MISSING_DATA)
    corpora, weights = {}, []
    for paths, weight in parse_data(config.data):
        folder = rt.on_main(fineweb.tokens_for, paths, config.tokenizer, rt.say)
        corpora[" ".join(paths)] = rt.on_all(open_data, folder)
        weights.append(weight)
    for name, corpus in corpora.items():
        require(
            corpus.train.num_windows(config.seq_len) > 0 and len(corpus.val) > 1,
            f"{name}: {len(corpus.train):,} tokens to train on and {len(corpus.val):,} to "
            f"validate; expected at least {config.seq_len + 1:,} and 2; use more text or a lower "
            "--seq-len",
        )
    data = Mixture(corpora, weights)
    rt.same_on_all({"the contents of --data": data.fingerprint}, "the same shards on every rank")
    return data


def build(config: TrainConfig, data: Mixture, run: RunDirectory, rt: Runtime) -> Training:
    """All that a run needs, as it is at the step where the run goes on.

    Rank 0 alone reads checkpoints and weights, and sends them to the others.
    """
    torch.manual_seed(config.seed)
    model = GPT(config.shape(data.encoding)).to(rt.device)
    optim = build_optimizer(model, config, rt)
    guard = SpikeGuard(config.skip_spikes)
    checkpoint = rt.on_main(find_checkpoint, config, run, share=False)  # None on other ranks
    rt.on_main(load_weights, model, checkpoint, config, data.encoding, rt)
    rt.send_from_main(model.state_dict().values())
    # The other ranks hear of the checkpoint; its tensors stay on rank 0, and `restore` sends them.
    found = rt.broadcast(checkpoint and checkpoint.without_tensors())
    if found is None:
        rt.on_all(check_network, GPT, NextTokenLoss, KVCache)
        rt.on_main(run.begin, launch.saved_values(config), rt.device)
        first_sample = 0
    else:
        guard.load(found.state.get("spikes"))
        moments = checkpoint.moments if checkpoint else None
        updates_made = found.step - guard.left_out
        restore(model, optim, moments, updates_made, rt)
        first_sample = go_on(found, config, data, run, rt)
    trackers = [name for name in ("wandb", "tensorboard") if getattr(config, name)]
    sends = rt.on_main(open_trackers, trackers, run.folder, asdict(config), run.step, share=False)
    run.listeners += sends or []
    return Training(
        config=config,
        rt=rt,
        data=data,
        encoding=get_encoding(data.encoding),
        model=model,
        optimizer=optim,
        guard=guard,
        run=run,
        first_sample=first_sample,
        side_work=report.SideWork(run, rt),
        stop=StopRequest(),
        hellaswag_items=hellaswag.find_items(rt) if config.hellaswag_every else None,
    )


def go_on(
    found: Checkpoint, config: TrainConfig, data: Mixture, run: RunDirectory, rt: Runtime
) -> int:
    """Set the run to a checkpoint's step; returns the sample that it reads next.

    A run that is continued has cut its log.jsonl back to that step, since what came after it
    happens again. A fork is a new run: its log begins with the other run's lines up to that step.
    It reads on where that run stood, or other data from their first sample.
    """
    first_sample = launch.next_sample(found, config, data.fingerprint, run, rt)
    begins_a_fork = not rt.on_main(run_directory.is_run, run.folder)
    if begins_a_fork:
        origin = found.as_origin(first_sample)
        rt.on_main(run.begin, launch.saved_values(config), rt.device, origin)
    run.continue_from(found)
    if begins_a_fork:
        rt.on_main(say_seam, config, run)
    return first_sample


def find_checkpoint(config: TrainConfig, run: RunDirectory) -> Checkpoint | None:
    """The run's own newest valid checkpoint, else the one that it is forked from, else None."""
    own = run.load_newest() if run_directory.is_run(run.folder) else None
    if own or not config.fork:
        return own
    return run_directory.checkpoint_of(Path(config.fork), run.say)


def say_seam(config: TrainConfig, run: RunDirectory) -> None:
    """Say what the learning rate does where a fork begins."""
    parent = launch.read_train_json(TrainConfig, launch.train_json(config.fork))
    before = learning_rate(max(0, run.step - 1), parent)
    run.say(f"learning rate  {before:.1e} → {learning_rate(run.step, config):.1e}")


def load_weights(
    model: GPT, checkpoint: Checkpoint | None, config: TrainConfig, encoding: str, rt: Runtime
) -> None:
    """Put the weights of a checkpoint, or of --init-from, into the model. Else fresh ones stay.

    encoding: of the data, which --init-from must have too.
    """
    if checkpoint:
        load_into(model, checkpoint.folder, checkpoint.config, checkpoint.weights)
        rt.say(f"weights        {checkpoint.folder}")
    elif config.init_from:
        found, its_encoding, picked = load_model(config.init_from)
        launch.check_fits(config, found.config, its_encoding.name, encoding, picked)
        found.crop_context(config.seq_len)
        model.load_state_dict(found.state_dict())
        rt.say(f"weights        {picked}")


def measure(config: TrainConfig, rt: Runtime) -> None:
    """Print loss, perplexity and bits per byte of --init-from on --data; keep nothing.

    Of token shards the first --eval-tokens of the validation split are read, of a text all tokens.
    """
    require(
        bool(config.init_from),
        "--eval-only without --init-from; expected the model to measure; for example "
        "--init-from gpt2",
    )
    require(any(config.data), MISSING_DATA)
    corpora = parse_data(config.data)
    require(len(corpora) == 1, "--eval-only with several corpora; expected one; name one alone")
    paths, _ = corpora[0]
    folder = rt.on_main(fineweb.tokens_for, paths, config.tokenizer, rt.say)
    corpus = rt.on_all(open_data, folder)
    name, split, what = "validation loss", corpus.val, "the validation split"
    is_text = not all(map(holds_tokens, paths))
    if is_text:
        name, split, what = "loss", corpus.whole, "all tokens"
        config = replace(config, eval_tokens=len(split))
    require(len(split) > 1, f"{' '.join(paths)}: {len(split)} tokens; expected 2 or more; use more")
    model = GPT(config.shape(corpus.encoding)).to(rt.device)
    rt.on_main(load_weights, model, None, config, corpus.encoding, rt)
    rt.send_from_main(model.state_dict().values())
    result = evaluate(model, split, config, rt, token_bytes(get_encoding(corpus.encoding)))
    rt.say(
        f"{name:<15} {result['val_loss']:.4f} nats per token",
        f"perplexity      {math.exp(result['val_loss']):.2f} per token",
        f"bits per byte   {result['bits_per_byte']:.4f}",
        f"measured on     {result['eval_tokens']:,} of the {len(split):,} tokens of "
        f"{' '.join(config.data)}, {what}, in windows of {config.seq_len:,}",
    )
    if is_text:
        rt.say(f"its validation split alone: --data {folder}")


if __name__ == "__main__":
    run_script(main, out_of_memory="lower --micro-batch or --seq-len")
