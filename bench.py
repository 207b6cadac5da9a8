"""Speed side by side with peers: the same weights, inputs and dtype, equal outputs, one interleaved run.

    python bench.py train                  one subject: train, growth, sample, hellaswag, data or load
    python bench.py all                    all of them, into bench/<date>/
    python bench.py sample --rounds 9 --dtype float32 --json sample.json

Every contender lives in a process of its own, so that neither its allocator nor its threads touch another's, and
waits while others work: A B C, A B C, …, each round timed inside. What they compute is compared before the first
round; a contender whose outputs differ is not timed, and the run ends with exit code 2. Ratios are taken within a
round, against the table's first row: 2 means twice its time. Peers that are not installed leave an empty row.

"peak GB" is the peak memory of a contender's process, its set-up included (on CUDA: of its tensors, in the rounds);
"start s" is what set-up took: imports, weights, compilation, a first round. Peers get our allocator setting
(runtime.keep_freed_memory) everywhere but in the rows that say they keep their own.
"""

import argparse  # not tyro: a machine that is lent for an hour has little installed
import contextlib
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import runtime
from cli import UserError, run_script
from model import GPT, SIZES, GPTConfig, NextTokenLoss
from runtime import Runtime, keep_freed_memory
from tokens import (
    HEADER_BYTES,
    get_encoding,
    open_data,
    save_tokenizer,
    training_windows,
    write_manifest,
    write_shard,
)

ROOT = Path(__file__).resolve().parent
PACKAGES = (
    "torch",
    "transformers",
    "lm_eval",
    "accelerate",
    "tiktoken",
    "numpy",
    "safetensors",
    "pyarrow",
)


# ---------------------------------------------------------------------------------------------------- the machinery


class Ready(NamedTuple):
    """What a contender returns once it has set up and warmed up."""

    output: np.ndarray  # equal to the other contenders'
    work: Callable[[], Any]  # one round


@dataclass
class Case:
    """One table: contenders for one piece of work."""

    title: str
    unit: str
    amount: float  # of the unit, done in a round
    contenders: dict[str, tuple]  # row: a function that returns Ready, and its arguments
    tolerance: Any = 0.0  # largest difference from the first row's output, for all elements or each
    difference: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda own, first: np.abs(
        own - first
    )
    remark: Callable[[dict[str, dict]], str] = lambda rows: (
        ""
    )  # a line under the table, from the rows that were timed
    together: bool = (
        False  # contenders may set up at the same time: they fit, and compile on many cores
    )


@dataclass(frozen=True)
class Setting:
    """What every contender is told."""

    device: str  # cpu or cuda
    dtype: str  # float32 or bfloat16
    scratch: Path
    tiny: bool

    def runtime(self, ours: bool = False, keep_memory: bool = True) -> Runtime:
        """For our code as our scripts start it; for a peer without what that changes in torch, but for the allocator."""
        if ours:
            return runtime.start(self.device, self.dtype)
        if self.device == "cpu" and keep_memory:
            keep_freed_memory()
        if self.device == "cuda":
            torch.set_float32_matmul_precision("high")
        return Runtime(0, 1, torch.device(self.device), getattr(torch, self.dtype))

    def weights(self, config: GPTConfig = SIZES["gpt2"], larger: int = 1) -> str:
        """A Hugging Face directory with random weights and GPT-2's tokenizer, made once. larger: scales the blocks'."""
        config = GPTConfig(2, 2, 64, config.block_size) if self.tiny else config
        folder = self.scratch / f"{config.n_layer}x{config.n_embd}x{config.block_size}x{larger}"
        if not folder.exists():
            torch.manual_seed(0)
            model = GPT(config)
            with torch.no_grad():
                for block in model.transformer.h:
                    for parameter in block.parameters():
                        parameter.mul_(larger if parameter.dim() == 2 else 1)
            model.save_pretrained(folder, bos_token_id=50256, eos_token_id=50256)
            save_tokenizer(get_encoding("gpt2"), folder)
        return str(folder)

    def size(self, full: int, tiny: int) -> int:
        return tiny if self.tiny else full


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(50257, shape, generator=torch.Generator().manual_seed(1))


