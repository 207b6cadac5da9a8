"""Speed side by side with peers: the same weights, inputs and dtype, equal outputs, one interleaved run.

    python bench.py train                  one subject: train, sample, hellaswag, data or load
    python bench.py all                    all of them, into bench/<date>/
    python bench.py sample --rounds 9 --dtype float32 --json sample.json

Every contender lives in a process of its own, so that neither its allocator nor its threads touch another's, and
waits while another works: A B C, A B C, …, each round timed inside. What they compute is compared before the first
round; a contender whose outputs differ is not timed, and the run ends with exit code 2. The first row of a table is
the one that the others are compared with: a ratio of 2 means twice its time, taken within each round.

Peers that are not installed, or fail, leave an empty row that says why. On a GPU the sizes are such as fill one.
Memory is the peak of a contender's process (on CUDA: of its tensors) over set-up and rounds; "start" is the time
from the start of its process until it is ready: imports, weights, compilation, the first step.
"""

import argparse  # not tyro: a GPU that is lent for an hour has little installed
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import runtime
from model import GPT, SIZES, GPTConfig, NextTokenLoss
from runtime import Runtime, UserError, run_script
from tokens import HEADER_BYTES, get_encoding, save_tokenizer

ROOT = Path(__file__).resolve().parent
PACKAGES = ("torch", "transformers", "lm_eval", "accelerate", "tiktoken", "numpy", "safetensors", "pyarrow")


# ---------------------------------------------------------------------------------------------------- the machinery

class Ready(NamedTuple):
    """What a contender returns once it has set up and warmed up."""

    output: np.ndarray  # to be equal to the other contenders'
    work: Callable[[], Any]  # one round
    note: str = ""


@dataclass
class Case:
    """One table: contenders for one piece of work."""

    subject: str
    title: str
    unit: str  # of `amount`
    amount: float  # done in one round
    contenders: dict[str, tuple[Callable[..., Ready], dict]]  # row: function and arguments; the first is what others are compared with
    tolerance: Any = 0.0  # largest difference of outputs, for all or for each element
    difference: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda own, first: np.abs(own - first)
    together: bool = False  # contenders may set up at the same time
    derived: Callable[[dict[str, float]], str] = lambda rates: ""  # a line under the table, from the rates by row


def contend(pipe, contender: Callable[..., Ready], arguments: dict) -> None:
    """A contender's process: set up, then one round whenever asked."""
    began = time.perf_counter()
    try:
        ready = contender(**arguments)
        pipe.send({"output": ready.output, "note": ready.note, "start": time.perf_counter() - began, "memory": peak_memory()})
        while pipe.recv():
            synchronize()
            began = time.perf_counter()
            ready.work()
            synchronize()
            pipe.send({"seconds": time.perf_counter() - began, "memory": peak_memory()})
    except EOFError:  # the parent has gone
        pass
    except Exception as error:
        if not isinstance(error, ImportError):
            traceback.print_exc()
        reason = " ".join(str(error).split())[:200]
        pipe.send({"fault": f"not installed: {reason}" if isinstance(error, ImportError) else f"failed: {type(error).__name__}: {reason}"})


def synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_memory() -> int:
    """Bytes: of tensors on CUDA, else of the larger of this process and its largest child."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return 1024 * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


class Contender:
    """The parent's end of a contender."""

    def __init__(self, name: str, function: Callable[..., Ready], arguments: dict):
        self.name, self.seconds, self.output, self.start, self.memory, self.note, self.fault = name, [], None, None, 0, "", None
        context = multiprocessing.get_context("spawn")  # a fresh interpreter, whatever this process has imported
        self.pipe, child = context.Pipe()
        self.process = context.Process(target=contend, args=(child, function, arguments))
        self.process.start()
        child.close()

    def receive(self) -> dict | None:
        try:
            message = self.pipe.recv()
        except EOFError:
            self.process.join()
            message = {"fault": f"failed: its process ended with {self.process.exitcode}"}
        self.fault = message.get("fault")
        self.memory = max(self.memory, message.get("memory", 0))
        return None if self.fault else message

    def set_up(self) -> None:
        if message := self.receive():
            self.output, self.note, self.start = message["output"], message["note"], message["start"]

    def round(self) -> None:
        self.pipe.send(True)
        if message := self.receive():
            self.seconds.append(message["seconds"])

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send(False)
        self.process.join(60)
        if self.process.is_alive():
            self.process.kill()


