"""Train GPT-2: from scratch or from existing weights, on a CPU, one GPU, or many under torchrun.

    python train_gpt2.py                                        # what can be trained here and now
    torchrun --standalone --nproc_per_node=8 train_gpt2.py      # GPT-2 124M on FineWeb-Edu (run fineweb.py first)
    python train_gpt2.py --init-from gpt2 --data novel.txt      # fine-tune OpenAI's weights on your text

Reads token shards (tokens.py), writes a run directory (checkpoint.py): train.json, log.jsonl, curves.png, step_000500/.

Shapes: B sequences per micro-batch, T = seq_len tokens per sequence, W ranks.
"""

import contextlib
import gc
import hashlib
import itertools
import json
import math
import os
import secrets
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import fineweb
import hellaswag
import run_directory
from cli import Stopped, StopRequest, UserError, parse_flags, run_script
from files import locked
from model import GPT, GPTConfig, NextTokenLoss
from plan import flops_per_token, plan, plan_time
from plot import draw_curves
from runtime import Runtime, peak_flops, start
from sample import sample_text
from tokens import (
    ENCODINGS,
    TokenArray,
    TokenData,
    get_encoding,
    open_data,
    token_bytes,
    training_windows,
)

FINEWEB_EDU = "edu_fineweb10B"  # where fineweb.py puts the 10B-token sample
FIRST_RUN = "data/first-run"  # where fineweb.prepare_first_run() puts its corpus


# ---------------------------------------------------------------------------------------------------- configuration

# The flags, in the boxes of --help.


@dataclass(frozen=True)
class General:
    recipe: str = "gpt2"  # the complete configuration that the other flags override: first-run, gpt2, gpt2-medium, gpt2-large, gpt2-xl, finetune
    data: str = FINEWEB_EDU  # directory of token shards, or text, jsonl or parquet (a file or a glob), which is prepared once
    tokenizer: Literal["gpt2", "bytes"] = (
        "gpt2"  # encoding for text that has yet to be prepared; prepared data has its own
    )
    init_from: str = ""  # start from these weights: hub name, run, step or Hugging Face directory; empty: from random ones
    out: str = ""  # run directory; empty: runs/<recipe>, with -2, -3, ... when taken
    resume: bool = False  # continue the run in --out if there is one
    eval_only: bool = False  # measure validation loss, perplexity and bits per byte of --init-from on --data, and stop
    dry_run: bool = False  # print the plan and its cost, and stop


@dataclass(frozen=True)
class Model:
    n_layer: int = 12  # transformer blocks
    n_head: int = 12  # attention heads
    n_embd: int = 768  # channels
    seq_len: int = 1024  # tokens per sequence, the model's context
    dropout: float = 0.0  # on embeddings, attention weights and residual branches


@dataclass(frozen=True)
class Optimization:
    max_steps: int = 19_073  # updates in all: the end of the run and of its learning-rate schedule
    total_batch_tokens: int = 524_288  # tokens per update, over all ranks and micro-batches
    micro_batch: int = 16  # sequences that go through the model at once on each rank; lower it when memory runs out
    learning_rate: float = 6e-4  # peak, reached after the warm-up
    min_lr: float = 6e-5  # where the cosine ends
    warmup_steps: int = 715  # updates of linear warm-up
    weight_decay: float = 0.1  # on matrices and embeddings only
    grad_clip: float = 1.0  # largest gradient norm; longer gradients are scaled down
    seed: int = 1337  # of weights, data order and dropout


@dataclass(frozen=True)
class Reporting:
    eval_every: int = 250  # updates between validations (intervals: 0 means never)
    eval_tokens: int = 10_485_760  # validation tokens read each time, from the start of the split
    hellaswag_every: int = 1000  # updates between HellaSwag scores
    sample_every: int = 1000  # updates between samples
    save_every: int = 1000  # updates between checkpoints
    keep: int = 2  # newest checkpoints kept
    keep_best: bool = False  # keep the checkpoint of lowest validation loss too, and prefer it when the run is loaded
    wandb: bool = False  # send the log to Weights & Biases too (pip install wandb; WANDB_MODE=offline keeps it here)