def contend(pipe, contender: Callable[..., Ready], arguments: tuple, share: bool) -> None:
    """A contender's process: set up, then one round whenever asked. share: leave a GPU's memory to the others between rounds."""
    multiprocessing.set_start_method(
        None, force=True
    )  # the system's own, as in our scripts, and not what this process was started by
    began = time.perf_counter()
    try:
        output, work = contender(*arguments)
        pipe.send(
            {
                "output": output,
                "start_seconds": time.perf_counter() - began,
                "peak_memory": peak_memory(),
            }
        )
        while pipe.recv():
            if torch.cuda.is_initialized():
                if share:
                    work()  # takes the memory back, untimed
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            work()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            pipe.send({"seconds": time.perf_counter() - began, "peak_memory": peak_memory()})
            if share and torch.cuda.is_initialized():
                torch.cuda.empty_cache()
    except EOFError:  # the parent has gone
        pass
    except ImportError as error:
        pipe.send({"fault": f"not installed: {error}"})
    except Exception as error:
        traceback.print_exc()
        pipe.send(
            {"fault": f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        )


def peak_memory() -> int:
    """Bytes: of tensors on CUDA, else of the larger of this process and its largest child."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if Path(
        "/proc/self/status"
    ).exists():  # Linux counts the parent's memory into a child's ru_maxrss
        own = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    return 1024 * max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)


class Contender:
    """The parent's end of a contender."""

    def __init__(self, name: str, share: bool, function: Callable[..., Ready], *arguments):
        self.name, self.seconds, self.facts = name, [], {"fault": None, "peak_memory": 0}
        context = multiprocessing.get_context(
            "spawn"
        )  # a fresh interpreter, whatever this process holds
        self.pipe, child = context.Pipe()
        self.process = context.Process(target=contend, args=(child, function, arguments, share))
        self.process.start()
        child.close()

    def set_up(self) -> None:
        self.output = self.receive().get("output")

    def receive(self) -> dict:
        try:
            message = self.pipe.recv()
        except EOFError:
            self.process.join()
            message = {"fault": f"failed: its process ended with {self.process.exitcode}"}
        message["peak_memory"] = max(message.get("peak_memory", 0), self.facts["peak_memory"])
        self.facts |= {
            key: value for key, value in message.items() if key not in ("output", "seconds")
        }
        return message

    def round(self) -> None:
        if not self.facts["fault"]:
            self.pipe.send(True)
            self.seconds.append(self.receive().get("seconds"))

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send(False)
        self.process.join(60)
        if self.process.is_alive():
            self.process.kill()


def run_case(case: Case, rounds: int) -> dict:
    """Set all contenders up, compare their outputs, time them in turn; the results as JSON values."""
    contenders: list[Contender] = []
    try:
        for name, what in case.contenders.items():
            contenders.append(Contender(name, not case.together, *what))
            if not case.together:
                contenders[-1].set_up()
        for contender in contenders if case.together else []:
            contender.set_up()
        sound = [contender for contender in contenders if not contender.facts["fault"]]
        for contender in sound:
            difference = case.difference(contender.output, sound[0].output)
            if not np.all(difference <= case.tolerance):  # NaN is a difference too
                contender.facts["fault"] = (
                    f"outputs differ from those of {sound[0].name} by up to {difference.max():.2g}, more than {case.tolerance}"
                )
        others = busy_cores()
        for _ in range(rounds):
            for contender in contenders:
                contender.round()
    finally:
        for contender in contenders:
            contender.stop()
    rows, first = {}, contenders[0]
    for contender in contenders:
        rows[contender.name] = row = contender.facts
        if not row["fault"]:
            row |= {"all_seconds": contender.seconds, "seconds": spread(contender.seconds)}
            row["rate"] = case.amount / row["seconds"][0]
            row["ratio"] = (
                None
                if first.facts["fault"]
                else spread([own / base for own, base in zip(contender.seconds, first.seconds)])
            )
    remark = case.remark({name: row for name, row in rows.items() if not row["fault"]})
    return {
        "title": case.title,
        "unit": case.unit,
        "amount": case.amount,
        "rounds": rounds,
        "busy_cores": others,
        "rows": rows,
        "remark": remark,
    }


def busy_cores() -> float | None:
    """Cores in use over a second in which we do nothing: how much other processes disturb the measurement (Linux)."""

    def used() -> int:
        user, nice, system, _, _, irq, softirq, *_ = map(
            int, Path("/proc/stat").read_text().split()[1:11]
        )
        return user + nice + system + irq + softirq

    if not Path("/proc/stat").exists():
        return None
    before = used()
    time.sleep(1)
    return (used() - before) / os.sysconf("SC_CLK_TCK")


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, least and largest."""
    return statistics.median(values), min(values), max(values)


def table(result: dict) -> str:
    """A case in Markdown."""
    busy = (
        ""
        if result["busy_cores"] is None
        else f", {result['busy_cores']:.1f} cores busy with other work"
    )
    lines = [
        f"### {result['title']}, {result['rounds']} rounds{busy}",
        "",
        f"| | {result['unit']}/s | seconds a round (min–max) | ratio (min–max) | peak GB | start s |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        if row["fault"]:
            lines.append(f"| {name} | {row['fault']} | | | | |")
        else:
            rate = f"{row['rate']:,.0f}" if row["rate"] >= 1000 else f"{row['rate']:.3g}"
            seconds, ratio = (
                "{:.3g} ({:.3g}–{:.3g})".format(*row[key]) if row[key] else ""
                for key in ("seconds", "ratio")
            )
            lines.append(
                f"| {name} | {rate} | {seconds} | {ratio} | {row['peak_memory'] / 1e9:.2f} | {row['start_seconds']:.1f} |"
            )
    return "\n".join([*lines, "", *([result["remark"], ""] if result["remark"] else [])])


def machine(device: str) -> dict:
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        cpu = next(
            (
                line.partition(": ")[2]
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")
            ),
            cpu,
        )
    versions = {name: None for name in PACKAGES}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capabilities": [
            name for name, there in torch.cpu.get_capabilities().items() if there is True
        ],
        "system": platform.platform(),
        "versions": {"python": platform.python_version()} | versions,
    }


# ---------------------------------------------------------------------------------------------------- train

LEARNING_RATE = 1e-5  # random tokens are learned by heart; nothing must overflow


def train_ours(
    setting: Setting, folder: str, B: int, T: int, steps: int, compiled: bool, micro_batch: int
) -> Ready:
    from train_gpt2 import TrainConfig, make_optimizer, train_step

    rt, model, windows = (
        setting.runtime(ours=True),
        GPT.from_pretrained(folder).train(),
        random_tokens(B, T + 1),
    )
    config = TrainConfig(
        seq_len=T, micro_batch=micro_batch, total_batch_tokens=B * T, learning_rate=LEARNING_RATE
    )
    loss_fn = NextTokenLoss(model)
    with torch.no_grad():
        exact = loss_fn(windows[:4, :-1], windows[:4, 1:]).item()  # float32, on the CPU
    optimizer = make_optimizer(model.to(rt.device), config)
    loss_fn = torch.compile(loss_fn, dynamic=False) if compiled else loss_fn
    windows = windows.pin_memory() if setting.device == "cuda" else windows

    def step() -> float:
        return train_step(loss_fn, optimizer, windows, config, rt)[0]

    return Ready(np.array([exact, step()]), lambda: [step() for _ in range(steps)])


def train_transformers(
    setting: Setting,
    folder: str,
    B: int,
    T: int,
    steps: int,
    compiled: bool,
    micro_batch: int,
    keep_memory: bool,
) -> Ready:
    """The same step as its users write it, as strong as it gets without other results: fused AdamW, SDPA, the loss
    inside the compiled graph and nothing else returned from it."""
    from transformers import GPT2LMHeadModel

    rt, windows = setting.runtime(keep_memory=keep_memory), random_tokens(B, T + 1)
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).train()

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
    loss_fn = torch.compile(loss_fn, dynamic=False) if compiled else loss_fn
    windows = windows.pin_memory() if setting.device == "cuda" else windows

    def step() -> float:
        total = torch.zeros((), device=rt.device)
        for part in windows.split(micro_batch):
            part = part.to(rt.device, non_blocking=True)
            with rt.autocast():
                loss = loss_fn(part[:, :-1], part[:, 1:].contiguous()) * (len(part) / B)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total.item()

    return Ready(np.array([exact, step()]), lambda: [step() for _ in range(steps)])


def train(setting: Setting) -> Iterator[Case]:
    from train_gpt2 import flops_per_token

    cuda, peak = setting.device == "cuda", runtime.peak_flops(torch.device(setting.device))
    small = GPTConfig(n_layer=6, n_head=6, n_embd=384, block_size=256)
    sizes = (
        [("124M", SIZES["gpt2"], 64, 1024, 10)]
        if cuda
        else [("124M", SIZES["gpt2"], 4, 512, 1), ("6 layers × 384", small, 16, 256, 1)]
    )
    for name, config, B, T, steps in sizes:
        B, T = setting.size(B, 4), setting.size(T, 32)
        run = (setting, setting.weights(config), B, T, steps)
        flops = flops_per_token(GPTConfig(config.n_layer, config.n_head, config.n_embd, T))
        ours = {
            "PyGPT2": (train_ours, *run, False, B),
            "PyGPT2, compiled": (train_ours, *run, True, B),
        }
        # Not all in one run on a CPU: idle contenders keep their memory, and the 124M ones together would want 25 GB.
        groups = (
            [(ours, False), ({"PyGPT2": ours["PyGPT2"]}, True)]
            if not cuda
            else [({"PyGPT2, compiled": ours["PyGPT2, compiled"]}, False)]
        )
        for first, keep in groups:
            how = "" if cuda else ", memory kept as by ours" if keep else ", memory as by default"
            few = (
                min(B, 16) if cuda else B
            )  # eager transformers at 64 sequences wants more than 100 GB
            peers = {
                f"transformers, compiled{how}": (train_transformers, *run, True, B, keep),
                f"transformers, eager{how}{f', micro-batches of {few}' if few < B else ''}": (
                    train_transformers,
                    *run,
                    False,
                    few,
                    keep,
                ),
            }
            yield Case(
                f"train {name}, {B}×{T}, {setting.dtype}",
                "tok",
                steps * B * T,
                first | peers,
                tolerance=np.array([1e-5, 1e-3 if setting.dtype == "bfloat16" else 1e-5]),
                remark=lambda rows: (
                    "MFU: "
                    + ", ".join(
                        f"{name} {row['rate'] * flops / peak:.1%}" for name, row in rows.items()
                    )
                    if peak
                    else ""
                ),
            )


# ---------------------------------------------------------------------------------------------------- growth


def open_shards(folder: Path, shards: int, windows: int) -> Ready:
    """Open this many shards of 10,000 tokens, as a run does when it starts, then read windows from all over them."""
    folder.mkdir()
    entries = [
        write_shard(
            folder / f"corpus_{'train' if i else 'val'}_{i:06d}.bin",
            np.full(10_000, i % 50257, np.uint16),
        )
        for i in range(shards)
    ]
    write_manifest(folder, {"encoding": "gpt2", "shards": entries})

    def work() -> np.ndarray:
        train = open_data(folder).train
        return train.windows(training_windows(0, windows, train.num_windows(1024), seed=0), 1024)

    work()
    return Ready(np.zeros(1), work)


def growth(setting: Setting) -> Iterator[Case]:
    """Time and memory of our code alone, as one thing grows."""
    from train_gpt2 import flops_per_token

    T, B = setting.size(256, 32), setting.size(16, 4)
    one_size = GPTConfig(n_layer=6, n_head=6, n_embd=384, block_size=setting.size(2048, 256))

    def run(config: GPTConfig, B: int, T: int, micro_batch: int) -> tuple:
        return train_ours, setting, setting.weights(config), B, T, 1, False, micro_batch

    yield Case(
        f"growth with the micro-batch: 6 layers × 384, {B}×{T} tokens a step, {setting.dtype}",
        "tok",
        B * T,
        {f"micro-batch {n}": run(one_size, B, T, n) for n in (1, 2, 4, 8, 16) if n <= B},
        tolerance=np.array([1e-5, 1e-2]),
    )
    yield Case(
        f"growth with the context: 6 layers × 384, {B * T} tokens a step, {setting.dtype}",
        "tok",
        B * T,
        {
            f"T = {t}": run(one_size, B * T // t, t, B * T // t)
            for t in (T // 4, T // 2, T, 2 * T, 4 * T, 8 * T)
            if t <= B * T
        },
        tolerance=np.inf,
    )
    sizes = [
        GPTConfig(4, 4, 128, T),
        GPTConfig(6, 6, 384, T),
        GPTConfig(12, 12, 768, T),
        GPTConfig(24, 16, 1024, T),
    ]
    names = {f"{c.n_layer} × {c.n_embd}": c for c in sizes}
    yield Case(
        f"growth with the model: 4×{T} tokens a step, {setting.dtype}",
        "tok",
        4 * T,
        {name: run(c, 4, T, 4) for name, c in names.items()},
        tolerance=np.inf,
        remark=lambda rows: (
            "GFLOP/s: "
            + ", ".join(
                f"{name} {row['rate'] * flops_per_token(names[name]) / 1e9:,.0f}"
                for name, row in rows.items()
            )
        ),
    )
    yield Case(
        "growth with the shards: open them all, read 512 windows of 1,024 tokens",
        "openings",
        1,
        {
            f"{n:,} shards": (open_shards, setting.scratch / f"shards{n}", n, 512)
            for n in (10, 100, 1000, setting.size(10_000, 2000))
        },
    )


# ---------------------------------------------------------------------------------------------------- sample


def sample_ours(
    setting: Setting, folder: str, B: int, prompt: int, new: int, faster: bool
) -> Ready:
    """faster: the preparation that sample.py makes for long texts."""
    from sample import generate, pack_linears

    rt = setting.runtime(ours=True)
    model, idx = (
        GPT.from_pretrained(folder).to(rt.device, rt.dtype),
        random_tokens(B, prompt).to(rt.device),
    )
    if faster and setting.device == "cpu":
        pack_linears(model, B)
    compiled = faster and setting.device == "cuda"

    def work() -> torch.Tensor:
        return generate(model, idx, new, temperature=0, compiled=compiled)

    return Ready([work()[:4].cpu().numpy() for _ in range(2)][-1], work)


def sample_transformers(
    setting: Setting, folder: str, B: int, prompt: int, new: int, compiled: bool
) -> Ready:
    from transformers import CompileConfig, GPT2LMHeadModel

    rt = setting.runtime()
    model, idx = (
        GPT2LMHeadModel.from_pretrained(folder, dtype=rt.dtype).to(rt.device).eval(),
        random_tokens(B, prompt).to(rt.device),
    )
    model.generation_config.eos_token_id, options = None, {}
    if compiled:  # its own way: a static cache, and torch.compile for the one-token step
        compile_config = CompileConfig(
            mode="reduce-overhead" if setting.device == "cuda" else "default"
        )
        compile_config._compile_all_devices = True
        options = {"cache_implementation": "static", "compile_config": compile_config}

    def work() -> torch.Tensor:
        return model.generate(
            idx,
            attention_mask=torch.ones_like(idx),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            **options,
        )

    return Ready([work()[:4].cpu().numpy() for _ in range(2)][-1], work)


def read_weights(setting: Setting, folder: str, new: int) -> Ready:
    """The bound of decoding at batch 1: all weights are read once a token."""
    rt = setting.runtime()
    size = sum(p.numel() for p in GPT.from_pretrained(folder).parameters()) * rt.dtype.itemsize
    buffer = torch.ones(size // 4, device=rt.device)
    return Ready(np.zeros((0, 0)), lambda: [buffer.sum() for _ in range(new)])


def sample(setting: Setting) -> Iterator[Case]:
    # As initialised, a tied head likes the last token best whatever came before: larger weights make the text depend on it.
    folder = setting.weights(larger=setting.size(4, 8))
    reference = GPT.from_pretrained(folder)
    for B in (1, 256) if setting.device == "cuda" else (1, 4):
        prompt, new = setting.size(32, 8), setting.size(128 if setting.device == "cuda" else 64, 8)
        run = (setting, folder, B, prompt, new)
        faster = "compiled" if setting.device == "cuda" else "weights packed"
        contenders = {
            f"PyGPT2, {faster}": (sample_ours, *run, True),
            "PyGPT2": (sample_ours, *run, False),
            "transformers": (sample_transformers, *run, False),
            "transformers, compiled, static cache": (sample_transformers, *run, True),
        }
        if B == 1:
            contenders["bound: reading the weights once a token"] = (
                read_weights,
                setting,
                folder,
                new,
            )

        @torch.no_grad()
        def regret(own: np.ndarray, first: np.ndarray) -> np.ndarray:
            """How far below the likeliest token the generated ones are, in nats, by the float32 model after the same
            tokens: greedy texts themselves part in bfloat16 where two tokens are as likely."""
            if own.size == 0:
                return np.zeros(1)
            rows = torch.from_numpy(own)
            logits = reference(rows[:, :-1])[:, prompt - 1 :]  # (rows, new, V)
            return (
                (logits.amax(-1) - logits.gather(-1, rows[:, prompt:, None])[..., 0])
                .amax(1)
                .numpy()
            )

        yield Case(
            f"sample 124M, batch {B}, prompt {prompt}, {new} new tokens, greedy, {setting.dtype} weights",
            "tok",
            B * new,
            contenders,
            tolerance=0.1 if setting.dtype == "bfloat16" else 1e-3,
            difference=regret,
            together=setting.device == "cuda",
        )


# ---------------------------------------------------------------------------------------------------- hellaswag


def find_items(n: int) -> tuple[list, str]:
    """n items, evenly from the official file where it is; else of its lengths (a third is from WikiHow and longer), made
    of the words of input.txt."""
    from hellaswag import DATA, Item, load_items

    if DATA.is_file():
        items = load_items()
        return [items[i] for i in np.linspace(0, len(items) - 1, n).astype(int)], "official"
    words, rng, items = (ROOT / "input.txt").read_text().split(), np.random.default_rng(0), []

    def text(mean: float, deviation: float) -> str:
        start = rng.integers(len(words) - 100)
        return " ".join(words[start : start + int(np.clip(rng.normal(mean, deviation), 2, 70))])

    for _ in range(n):
        context, ending = (
            ((50, 6), (28, 4)) if rng.random() < 0.32 else ((28, 10), (20, 9))
        )  # words: mean and deviation
        mean = rng.normal(*ending)
        items.append(Item(text(*context), tuple(text(mean, 4) for _ in range(4)), 0))
    return items, "synthetic"


def score_ours(setting: Setting, n: int) -> Ready:
    from hellaswag import evaluate

    rt = setting.runtime(ours=True)
    model, items = GPT.from_pretrained(setting.weights()).to(rt.device), find_items(n)[0]

    def work() -> np.ndarray:
        return evaluate(model, get_encoding("gpt2"), items, rt=rt, progress=False).log_p

    return Ready(work(), work)


def score_plain(setting: Setting, n: int) -> Ready:
    """Our model in build-nanogpt's scheme: an item at a time in four padded rows, logits everywhere, masked cross-entropy."""
    rt, encoding = setting.runtime(), get_encoding("gpt2")
    model, items = GPT.from_pretrained(setting.weights()).to(rt.device), find_items(n)[0]

    def score(item) -> np.ndarray:
        context, endings = (
            encoding.encode_ordinary(item.ctx),
            [encoding.encode_ordinary(" " + ending) for ending in item.endings],
        )
        tokens = torch.zeros(4, len(context) + max(map(len, endings)), dtype=torch.long)
        mask = torch.zeros(4, tokens.size(1) - 1)
        for k, ending in enumerate(endings):
            end = len(context) + len(ending)
            tokens[k, :end], mask[k, len(context) - 1 : end - 1] = torch.tensor(context + ending), 1
        tokens = tokens.to(rt.device)
        with rt.autocast():  # for each item, as there: the weights are cast anew
            logits = model(tokens)
        losses = F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none"
        ).view(4, -1)
        return -(losses * mask.to(rt.device)).sum(1).cpu().numpy()

    @torch.no_grad()
    def work() -> np.ndarray:
        return np.stack([score(item) for item in items])

    return Ready(work(), work)