def run_case(case: Case, rounds: int) -> dict:
    """Set all contenders up, compare their outputs, time them in turn; the case as JSON values."""
    contenders: list[Contender] = []
    try:
        for name, (function, arguments) in case.contenders.items():
            contenders.append(Contender(name, function, arguments))
            if not case.together:
                contenders[-1].set_up()
        for contender in contenders if case.together else []:
            contender.set_up()
        compare(case, contenders)
        for _ in range(rounds):
            for contender in contenders:
                if not contender.fault:
                    contender.round()
    finally:
        for contender in contenders:
            contender.stop()
    rows = [row_of(case, contender, contenders[0]) for contender in contenders]
    rates = {row["name"]: row["rate"] for row in rows if not row["fault"]}
    return {"subject": case.subject, "title": case.title, "unit": case.unit, "amount": case.amount, "rounds": rounds, "rows": rows,
            "derived": case.derived(rates) if contenders[0].name in rates else ""}


def compare(case: Case, contenders: list[Contender]) -> None:
    """Outputs that differ from the first contender's are a fault."""
    first, *others = [contender for contender in contenders if not contender.fault] or [None]
    for contender in [first, *others] if first else []:
        difference = case.difference(contender.output, first.output)
        if not np.all(difference <= case.tolerance):
            contender.fault = f"outputs differ from those of {first.name} by {difference.max():.2g}, more than {np.max(case.tolerance):.2g}"


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def row_of(case: Case, contender: Contender, first: Contender) -> dict:
    row = {"name": contender.name, "fault": contender.fault, "note": contender.note}
    if contender.fault:
        return row
    seconds = spread(contender.seconds)
    ratio = None if first.fault else spread([own / base for own, base in zip(contender.seconds, first.seconds, strict=True)])
    return row | {"rate": case.amount / seconds["median"], "seconds": seconds, "all_seconds": contender.seconds, "ratio": ratio,
                  "start_seconds": contender.start, "peak_memory": contender.memory}


def table(case: dict) -> str:
    """A case in Markdown."""
    lines = [f"### {case['subject']}: {case['title']}, {case['rounds']} rounds", "",
             f"| | {case['unit']}/s | seconds a round (min–max) | ratio (min–max) | peak GB | start s |", "|---|---|---|---|---|---|"]
    for row in case["rows"]:
        name = row["name"] + (f" ({row['note']})" if row["note"] else "")
        if row["fault"]:
            lines.append(f"| {name} | {row['fault']} | | | | |")
            continue
        s, r = row["seconds"], row["ratio"]
        ratio = f"{r['median']:.2f} ({r['min']:.2f}–{r['max']:.2f})" if r else ""
        rate = f"{row['rate']:,.0f}" if row["rate"] >= 1000 else f"{row['rate']:.3g}"
        lines.append(f"| {name} | {rate} | {s['median']:.3g} ({s['min']:.3g}–{s['max']:.3g}) | {ratio} | {row['peak_memory'] / 1e9:.2f} | {row['start_seconds']:.1f} |")
    return "\n".join(lines + (["", case["derived"]] if case["derived"] else [])) + "\n"