@dataclass(frozen=True)
class Machine:
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: Literal["auto", "float32", "bfloat16"] = (
        "auto"  # of matrix products; auto: bfloat16 where the hardware has it
    )
    compile: bool = True  # torch.compile the training step


@dataclass(frozen=True)
class TrainConfig(
    Machine, Reporting, Optimization, Model, General
):  # fields are inherited from right to left
    def __post_init__(self):
        for name in (
            "n_layer",
            "n_head",
            "n_embd",
            "seq_len",
            "max_steps",
            "total_batch_tokens",
            "micro_batch",
            "eval_tokens",
            "keep",
        ):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in (
            "eval_every",
            "hellaswag_every",
            "sample_every",
            "save_every",
            "warmup_steps",
            "weight_decay",
            "min_lr",
        ):
            self._require(name, 0 <= getattr(self, name) < math.inf, "0 or more")
        self._require("learning_rate", 0 < self.learning_rate < math.inf, "a positive number")
        self._require("grad_clip", 0 < self.grad_clip < math.inf, "a positive number")
        self._require("dropout", 0 <= self.dropout < 1, "a number in [0, 1)")
        self._require("seed", 0 <= self.seed < 2**63, "0 or more, below 2^63")
        if self.total_batch_tokens % self.seq_len:
            near = max(1, round(self.total_batch_tokens / self.seq_len)) * self.seq_len
            raise UserError(
                f"--total-batch-tokens {self.total_batch_tokens}",
                expected=f"a multiple of --seq-len {self.seq_len}",
                remedy=f"for example {near}",
            )

    def _require(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(self, name)}",
                expected=expected,
                remedy="change the flag",
            )

    @property
    def sequences_per_step(self) -> int:
        return self.total_batch_tokens // self.seq_len