def score_harness(setting: Setting, n: int) -> Ready:
    """lm-evaluation-harness, given the same contexts and endings."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import GPT2LMHeadModel, GPT2TokenizerFast

    from hellaswag import render

    rt = setting.runtime()
    model = GPT2LMHeadModel.from_pretrained(setting.weights(), dtype=rt.dtype).to(rt.device)
    scorer = HFLM(
        model,
        tokenizer=GPT2TokenizerFast.from_pretrained(setting.weights()),
        batch_size=256 if setting.device == "cuda" else 8,
        device=setting.device,
    )
    texts = [render(item, "completion")[:2] for item in find_items(n)[0]]
    requests = [
        Instance("loglikelihood", {}, (context, ending), k)
        for context, endings in texts
        for k, ending in enumerate(endings)
    ]

    def work() -> np.ndarray:
        return np.array(
            [log_p for log_p, _ in scorer.loglikelihood(requests, disable_tqdm=True)]
        ).reshape(-1, 4)

    return Ready(work(), work)


def hellaswag(setting: Setting) -> Iterator[Case]:
    # Of sums over an ending, about -320 with random weights; in bfloat16 the harness rounds and sums in bfloat16, off by 1.
    tolerance = 3.0 if setting.dtype == "bfloat16" else 2e-3
    setting.weights()
    peers = {
        "one item at a time, as build-nanogpt does": score_plain,
        "lm-evaluation-harness": score_harness,
    }
    for n, others in (
        [(10_042, {}), (300, peers)] if setting.device == "cuda" else [(setting.size(40, 4), peers)]
    ):
        yield Case(
            f"hellaswag 124M, {n:,} {find_items(1)[1]} items, {setting.dtype}",
            "items",
            n,
            {
                name: (score, setting, n)
                for name, score in ({"PyGPT2": score_ours} | others).items()
            },
            tolerance,
            together=setting.device == "cuda",
        )


# ---------------------------------------------------------------------------------------------------- data


def make_corpus(file: Path, size: int) -> int:
    """A parquet file of about `size` bytes of text in documents of up to 5 kB, FineWeb-Edu's mean: the Python sources installed here."""
    import pyarrow
    import pyarrow.parquet

    paths, total, documents = sysconfig.get_paths(), 0, []
    sources = (
        source
        for kind in ("stdlib", "purelib")
        for source in sorted(Path(paths[kind]).rglob("*.py"))
    )
    while total < size and (source := next(sources, None)):
        text = source.read_text(errors="replace")
        documents += [text[start : start + 5000] for start in range(0, len(text), 5000)]
        total += len(text.encode(errors="replace"))
    pyarrow.parquet.write_table(
        pyarrow.table({"text": documents}), file, row_group_size=1000
    )  # as in FineWeb-Edu
    return total