def machine(device: str) -> dict:
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        cpu = next((line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), cpu)
    capabilities = [name for name, there in torch.cpu.get_capabilities().items() if there is True]
    return {"gpu": torch.cuda.get_device_name() if device == "cuda" else None, "cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "capabilities": capabilities, "system": platform.platform(), "python": platform.python_version(), "versions": {p: version(p) for p in PACKAGES}}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# ---------------------------------------------------------------------------------------------------- shared by contenders

def weights(config: GPTConfig, scratch: Path) -> Path:
    """A Hugging Face directory with random weights and GPT-2's tokenizer, made once."""
    folder = scratch / f"{config.n_layer}x{config.n_embd}x{config.vocab_size}"
    if not folder.exists():
        torch.manual_seed(0)
        GPT(config).save_pretrained(folder, bos_token_id=config.vocab_size - 1, eos_token_id=config.vocab_size - 1)
        if config.vocab_size == 50257:
            save_tokenizer(get_encoding("gpt2"), folder)
    return folder


def random_tokens(vocab_size: int, *shape: int) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(1))


def peer_runtime(device: str, dtype: str, keep_memory: bool = True) -> Runtime:
    """Device and dtype without what runtime.start changes in torch and glibc for our own code; keep_memory gives a peer
    the allocator setting."""
    if keep_memory and device == "cpu":
        runtime.keep_freed_memory()
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
    where = torch.device(device)
    return Runtime(0, 1, where, runtime.choose_dtype(dtype, where))


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """No TF32, no gradients."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    with torch.no_grad():
        yield
    torch.set_float32_matmul_precision(precision)


# ---------------------------------------------------------------------------------------------------- train

def train_ours(folder: Path, batch: int, seq_len: int, steps: int, device: str, dtype: str, compiled: bool) -> Ready:
    from train_gpt2 import TrainConfig, make_optimizer, train_step

    rt = runtime.start(device, dtype)
    model = GPT.from_pretrained(folder).to(rt.device).train()
    c = model.config
    config = TrainConfig(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, seq_len=seq_len, micro_batch=batch,
                         total_batch_tokens=batch * seq_len, learning_rate=LEARNING_RATE)
    loss_fn, optimizer = NextTokenLoss(model), make_optimizer(model, config)
    windows = random_tokens(c.vocab_size, batch, seq_len + 1)
    windows = windows.pin_memory() if device == "cuda" else windows
    with exact_float32():
        few = windows[:4].to(rt.device)
        exact = loss_fn(few[:, :-1], few[:, 1:]).item()
    loss_fn = torch.compile(loss_fn, dynamic=False) if compiled else loss_fn
    first = train_step(loss_fn, optimizer, windows, config, rt)[0]
    return Ready(np.array([exact, first]), lambda: [train_step(loss_fn, optimizer, windows, config, rt) for _ in range(steps)])


LEARNING_RATE = 1e-5  # random tokens are learned by heart; nothing must overflow


def train_transformers(folder: Path, batch: int, seq_len: int, steps: int, device: str, dtype: str, compiled: bool, keep_memory: bool) -> Ready:
    """The same step as its users write it, with the strongest options that change no result: fused AdamW, SDPA, the loss
    inside the compiled graph and nothing else returned from it."""
    from transformers import GPT2LMHeadModel

    rt = peer_runtime(device, dtype, keep_memory)
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).to(rt.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    windows = random_tokens(model.config.vocab_size, batch, seq_len + 1)
    windows = windows.pin_memory() if device == "cuda" else windows

    def loss_fn(idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return model(input_ids=idx, labels=targets, shift_labels=targets, use_cache=False).loss

    with exact_float32():
        few = windows[:4].to(rt.device)
        exact = loss_fn(few[:, :-1], few[:, 1:].contiguous()).item()
    loss_fn = torch.compile(loss_fn, dynamic=False) if compiled else loss_fn

    def step(micro_batch: int) -> float:
        total = torch.zeros((), device=rt.device)
        for part in windows.split(micro_batch):
            part = part.to(rt.device, non_blocking=True)
            with rt.autocast():
                loss = loss_fn(part[:, :-1], part[:, 1:].contiguous()) * (len(part) / batch)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total.item()

    micro_batch, first = batch, None
    while first is None:  # the contenders share a GPU's memory: one that needs more than is left accumulates
        with contextlib.suppress(torch.OutOfMemoryError):
            first = step(micro_batch)
        if first is None:
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            micro_batch //= 2
    note = f"micro-batches of {micro_batch}, memory ran out" if micro_batch < batch else ""
    return Ready(np.array([exact, first]), lambda: [step(micro_batch) for _ in range(steps)], note)


def train_case(name: str, config: GPTConfig, batch: int, seq_len: int, steps: int, device: str, dtype: str, scratch: Path, keep_memory: bool) -> Case:
    from train_gpt2 import flops_per_token

    sizes = dict(folder=weights(config, scratch), batch=batch, seq_len=seq_len, steps=steps, device=device, dtype=dtype)
    ours = {"PyGPT2": (train_ours, sizes | {"compiled": False}), "PyGPT2, compiled": (train_ours, sizes | {"compiled": True})}
    if device == "cuda":  # where the recipes compile
        ours = {"PyGPT2, compiled": ours["PyGPT2, compiled"]}
    kept = ", keeping freed memory" if keep_memory and device == "cpu" else ""
    peers = {f"transformers {mode}{kept}": (train_transformers, sizes | {"compiled": mode == "compiled", "keep_memory": keep_memory})
             for mode in ("eager", "compiled")}
    if device == "cpu" and keep_memory:  # measured once is enough
        ours.pop("PyGPT2, compiled")
    peak = runtime.peak_flops(torch.device(device))
    flops = flops_per_token(GPTConfig(config.n_layer, config.n_head, config.n_embd, seq_len, config.vocab_size))

    def derived(rates: dict[str, float]) -> str:
        return "MFU: " + ", ".join(f"{row} {rate * flops / peak:.1%}" for row, rate in rates.items()) if peak else ""

    return Case("train", f"{name}, {batch}×{seq_len}, {dtype}", "tok", steps * batch * seq_len, ours | peers,
                tolerance=np.array([1e-5, 1e-3 if dtype == "bfloat16" else 1e-5]), derived=derived)


def train_cases(device: str, dtype: str, scratch: Path) -> Iterator[Case]:
    if device == "cuda":
        yield train_case("124M", SIZES["gpt2"], 64, 1024, 10, device, dtype, scratch, keep_memory=True)
        return
    small = GPTConfig(n_layer=6, n_head=6, n_embd=384, block_size=256)
    for keep_memory in (False, True):
        yield train_case("124M", SIZES["gpt2"], 4, 512, 1, device, dtype, scratch, keep_memory)
        yield train_case("6 layers × 384", small, 16, 256, 1, device, dtype, scratch, keep_memory)


# ---------------------------------------------------------------------------------------------------- sample

def sample_ours(folder: Path, batch: int, prompt: int, new: int, device: str, dtype: str) -> Ready:
    from sample import generate

    rt = runtime.start(device, dtype)
    model = GPT.from_pretrained(folder).to(rt.device, rt.dtype)
    idx = random_tokens(model.config.vocab_size, batch, prompt).to(rt.device)

    def work() -> torch.Tensor:
        return generate(model, idx, new, temperature=0)

    return Ready([work()[:4].cpu().numpy() for _ in range(2)][-1], work)


def sample_transformers(folder: Path, batch: int, prompt: int, new: int, device: str, dtype: str, compiled: bool) -> Ready:
    from transformers import CompileConfig, GPT2LMHeadModel

    rt = peer_runtime(device, dtype)
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=rt.dtype).to(rt.device).eval()
    model.generation_config.eos_token_id = None
    options = {}
    if compiled:  # its own way: a static cache, the one-token step under torch.compile
        compile_config = CompileConfig(mode="reduce-overhead" if device == "cuda" else "default", fullgraph=True)
        compile_config._compile_all_devices = True
        options = {"cache_implementation": "static", "compile_config": compile_config}
    idx = random_tokens(model.config.vocab_size, batch, prompt).to(rt.device)

    def work() -> torch.Tensor:
        return model.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=new, do_sample=False, **options)

    return Ready([work()[:4].cpu().numpy() for _ in range(2)][-1], work)


def read_weights(folder: Path, times: int, device: str, dtype: str) -> Ready:
    """The bound of decoding at batch 1: the time to read all weights once a token."""
    rt = peer_runtime(device, dtype)
    size = sum(p.numel() for p in GPT.from_pretrained(folder).parameters()) * rt.dtype.itemsize
    buffer = torch.ones(size // 4, device=rt.device)
    buffer.sum()
    return Ready(np.zeros((0, 0), dtype=np.int64), lambda: [buffer.sum() for _ in range(times)], f"{size / 1e6:,.0f} MB")


def regret(folder: Path, prompt: int, own: np.ndarray, first: np.ndarray) -> np.ndarray:
    """How far the log-probability of each generated token is below the likeliest one's, by the model in float32 over
    what was generated so far. Greedy tokens themselves part in bfloat16 where two are as likely."""
    if own.size == 0:
        return np.zeros(1)
    rows = torch.from_numpy(own)
    with torch.no_grad():
        logits = GPT.from_pretrained(folder)(rows[:, :-1])[:, prompt - 1:]  # (rows, new, V)
    return (logits.amax(-1) - logits.gather(-1, rows[:, prompt:, None])[..., 0]).numpy()


def sample_case(name: str, config: GPTConfig, batch: int, prompt: int, new: int, device: str, dtype: str, scratch: Path) -> Case:
    folder = weights(config, scratch)
    sizes = dict(folder=folder, batch=batch, prompt=prompt, new=new, device=device, dtype=dtype)
    contenders = {"PyGPT2": (sample_ours, sizes), "transformers": (sample_transformers, sizes | {"compiled": False}),
                  "transformers compiled, static cache": (sample_transformers, sizes | {"compiled": True})}
    if batch == 1:
        contenders["reading the weights once a token"] = (read_weights, dict(folder=folder, times=new, device=device, dtype=dtype))
    return Case("sample", f"{name}, batch {batch}, prompt {prompt}, {new} new tokens, greedy, {dtype} weights", "tok", batch * new, contenders,
                tolerance=0.05 if dtype == "bfloat16" else 1e-3,
                difference=functools.partial(regret, folder, prompt), together=device == "cuda")


def sample_cases(device: str, dtype: str, scratch: Path) -> Iterator[Case]:
    for batch in (1, 256) if device == "cuda" else (1, 4):
        yield sample_case("124M", SIZES["gpt2"], batch, 32, 256 if device == "cuda" else 64, device, dtype, scratch)


# ---------------------------------------------------------------------------------------------------- hellaswag

def synthetic_items(n: int) -> list:
    """Items of HellaSwag's lengths (a third from WikiHow, longer) made of the words of input.txt."""
    from hellaswag import Item

    words, rng = (ROOT / "input.txt").read_text().split(), np.random.default_rng(0)

    def text(length: float) -> str:
        start = rng.integers(len(words) - 100)
        return " ".join(words[start:start + int(np.clip(length, 2, 70))])

    items = []
    for _ in range(n):
        context, ending = ((50, 6), (28, 4)) if rng.random() < 0.32 else ((28, 10), (20, 9))  # words: mean and deviation
        mean = rng.normal(*ending)
        items.append(Item(text(rng.normal(*context)), tuple(text(rng.normal(mean, 4)) for _ in range(4)), int(rng.integers(4))))
    return items