# Learning rates, batches and warm-up of GPT-2's sizes: GPT-3 paper, table 2.1 and appendix B; 10B tokens each.
RECIPES = {
    "first-run": TrainConfig(
        recipe="first-run",
        data=FIRST_RUN,
        tokenizer="bytes",
        n_layer=4,
        n_head=4,
        n_embd=128,
        seq_len=128,
        max_steps=4_200,
        total_batch_tokens=1024,
        micro_batch=8,
        learning_rate=4e-3,
        min_lr=1e-4,
        warmup_steps=200,
        eval_every=600,
        eval_tokens=131_072,
        hellaswag_every=0,
        sample_every=2100,
        save_every=2100,
        compile=False,
    ),
    "gpt2": TrainConfig(),
    "gpt2-medium": TrainConfig(
        recipe="gpt2-medium",
        n_layer=24,
        n_head=16,
        n_embd=1024,
        micro_batch=8,
        learning_rate=3e-4,
        min_lr=3e-5,
    ),
    "gpt2-large": TrainConfig(
        recipe="gpt2-large",
        n_layer=36,
        n_head=20,
        n_embd=1280,
        micro_batch=2,
        learning_rate=2.5e-4,
        min_lr=2.5e-5,
    ),
    "gpt2-xl": TrainConfig(
        recipe="gpt2-xl",
        n_layer=48,
        n_head=25,
        n_embd=1600,
        micro_batch=4,
        learning_rate=2e-4,
        min_lr=2e-5,
        max_steps=9_536,
        total_batch_tokens=1_048_576,
        warmup_steps=358,
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
}

# What may differ when a run is resumed; every other flag would change what is learned.
FREE_ON_RESUME = {
    "out",
    "resume",
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


def read_config(args: list[str]) -> tuple[TrainConfig, str]:
    """The configuration, and one line on where it comes from: recipe, then a resumed run's train.json, then flags."""
    import tyro

    # First only what decides on the defaults: the other flags are read, and judged, with them.
    given, _ = tyro.cli(
        General,
        default=General(recipe="", data=""),
        args=[a for a in args if a not in ("-h", "--help")],
        return_unknown_args=True,
    )
    if given.recipe:
        recipe, why = given.recipe, "as asked"
    elif given.init_from:
        recipe, why = "finetune", "because --init-from is given"
    elif (given.data or FINEWEB_EDU) == FINEWEB_EDU and Path(FINEWEB_EDU).is_dir():
        recipe, why = "gpt2", f"because {FINEWEB_EDU}/ is here"
    else:
        recipe, why = (
            "first-run",
            f"on {given.data}"
            if given.data
            else f"because there is no {FINEWEB_EDU}/ here (fineweb.py makes it)",
        )
    if recipe not in RECIPES:
        raise UserError(
            f"--recipe {recipe}",
            expected=f"one of {', '.join(RECIPES)}",
            remedy="choose one of them",
        )
    base = RECIPES[recipe]
    out = Path(given.out or f"runs/{recipe}")
    if given.resume and not given.out:
        out = taken(out)[-1] if taken(out) else out
    saved = out / "train.json"
    if given.resume and saved.exists():
        try:
            base = TrainConfig(**json.loads(saved.read_text()))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{saved}: {error}",
                expected="a configuration this version wrote",
                remedy="start a new run",
            ) from None
        recipe, why = given.recipe or base.recipe, f"resuming {out}"
    elif given.init_from and not {"-h", "--help"} & set(args):
        model, encoding, _ = run_directory.load_model(given.init_from)
        c = model.config
        base = replace(
            base,
            n_layer=c.n_layer,
            n_head=c.n_head,
            n_embd=c.n_embd,
            seq_len=min(base.seq_len, c.block_size),
            tokenizer=encoding.name,
        )
    config = parse_flags(TrainConfig, replace(base, recipe=recipe), __doc__, args)
    if given.resume and saved.exists():
        changed = [
            f.name
            for f in fields(TrainConfig)
            if f.name not in FREE_ON_RESUME and getattr(config, f.name) != getattr(base, f.name)
        ]
        if changed:
            what = ", ".join(
                f"--{n.replace('_', '-')} {getattr(config, n)} (the run has {getattr(base, n)})"
                for n in changed
            )
            raise UserError(
                f"{what}",
                expected=f"flags that do not change what {out} learns",
                remedy="drop them, or start a new run in another --out",
            )
    if given.out and not given.resume and run_directory.is_run(out):
        raise UserError(
            f"--out {out}: holds a run",
            expected="a new directory",
            remedy="continue that run with --resume, or choose another --out",
        )
    if not given.out and not given.resume and taken(out):
        out = out.with_name(f"{out.name}-{len(taken(out)) + 1}")
    return replace(config, out=str(out)), f"recipe {recipe}, {why}"


def taken(out: Path) -> list[Path]:
    """The existing runs among out, out-2, out-3, …, up to the first free name."""
    runs = []
    while run_directory.is_run(
        name := out if not runs else out.with_name(f"{out.name}-{len(runs) + 1}")
    ):
        runs.append(name)
    return runs


# ---------------------------------------------------------------------------------------------------- the pieces


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine from the peak to min_lr at max_steps (GPT-3, appendix B); step counts from 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (
        config.learning_rate - config.min_lr
    )


def make_optimizer(model: GPT, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (GPT-3, appendix B): decay on matrices and embeddings, none on biases and layer norms."""
    groups = [
        {
            "params": [p for p in model.parameters() if p.dim() >= 2],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True
    )


def step_batch(
    data: TokenArray, config: TrainConfig, step: int, rank: int, world_size: int
) -> torch.Tensor:
    """The windows that `rank` trains on in `step`, int64 (sequences_per_step / W, T + 1): its slice of the global batch."""
    share = config.sequences_per_step // world_size
    first = step * config.sequences_per_step + rank * share
    return torch.from_numpy(
        data.windows(
            training_windows(first, share, data.num_windows(config.seq_len), config.seed),
            config.seq_len,
        )
    )


def train_step(
    loss_fn: torch.nn.Module,
    optimizer: torch.optim.AdamW,
    batch: torch.Tensor,
    config: TrainConfig,
    rt: Runtime,
    stop: int = 0,
) -> tuple[float, float, bool]:
    """One update from this rank's windows (B·n, T + 1). Returns the global mean loss before the update, the gradient
    norm before clipping, and whether any rank was asked to stop.

    loss_fn is NextTokenLoss, perhaps under DDP, perhaps compiled. Raises UserError on every rank, before the update,
    when loss or norm is not finite.
    """
    micro_batches = batch.split(config.micro_batch)
    total = torch.zeros((), device=rt.device)
    for i, windows in enumerate(micro_batches):
        windows = windows.to(rt.device, non_blocking=True)
        # Gradients are summed over ranks once, in the last backward; before it each rank accumulates alone.
        last = i == len(micro_batches) - 1
        with contextlib.nullcontext() if last or rt.world_size == 1 else loss_fn.no_sync():
            with rt.autocast(), rt.attention(config.seq_len):
                loss = loss_fn(windows[:, :-1], windows[:, 1:]) / len(micro_batches)
            loss.backward()
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(
        [p for group in optimizer.param_groups for p in group["params"]], config.grad_clip
    )
    loss, norm, stops = rt.sum(
        torch.stack([total, norm.to(total), torch.full_like(total, float(stop != 0))])
    ).tolist()
    loss, norm = (
        loss / rt.world_size,
        norm / rt.world_size,
    )  # DDP leaves the same norm on every rank
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise UserError(
            f"loss {loss}, gradient norm {norm}",
            expected="finite numbers",
            remedy="nothing was updated or saved; continue from the last checkpoint with --resume, or start anew with a lower --learning-rate",
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm, stops > 0


@torch.no_grad()
def evaluate(
    model: GPT, data: TokenArray, config: TrainConfig, rt: Runtime, bytes_per_token: np.ndarray
) -> dict:
    """Validation loss in nats per token and bits per byte, over the first eval_tokens tokens of the split, in order:
    the same tokens at any world size. bytes_per_token is tokens.token_bytes of the encoding."""
    model.eval()
    loss_fn, T = NextTokenLoss(model), config.seq_len
    budget = min(config.eval_tokens, len(data) - 1)
    full = budget // T
    batches = [
        np.arange(i, min(i + config.micro_batch, full)) for i in range(0, full, config.micro_batch)
    ]
    windows = (torch.from_numpy(data.windows(ks, T)) for ks in batches[rt.rank :: rt.world_size])
    if budget % T and rt.is_main:  # the end of a short split, in a row of its own
        windows = itertools.chain(
            windows, [torch.from_numpy(data.read(full * T, budget + 1).astype(np.int64))[None]]
        )
    sums = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes
    for w in windows:
        with rt.autocast():
            loss = loss_fn(w[:, :-1].to(rt.device), w[:, 1:].to(rt.device))
        count = w[:, 1:].numel()
        sums += torch.tensor(
            [loss.item() * count, count, bytes_per_token[w[:, 1:].numpy()].sum()],
            dtype=torch.float64,
        )
    model.train()
    nats, tokens, size = rt.sum(sums).tolist()
    return {
        "val_loss": nats / tokens,
        "bits_per_byte": nats / math.log(2) / max(size, 1),
        "eval_tokens": int(tokens),
    }


# ---------------------------------------------------------------------------------------------------- the run


def prepare_data(config: TrainConfig, rt: Runtime) -> TokenData:
    """Open --data, preparing it first where it is text; rank 0 prepares for all."""
    if not config.data:
        raise UserError(
            "--data is missing",
            expected="the text or token shards to train on",
            remedy="for example --data novel.txt",
        )
    path = None
    if rt.is_main:
        path = (
            fineweb.prepare_first_run(rt.say)
            if config.data == FIRST_RUN
            else fineweb.prepare_path(config.data, config.tokenizer, rt.say)
        )
    data = open_data(rt.broadcast(path))
    if data.train.num_windows(config.seq_len) == 0:
        raise UserError(
            f"{config.data}: {len(data.train):,} training tokens",
            expected=f"at least one window of {config.seq_len + 1:,}",
            remedy="use more text or a lower --seq-len",
        )
    if len(data.val) < 2:
        raise UserError(
            f"{config.data}: {len(data.val):,} validation tokens",
            expected="at least 2",
            remedy="use more text",
        )
    return data


def build_model(config: TrainConfig, data: TokenData, rt: Runtime, resumed: Path | None) -> GPT:
    """The model on its device, in training mode: from a checkpoint, from --init-from, or fresh."""
    torch.manual_seed(config.seed)
    vocab_size = ENCODINGS[data.encoding]
    if not (resumed or config.init_from):
        return GPT(
            GPTConfig(
                config.n_layer,
                config.n_head,
                config.n_embd,
                config.seq_len,
                vocab_size,
                config.dropout,
            )
        ).to(rt.device)
    model, _, picked = run_directory.load_model(
        str(resumed or config.init_from), rt.say, config.dropout
    )
    rt.say(f"weights        {picked}")
    for name in ("n_layer", "n_head", "n_embd"):
        if getattr(config, name) != getattr(model.config, name):
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(config, name)}",
                expected=f"{getattr(model.config, name)} as in {picked}",
                remedy="drop the flag",
            )
    if model.config.vocab_size != vocab_size:
        raise UserError(
            f"{config.data}: {data.encoding} tokens, a vocabulary of {vocab_size:,}",
            expected=f"the {model.config.vocab_size:,} of {picked}",
            remedy="prepare the data with the model's own encoding (fineweb.py --tokenizer)",
        )
    model.crop_context(config.seq_len)
    return model.to(rt.device).train()


def check_batch(config: TrainConfig, world_size: int) -> None:
    """Every rank runs the same number of full micro-batches, or the run is refused with the sizes that work."""
    sequences = config.sequences_per_step
    if sequences % (config.micro_batch * world_size):
        per_rank = sequences // world_size if sequences % world_size == 0 else 0
        good = ", ".join(str(n) for n in range(1, per_rank + 1) if per_rank % n == 0)
        raise UserError(
            f"--micro-batch {config.micro_batch} on {world_size} rank(s) with --total-batch-tokens {config.total_batch_tokens:,}, "
            f"which is {sequences} sequences of {config.seq_len}",
            expected=f"--micro-batch one of {good}"
            if good
            else f"a multiple of {world_size * config.seq_len:,} tokens a batch",
            remedy="change --micro-batch or --total-batch-tokens",
        )


def check_agreement(own: TrainConfig, data: TokenData, rt: Runtime) -> None:
    """Ranks started with different flags or different shards would train on nonsense without a word."""
    mine = hashlib.sha256(
        json.dumps([asdict(replace(own, out="")), data.fingerprint]).encode()
    ).hexdigest()
    if rt.broadcast(mine) != mine:
        raise UserError(
            f"rank {rt.rank}: flags or data differ from rank 0's",
            expected="the same flags and shards on every rank",
            remedy="start all ranks with one command on the same data",
        )


class Run:
    """What happens beside the training steps: validation, scores, samples, checkpoints and the log of a run directory.

    Everything here sees the raw model, never the compiled or distributed one. Files are written by rank 0.
    """

    def __init__(self, config: TrainConfig, data: TokenData, rt: Runtime):
        self.config, self.data, self.rt, self.folder = config, data, rt, Path(config.out)
        self.encoding = get_encoding(data.encoding)
        self.resumed = rt.broadcast(
            run_directory.newest_valid(self.folder, rt.say)
            if config.resume and rt.is_main
            else None
        )
        state = (
            run_directory.read_state(self.resumed)
            if self.resumed
            else {"step": 0, "elapsed": 0.0, "best": None, "data": data.fingerprint}
        )
        if state["data"] != data.fingerprint:
            raise UserError(
                f"{config.data}: not the data that {self.resumed} was trained on",
                expected="the same shards",
                remedy="restore them, or start a new run",
            )
        self.start_step, self.elapsed, self.best, self.saved = (
            state["step"],
            state["elapsed"],
            state["best"],
            state["step"],
        )
        self.last = None  # result of the last validation
        self.model = build_model(config, data, rt, self.resumed)
        self.optimizer = make_optimizer(self.model, config)
        self.items = hellaswag.find_items(rt) if config.hellaswag_every else None
        if self.resumed:
            run_directory.load_optimizer(self.resumed, self.start_step, self.model, self.optimizer)
        self.wandb = open_wandb(config) if config.wandb and rt.is_main else None
        if rt.is_main:
            run_directory.clean(self.folder)
            cut_log(self.folder, self.start_step if self.resumed else -1)
            self.write_best()
            if not self.resumed:
                (self.folder / "train.json").write_text(
                    json.dumps(asdict(replace(config, resume=False)), indent=2) + "\n"
                )

    def due(self, every: int, step: int) -> bool:
        """At each multiple of `every` and after the last update; what a resumed run did before it stopped is not done again."""
        return (
            every > 0
            and (step % every == 0 or step == self.config.max_steps)
            and not (self.resumed and step == self.start_step)
        )

    def log(self, event: str, step: int, **values) -> None:
        """One line of log.jsonl."""
        if self.rt.is_main:
            values = {
                "event": event,
                "step": step,
                "tokens": step * self.config.total_batch_tokens,
                **values,
            }
            with open(self.folder / "log.jsonl", "a") as f:
                f.write(json.dumps(values) + "\n")
                f.flush()
                if (
                    event != "train"
                ):  # a checkpoint must never be on disk before the log that led to it
                    os.fsync(f.fileno())
        if self.wandb:
            self.wandb.log(
                {
                    f"{event}/{key}": value
                    for key, value in values.items()
                    if key not in ("event", "step")
                },
                step=step,
            )

    def validate(self, step: int) -> bool:
        """Validation loss into log and curves; True where it is the lowest so far and the recipe keeps the best."""
        result = evaluate(
            self.model, self.data.val, self.config, self.rt, token_bytes(self.encoding)
        )
        self.log("eval", step, **result)
        self.last = result
        self.rt.say(
            f"step {step:>6}  validation loss {result['val_loss']:.4f} nats/token, {result['bits_per_byte']:.4f} bits/byte"
        )
        if self.rt.is_main:
            draw_curves([self.folder], self.folder / "curves.png")
        if not self.config.keep_best or (self.best and self.best["val_loss"] <= result["val_loss"]):
            return False
        self.best = {"step": step, "val_loss": result["val_loss"]}
        return step > 0

    def score(self, step: int) -> None:
        score = hellaswag.evaluate(self.model, self.encoding, self.items, rt=self.rt)
        self.model.train()
        self.log("hellaswag", step, acc=score.acc, acc_norm=score.acc_norm, items=score.items)
        self.rt.say(
            f"step {step:>6}  HellaSwag acc {score.acc:.4f}, acc_norm {score.acc_norm:.4f} on {score.items:,} items"
        )

    def sample(self, step: int) -> None:
        if self.rt.is_main:
            generator = torch.Generator(self.rt.device).manual_seed(self.config.seed)
            with self.rt.autocast():
                (text,) = sample_text(
                    self.model,
                    self.encoding,
                    prompt="",
                    num=1,
                    max_new_tokens=300,
                    temperature=0.8,
                    top_k=50,
                    generator=generator,
                )
            self.model.train()
            self.log("sample", step, text=text)
            self.rt.say(f"step {step:>6}  sample:", text)

    def save(self, step: int) -> None:
        if self.rt.is_main and step != self.saved:
            began = time.perf_counter()
            state = {"elapsed": self.elapsed, "best": self.best, "data": self.data.fingerprint}
            run_directory.save_step(
                self.folder, step, self.model, self.encoding, self.optimizer, state
            )
            self.write_best()
            run_directory.prune(self.folder, self.config.keep)
            self.log("save", step, seconds=round(time.perf_counter() - began, 3))
        self.saved = step

    def write_best(self) -> None:
        """best.json, or none where no step was kept as the best so far."""
        if self.best and self.best["step"] > 0:
            (self.folder / ".best.json.tmp").write_text(json.dumps(self.best) + "\n")
            os.replace(self.folder / ".best.json.tmp", self.folder / "best.json")
        else:
            (self.folder / "best.json").unlink(missing_ok=True)


def open_wandb(config: TrainConfig):
    """The run on Weights & Biases that belongs to the run directory: the same one after a resume."""
    try:
        import wandb
    except ImportError:
        raise UserError(
            "--wandb: the wandb package is not installed",
            expected="it beside the others",
            remedy="pip install wandb, or drop the flag",
        ) from None
    file = Path(config.out, "wandb_id")
    if not file.exists():
        file.write_text(secrets.token_hex(4))
    try:
        return wandb.init(
            project="pygpt2",
            name=Path(config.out).name,
            id=file.read_text(),
            resume="allow",
            dir=config.out,
            config=asdict(config),
        )
    except wandb.Error as error:
        raise UserError(
            f"--wandb: {error}",
            expected="to start or continue its run",
            remedy="log in, set WANDB_MODE=offline, or drop the flag",
        ) from None


def cut_log(folder: Path, step: int) -> None:
    """Cut log.jsonl back to `step`, so that each step stands in it once."""

    def step_of(line: str) -> float:
        try:
            return json.loads(line)["step"]
        except ValueError:  # torn by a crash
            return math.inf

    file = folder / "log.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    (folder / ".log.jsonl.tmp").write_text(
        "".join(line + "\n" for line in lines if step_of(line) <= step)
    )
    os.replace(folder / ".log.jsonl.tmp", file)


def train(run: Run) -> None:
    """Step after step from where the run stands to max_steps; evaluations, samples and checkpoints between steps."""
    config, rt, optimizer = run.config, run.rt, run.optimizer
    loss_fn = NextTokenLoss(run.model)
    if rt.world_size > 1:
        loss_fn = DistributedDataParallel(
            loss_fn,
            device_ids=[rt.device] if rt.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
    if config.compile:
        loss_fn = torch.compile(loss_fn, dynamic=False, fullgraph=rt.world_size == 1)
    peak, flops, stopping, told = (
        peak_flops(rt.device),
        flops_per_token(run.model.config),
        False,
        0.0,
    )

    def fetch(step: int) -> torch.Tensor:
        batch = step_batch(run.data.train, config, step, rt.rank, rt.world_size)
        return batch.pin_memory() if rt.device.type == "cuda" else batch

    show_bar = rt.is_main and sys.stderr.isatty()
    with (
        StopRequest() as stop,
        ThreadPoolExecutor(1) as background,
        tqdm(
            total=config.max_steps,
            initial=run.start_step,
            unit="step",
            dynamic_ncols=True,
            disable=not show_bar,
        ) as bar,
    ):
        upcoming = background.submit(fetch, run.start_step)
        for step in range(run.start_step, config.max_steps + 1):
            improved = run.due(config.eval_every, step) and run.validate(step)
            if run.items and step and run.due(config.hellaswag_every, step):
                run.score(step)
            if step and run.due(config.sample_every, step):
                run.sample(step)
            if (
                improved
                or (step and run.due(config.save_every, step))
                or (stopping and config.save_every)
            ):
                run.save(step)
            if stopping or step == config.max_steps:
                break

            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            # Dropout is a function of seed, step and rank, so there is no generator state to save.
            torch.manual_seed(config.seed + 1_000_003 * (step * rt.world_size + rt.rank))
            batch, upcoming = upcoming.result(), background.submit(fetch, step + 1)
            loss, norm, stopping = train_step(loss_fn, optimizer, batch, config, rt, stop.signum)
            seconds = time.perf_counter() - began
            run.elapsed += seconds
            rate = config.total_batch_tokens / seconds
            run.log(
                "train",
                step + 1,
                loss=loss,
                lr=group["lr"],
                grad_norm=norm,
                tokens_per_second=round(rate, 1),
                mfu=rate * flops / (peak * rt.world_size) if peak else None,
                elapsed=round(run.elapsed, 3),
            )
            bar.update()
            bar.set_postfix_str(f"loss {loss:.4f}, {rate:,.0f} tok/s")
            if not show_bar and (step == run.start_step or time.perf_counter() - told > 30):
                told = time.perf_counter()
                rt.say(
                    f"step {step + 1:>6}  loss {loss:.4f}, gradient norm {norm:.2f}, learning rate {group['lr']:.2e}, {rate:,.0f} tokens/s"
                )
            if (
                step == run.start_step
            ):  # what exists now lives as long as the run: spare the garbage collector the walk
                gc.collect()
                gc.freeze()
    if stopping and step < config.max_steps:
        rt.say(
            f"stopped after step {step}; to go on: python train_gpt2.py --out {run.folder} --resume"
        )
        raise Stopped(stop.signum or signal.SIGTERM)


# ---------------------------------------------------------------------------------------------------- what a person sees


def main(args: list[str] | None = None) -> None:
    args = sys.argv[1:] if args is None else args
    if (
        int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0 and "--resume" not in args
    ):  # torchrun restarted us after a failure
        args = [*args, "--resume"]
    own, why = read_config(args)
    rt = start(own.device, own.dtype)
    config = rt.broadcast(
        own
    )  # rank 0 has chosen the directory; no rank creates it before all have looked
    attention = " > ".join(
        backend.name.removesuffix("_ATTENTION").lower()
        for backend in rt.attention_kernels(config.seq_len)
    )
    rt.say(
        why,
        f"running on     {rt.device.type}, {str(rt.dtype).removeprefix('torch.')}, {rt.world_size} rank{'s' * (rt.world_size > 1)}, attention kernel {attention}",
    )
    if config.eval_only:
        return eval_only(config, rt)
    check_batch(config, rt.world_size)
    if config.warmup_steps >= config.max_steps:
        rt.say(
            f"note: {config.warmup_steps} steps of warm-up in a run of {config.max_steps}: the learning rate stays below its peak; --warmup-steps lowers it"
        )
    if config.dry_run:
        vocab_size = ENCODINGS[
            open_data(config.data).encoding if Path(config.data).is_dir() else config.tokenizer
        ]
        model_config = GPTConfig(
            config.n_layer, config.n_head, config.n_embd, config.seq_len, vocab_size, config.dropout
        )
        return rt.say(
            *plan(
                model_config, rt, config.max_steps, config.total_batch_tokens, config.micro_batch
            ),
            *plan_time(model_config, rt, config.max_steps, config.total_batch_tokens),
        )
    data = prepare_data(config, rt)
    check_agreement(own, data, rt)
    with locked(Path(config.out)) if rt.is_main else contextlib.nullcontext():
        run = Run(config, data, rt)
        if run.start_step == config.max_steps:
            return rt.say(
                f"{run.folder} is complete, {config.max_steps:,} steps. To train its model further: "
                f"python train_gpt2.py --init-from {run.folder} --data {config.data} --tokenizer {data.encoding}"
            )
        rt.say(
            *plan(
                run.model.config,
                rt,
                config.max_steps,
                config.total_batch_tokens,
                config.micro_batch,
            ),
            f"data           {config.data}: {len(data.train):,} training and {len(data.val):,} validation tokens ({data.encoding})",
            f"run directory  {run.folder}"
            + (f", continuing after step {run.start_step}" if run.resumed else ""),
            "",
        )
        train(run)
    reached = (
        f", validation loss {run.last['val_loss']:.4f} nats per token, {run.last['bits_per_byte']:.4f} bits per byte"
        if run.last
        else ""
    )
    rate = (
        f" --learning-rate {config.learning_rate / 4:g}" if config.recipe == "first-run" else ""
    )  # a small model takes, and needs, a larger one
    rt.say(
        "",
        f"Done: {run.elapsed:,.0f} s of training{reached}.",
        f"Saved in {run.folder}/: checkpoints, log.jsonl, curves.png. Next:",
        f"  python sample.py --model {run.folder} --num-samples 3",
        f"  python train_gpt2.py --init-from {run.folder} --data input.txt{rate}",
        f"  python hellaswag.py --model {run.folder}",
    )


def eval_only(config: TrainConfig, rt: Runtime) -> None:
    """Validation loss, perplexity and bits per byte of --init-from on --data."""
    if not config.init_from:
        raise UserError(
            "--eval-only without --init-from",
            expected="the model to measure",
            remedy="for example --init-from gpt2",
        )
    data = prepare_data(config, rt)
    model = build_model(config, data, rt, None)
    result = evaluate(model, data.val, config, rt, token_bytes(get_encoding(data.encoding)))
    rt.say(
        f"validation loss {result['val_loss']:.4f} nats per token",
        f"perplexity      {math.exp(result['val_loss']):.2f} per token",
        f"bits per byte   {result['bits_per_byte']:.4f}",
        f"tokens          {result['eval_tokens']:,} of {config.data}, in windows of {config.seq_len:,}",
    )


if __name__ == "__main__":
    run_script(main)