def read_corpus(file: Path) -> Iterator[str]:
    import pyarrow.parquet

    for batch in pyarrow.parquet.ParquetFile(file).iter_batches(1000, columns=["text"]):
        yield from batch.column(0).to_pylist()


def digest(parts: Iterable[np.ndarray]) -> np.ndarray:
    return np.frombuffer(
        hashlib.sha256(np.concatenate(list(parts)).astype("<u2").tobytes()).digest(), dtype=np.uint8
    ).astype(int)


def prepare_ours(file: Path, workers: int, shard_tokens: int) -> Ready:
    import fineweb

    keep_freed_memory()
    out = file.parent / "ours"

    def work() -> None:
        shutil.rmtree(out, ignore_errors=True)
        fineweb.prepare(
            fineweb.PrepareConfig(
                input=(str(file),), out=str(out), workers=workers, shard_tokens=shard_tokens
            ),
            say=lambda *lines: None,
        )

    work()
    return Ready(
        digest(
            np.fromfile(shard, "<u2", offset=HEADER_BYTES)
            for shard in sorted(out.glob("*.bin"), key=lambda shard: shard.stem[-6:])
        ),
        work,
    )


def encode_document(text: str) -> np.ndarray:
    encoding = get_encoding("gpt2")
    return np.array([encoding.eot_token, *encoding.encode_ordinary(text)]).astype(np.uint16)