def find_items(n: int) -> tuple[list, str]:
    """n items evenly from the official file where it is, else synthetic ones."""
    import hellaswag

    if hellaswag.DATA.is_file():
        items = hellaswag.load_items()
        return [items[i] for i in np.linspace(0, len(items) - 1, n).astype(int)], "official"
    return synthetic_items(n), "synthetic"


def score_ours(folder: Path, n: int, device: str, dtype: str) -> Ready:
    from hellaswag import evaluate

    rt = runtime.start(device, dtype)
    model, items = GPT.from_pretrained(folder).to(rt.device), find_items(n)[0]

    def work() -> np.ndarray:
        return evaluate(model, get_encoding("gpt2"), items, rt=rt, progress=False).log_p

    return Ready(work(), work)


def score_plain(folder: Path, n: int, device: str, dtype: str) -> Ready:
    """build-nanogpt's scheme on our model: an item at a time in four padded rows, logits everywhere, masked cross-entropy."""
    rt = peer_runtime(device, dtype)
    model, items, encoding = GPT.from_pretrained(folder).to(rt.device), find_items(n)[0], get_encoding("gpt2")

    def score(item) -> np.ndarray:
        context, endings = encoding.encode_ordinary(item.ctx), [encoding.encode_ordinary(" " + ending) for ending in item.endings]
        tokens = torch.zeros(4, len(context) + max(map(len, endings)), dtype=torch.long)
        mask = torch.zeros(4, tokens.size(1) - 1)
        for k, ending in enumerate(endings):
            tokens[k, :len(context) + len(ending)] = torch.tensor(context + ending)
            mask[k, len(context) - 1:len(context) + len(ending) - 1] = 1
        tokens, mask = tokens.to(rt.device), mask.to(rt.device)
        logits = model(tokens)[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none").view(4, -1)
        return -(losses * mask).sum(1).cpu().numpy()

    def work() -> np.ndarray:
        with torch.no_grad(), rt.autocast():
            return np.stack([score(item) for item in items])

    return Ready(work(), work)


def score_harness(folder: Path, n: int, device: str, dtype: str) -> Ready:
    """lm-evaluation-harness on the same weights, given the same contexts and endings."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import GPT2LMHeadModel, GPT2TokenizerFast

    from hellaswag import render

    rt = peer_runtime(device, dtype)
    model = HFLM(pretrained=GPT2LMHeadModel.from_pretrained(folder, dtype=rt.dtype).to(rt.device), tokenizer=GPT2TokenizerFast.from_pretrained(folder),
                 batch_size=8 if device == "cpu" else 256, device=device)
    texts = [render(item, "completion")[:2] for item in find_items(n)[0]]
    requests = [Instance("loglikelihood", {}, (context, ending), k) for context, endings in texts for k, ending in enumerate(endings)]

    def work() -> np.ndarray:
        return np.array([log_p for log_p, _ in model.loglikelihood(requests, disable_tqdm=True)]).reshape(-1, 4)

    return Ready(work(), work)


def hellaswag_case(name: str, config: GPTConfig, n: int, peers: bool, device: str, dtype: str, scratch: Path) -> Case:
    arguments = dict(folder=weights(config, scratch), n=n, device=device, dtype=dtype)
    contenders = {"PyGPT2": (score_ours, arguments)}
    if peers:
        contenders |= {"one item at a time, as build-nanogpt does": (score_plain, arguments), "lm-evaluation-harness": (score_harness, arguments)}
    # Sums over an ending's tokens, about -320 with random weights.
    return Case("hellaswag", f"{name}, {n:,} {find_items(1)[1]} items, {dtype}", "items", n, contenders, tolerance=0.5 if dtype == "bfloat16" else 2e-3, together=device == "cuda")


def hellaswag_cases(device: str, dtype: str, scratch: Path) -> Iterator[Case]:
    if device == "cuda":
        yield hellaswag_case("124M, the whole set", SIZES["gpt2"], 10_042, False, device, dtype, scratch)
    yield hellaswag_case("124M", SIZES["gpt2"], 500 if device == "cuda" else 40, True, device, dtype, scratch)


# ---------------------------------------------------------------------------------------------------- data

def make_corpus(file: Path, size: int) -> int:
    """JSON lines of about `size` bytes of text in documents of up to 5 kB, FineWeb-Edu's mean: the Python sources installed here."""
    paths = sysconfig.get_paths()
    total = 0
    with open(file, "w") as f:
        for source in (source for folder in (paths["stdlib"], paths["purelib"]) for source in sorted(Path(folder).rglob("*.py"))):
            text = source.read_text(errors="replace")
            for start in range(0, len(text), 5000):
                f.write(json.dumps({"text": text[start:start + 5000]}) + "\n")
            total += len(text.encode(errors="replace"))
            if total >= size:
                break
    return total


def read_corpus(file: Path) -> Iterator[str]:
    with open(file) as f:
        yield from (json.loads(line)["text"] for line in f)


def digest(parts: list[np.ndarray]) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(np.concatenate(parts).astype("<u2").tobytes()).digest(), dtype=np.uint8).astype(int)