def prepare_plain(file: Path, workers: int, shard_tokens: int) -> Ready:
    """build-nanogpt's scheme: a pool, one document per task, lists of Python integers, shards as .npy."""
    keep_freed_memory()
    get_encoding("gpt2")  # once, before the pool forks
    out = file.parent / "plain"

    def work() -> None:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            shard, fill, done = np.empty(shard_tokens, dtype=np.uint16), 0, 0
            for tokens in pool.imap(encode_document, read_corpus(file), chunksize=16):
                while fill + len(tokens) >= shard_tokens:
                    n = shard_tokens - fill
                    shard[fill:], tokens, fill = tokens[:n], tokens[n:], 0
                    np.save(out / f"{done:06d}", shard)
                    done += 1
                shard[fill : fill + len(tokens)] = tokens
                fill += len(tokens)
            np.save(out / f"{done:06d}", shard[:fill])

    work()
    return Ready(digest(map(np.load, sorted(out.iterdir()))), work)


def tiktoken_alone(file: Path) -> Ready:
    keep_freed_memory()
    encoding, documents = get_encoding("gpt2"), list(read_corpus(file))
    eot = np.array([encoding.eot_token], dtype=np.uint32)

    def work() -> list[np.ndarray]:
        return [
            tokens
            for text in documents
            for tokens in (eot, encoding.encode_to_numpy(text, disallowed_special=()))
        ]

    return Ready(digest(work()), work)