def prepare_ours(file: Path, workers: int, shard_tokens: int) -> Ready:
    import fineweb

    def work() -> list[np.ndarray]:
        with tempfile.TemporaryDirectory(dir=file.parent) as out:
            fineweb.prepare(fineweb.PrepareConfig(input=(str(file),), out=out, workers=workers, shard_tokens=shard_tokens), say=lambda *lines: None)
            shards = sorted(Path(out).glob("*.bin"), key=lambda shard: shard.stem[-6:])
            return [np.fromfile(shard, "<u2", offset=HEADER_BYTES) for shard in shards]

    return Ready(digest(work()), work)


def encode_document(text: str) -> np.ndarray:
    encoding = get_encoding("gpt2")
    return np.array([encoding.eot_token, *encoding.encode_ordinary(text)]).astype(np.uint16)


def prepare_plain(file: Path, workers: int, shard_tokens: int) -> Ready:
    """build-nanogpt's scheme: a pool, one document per task, lists of Python integers, shards as .npy."""
    def work() -> list[np.ndarray]:
        with tempfile.TemporaryDirectory(dir=file.parent) as out, multiprocessing.get_context("fork").Pool(workers) as pool:
            shard, fill, shards = np.empty(shard_tokens, dtype=np.uint16), 0, []
            for tokens in pool.imap(encode_document, read_corpus(file), chunksize=16):
                while fill + len(tokens) >= shard_tokens:
                    n = shard_tokens - fill
                    shard[fill:], tokens, fill = tokens[:n], tokens[n:], 0
                    np.save(f"{out}/{len(shards)}", shard)
                    shards.append(shard.copy())
                shard[fill:fill + len(tokens)] = tokens
                fill += len(tokens)
            np.save(f"{out}/{len(shards)}", shard[:fill])
            return [*shards, shard[:fill]]

    return Ready(digest(work()), work)


def tiktoken_alone(file: Path) -> Ready:
    encoding = get_encoding("gpt2")
    documents, eot = list(read_corpus(file)), np.array([encoding.eot_token], dtype=np.uint32)

    def work() -> list[np.ndarray]:
        return [tokens for text in documents for tokens in (eot, encoding.encode_to_numpy(text, disallowed_special=()))]

    return Ready(digest(work()), work)


def data_case(size: int, workers: int, shard_tokens: int, scratch: Path) -> Case:
    file = scratch / "corpus.jsonl"
    size = make_corpus(file, size)
    both = dict(file=file, workers=workers, shard_tokens=shard_tokens)
    alone = "tiktoken alone, 1 process"
    return Case("data", f"{size / 1e6:.0f} MB of Python sources, {workers} workers", "MB", size / 1e6,
                {"PyGPT2 (fineweb.prepare)": (prepare_ours, both), "one document a task, as build-nanogpt does": (prepare_plain, both),
                 alone: (tiktoken_alone, dict(file=file))},
                derived=lambda rates: f"{rates['PyGPT2 (fineweb.prepare)'] / rates[alone] / workers:.0%} of workers × tiktoken alone" if alone in rates else "")


def data_cases(device: str, dtype: str, scratch: Path) -> Iterator[Case]:
    yield data_case(100_000_000, min(8, os.cpu_count()), 10_000_000, scratch)