def data(setting: Setting) -> Iterator[Case]:
    file, workers = setting.scratch / "corpus.parquet", min(8, os.cpu_count())
    megabytes = make_corpus(file, setting.size(100_000_000, 300_000)) / 1e6
    run, alone = (file, workers, setting.size(10_000_000, 20_000)), "tiktoken alone, 1 process"
    yield Case(
        f"data, {megabytes:.0f} MB of Python sources in parquet, {workers} workers",
        "MB",
        megabytes,
        {
            "PyGPT2": (prepare_ours, *run),
            "one document a task, as build-nanogpt does": (prepare_plain, *run),
            alone: (tiktoken_alone, file),
        },
        remark=lambda rows: (
            f"PyGPT2 reaches {rows[alone]['ratio'][0] / workers:.0%} of workers × tiktoken alone"
            if {"PyGPT2", alone} <= rows.keys()
            else ""
        ),
    )


# ---------------------------------------------------------------------------------------------------- load

LOAD = {
    "PyGPT2": "import sys, torch; from model import GPT; forward = GPT.from_pretrained(sys.argv[1])",
    "transformers": "import sys, torch; from transformers import GPT2LMHeadModel; model = GPT2LMHeadModel.from_pretrained(sys.argv[1]); "
    "forward = lambda idx: model.eval()(idx).logits",
}
SHOW_LOGITS = (
    "; torch.set_grad_enabled(False); print(forward(torch.arange(8)[None])[0, -1, :50].tolist())"
)