# ---------------------------------------------------------------------------------------------------- load

LOAD_OURS = "import sys, torch; from model import GPT; model = GPT.from_pretrained(sys.argv[1]); forward = model"
LOAD_TRANSFORMERS = ("import sys, torch; from transformers import GPT2LMHeadModel; model = GPT2LMHeadModel.from_pretrained(sys.argv[1]).eval(); "
                     "forward = lambda idx: model(idx).logits")
SHOW_LOGITS = "; torch.set_grad_enabled(False); print(forward(torch.arange(8)[None])[0, -1, :50].tolist())"


def fresh_process(arguments: list[str], check: str = "") -> Ready:
    """A round is a whole Python process. check: code to append once that prints the outputs."""
    def run(*command: str) -> str:
        process = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
        if process.returncode:
            last = (process.stderr.strip().splitlines() or ["no message"])[-1]
            raise (ImportError if "ModuleNotFoundError" in last else RuntimeError)(last)
        return process.stdout

    run(*arguments)
    output = np.array(json.loads(run("-c", arguments[1] + check, *arguments[2:]))) if check else np.zeros(0)
    return Ready(output, lambda: run(*arguments))


def load_case(name: str, config: GPTConfig, scratch: Path) -> Case:
    folder = str(weights(config, scratch))
    return Case("load", f"{name}, float32 on the CPU, a fresh process with its imports", "loads", 1, {
        row: (fresh_process, dict(arguments=["-c", code, folder], check=SHOW_LOGITS))
        for row, code in (("PyGPT2", LOAD_OURS), ("transformers", LOAD_TRANSFORMERS))}, tolerance=1e-4)