def fresh_process(code_or_script: list[str], check: str = "") -> Ready:
    """A round is a whole Python process. check: code to append once that prints the outputs."""

    def run(*arguments: str) -> str:
        process = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True
        )
        if process.returncode:
            fault = (process.stderr.strip().splitlines() or ["no message"])[-1]
            raise (ImportError if "ModuleNotFoundError" in fault else RuntimeError)(fault)
        return process.stdout

    output = json.loads(run("-c", code_or_script[1] + check, *code_or_script[2:])) if check else []
    run(*code_or_script)
    return Ready(np.array(output), lambda: run(*code_or_script))


def load(setting: Setting) -> Iterator[Case]:
    folder = setting.weights()
    yield Case(
        "load 124M, float32 on the CPU, a fresh process with its imports",
        "loads",
        1,
        {name: (fresh_process, ["-c", code, folder], SHOW_LOGITS) for name, code in LOAD.items()},
        tolerance=1e-4,
    )
    if setting.device == "cuda":  # start-up is the CPU's
        return
    scripts = ("train_gpt2.py", "sample.py", "hellaswag.py", "fineweb.py")
    commands = {"import torch": ["-c", "import torch"]} | {
        f"{script} --help": [script, "--help"] for script in scripts
    }
    yield Case(
        "start-up beside torch alone, a fresh process",
        "starts",
        1,
        {name: (fresh_process, command) for name, command in commands.items()},
    )


# ---------------------------------------------------------------------------------------------------- command line

SUBJECTS = {
    "train": train,
    "growth": growth,
    "sample": sample,
    "hellaswag": hellaswag,
    "data": data,
    "load": load,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("subject", choices=[*SUBJECTS, "all"])
    parser.add_argument("--rounds", type=int, help="times that each contender works (5; on CUDA 3)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="of matrix products; auto: bfloat16 where the hardware has it",
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--tiny", action="store_true", help="the sizes of the tests: does it run?")
    args = parser.parse_args()
    device = runtime.choose_device(args.device)
    rounds = args.rounds if args.rounds is not None else 3 if device.type == "cuda" else 5
    if rounds < 1:
        raise UserError(f"--rounds {rounds}", expected="1 or more", remedy="5 is a good start")
    dtype = str(runtime.choose_dtype(args.dtype, device)).removeprefix("torch.")
    now, here, results = datetime.now(timezone.utc), machine(device.type), []
    heading = (
        f"`{' '.join(['python', *sys.argv])}`, {now:%Y-%m-%d %H:%M} UTC, {here['gpu'] or here['cpu']}, {here['threads']} threads, "
        + ", ".join(
            f"{name} {number or 'not installed'}" for name, number in here["versions"].items()
        )
        + "\n"
    )
    file = args.json
    if args.subject == "all" and not file:
        file = Path("bench") / f"{now:%Y-%m-%dT%H%M%SZ}" / "all.json"
        file.parent.mkdir(parents=True)
    print(heading, flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name in SUBJECTS if args.subject == "all" else [args.subject]:
            for case in SUBJECTS[name](Setting(device.type, dtype, Path(scratch), args.tiny)):
                results.append({"subject": name} | run_case(case, rounds))
                print(table(results[-1]), flush=True)
                if file:  # after each case: what is measured stays, whatever comes
                    file.write_text(
                        json.dumps(
                            {
                                "command": sys.argv,
                                "date": now.isoformat(),
                                "dtype": dtype,
                                "machine": here,
                                "results": results,
                            },
                            indent=2,
                        )
                    )
                    file.with_suffix(".md").write_text("\n".join([heading, *map(table, results)]))
    faults = [
        f"{result['title']}: {name}: {row['fault']}"
        for result in results
        for name, row in result["rows"].items()
        if row["fault"] and not row["fault"].startswith("not installed")
    ]
    if faults:
        raise UserError(
            "; ".join(faults),
            expected="equal outputs and no failures",
            remedy="see what was printed above",
        )


if __name__ == "__main__":
    run_script(main)