def start_case() -> Case:
    scripts = ("train_gpt2.py", "sample.py", "hellaswag.py", "fineweb.py")
    commands = {"import torch": ["-c", "import torch"]} | {f"{script} --help": [script, "--help"] for script in scripts}
    return Case("load", "start-up, beside torch alone", "starts", 1, {row: (fresh_process, dict(arguments=command)) for row, command in commands.items()})


def load_cases(device: str, dtype: str, scratch: Path) -> Iterator[Case]:
    yield load_case("124M", SIZES["gpt2"], scratch)
    yield start_case()


# ---------------------------------------------------------------------------------------------------- command line

SUBJECTS = {"load": load_cases, "sample": sample_cases, "hellaswag": hellaswag_cases, "train": train_cases, "data": data_cases}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", choices=[*SUBJECTS, "all"])
    parser.add_argument("--rounds", type=int, default=5, help="times that each contender works (5)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="of matrix products; auto: bfloat16 where the hardware has it")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    if args.rounds < 1:
        raise UserError(f"--rounds {args.rounds}", expected="1 or more", remedy="5 is a good start")
    device = runtime.choose_device(args.device)
    dtype = str(runtime.choose_dtype(args.dtype, device)).removeprefix("torch.")
    now = datetime.now(timezone.utc)
    figures = {"command": " ".join(["python", *sys.argv]), "date": now.isoformat(timespec="seconds"), "machine": machine(device.type), "cases": []}
    files = [args.json] if args.json else []
    if args.subject == "all":
        folder = Path("bench") / now.strftime("%Y-%m-%dT%H%M%SZ")
        folder.mkdir(parents=True)
        files.append(folder / "all.json")
    print(f"{figures['date']}, {figures['machine']['gpu'] or figures['machine']['cpu']}, {figures['machine']['threads']} threads, "
          + ", ".join(f"{name} {number or 'not installed'}" for name, number in figures["machine"]["versions"].items()), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for subject in SUBJECTS if args.subject == "all" else [args.subject]:
            for case in SUBJECTS[subject](device.type, dtype, Path(scratch)):
                figures["cases"].append(run_case(case, args.rounds))
                print("", table(figures["cases"][-1]), sep="\n", end="", flush=True)
                for file in files:  # after each case: what is measured stays, whatever comes
                    file.write_text(json.dumps(figures, indent=2) + "\n")
                    if args.subject == "all":
                        (folder / "tables.md").write_text("\n".join(map(table, figures["cases"])))
    faults = [f"{case['title']}: {row['name']} {row['fault']}" for case in figures["cases"] for row in case["rows"]
              if row["fault"] and not row["fault"].startswith("not installed")]
    if faults:
        raise UserError("; ".join(faults), expected="equal outputs and no failures", remedy="see above")


if __name__ == "__main__":
    run_script(main)
