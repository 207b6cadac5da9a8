"""The harness: contenders in processes of their own, compared and then timed in turn.

Every contender is set up in a fresh process, so that neither its allocator nor its threads touch
another's, and waits while others work: A B C, A B C, ..., each round timed inside its process. What
they compute is compared before the first round; a contender whose outputs differ is not timed.
"""

import contextlib
import importlib.metadata
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

# Python puts only this folder there; the modules that are measured are one above it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model import GPT, SIZES, GPTConfig
from support import runtime
from support.huggingface import save_tokenizer
from support.runtime import Runtime, keep_freed_memory
from tokens import get_encoding

ROOT = Path(__file__).resolve().parents[1]
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


# ---------------------------------------------------------------------------------------- subjects


class Ready(NamedTuple):
    """What a contender returns once it has set up and warmed up."""

    output: np.ndarray  # equal to the other contenders'
    work: Callable[[], Any]  # one round
    note: str = ""  # Markdown that is printed under the table


def absolute_difference(output: np.ndarray, first: np.ndarray) -> np.ndarray:
    return np.abs(output - first)


def no_remark(rows: dict[str, dict]) -> str:
    return ""


@dataclass
class Case:
    """One table: contenders for one piece of work."""

    title: str
    unit: str
    amount: float  # of the unit, done in a round
    # By row: a function that returns Ready, followed by its arguments.
    contenders: dict[str, tuple]
    # The largest difference from the first row's output, one for all elements or one for each.
    tolerance: Any = 0.0
    difference: Callable[[np.ndarray, np.ndarray], np.ndarray] = absolute_difference
    # A line under the table, made from the rows that were timed.
    remark: Callable[[dict[str, dict]], str] = no_remark
    # Contenders may set up at the same time: they fit in memory, and compile on many cores.
    set_up_together: bool = False


@dataclass(frozen=True)
class Setting:
    """What every contender works with."""

    device: str  # cpu or cuda
    dtype: str  # float32 or bfloat16
    scratch: Path
    tiny: bool  # the sizes of the tests

    def our_runtime(self) -> Runtime:
        """The runtime as our scripts start it."""
        return runtime.start(self.device, self.dtype)

    def peer_runtime(self, keep_memory: bool = True) -> Runtime:
        """A runtime for a peer, without what `runtime.start` changes in torch.

        keep_memory: give it our allocator setting all the same.
        """
        if self.device == "cpu" and keep_memory:
            keep_freed_memory()
        if self.device == "cuda":
            torch.set_float32_matmul_precision("high")
        return Runtime(device=torch.device(self.device), dtype=getattr(torch, self.dtype))

    def size(self, full: int, tiny: int) -> int:
        return tiny if self.tiny else full

    def weights(self, config: GPTConfig = SIZES["gpt2"], scale: int = 1) -> str:
        """A Hugging Face directory with random weights and GPT-2's tokenizer, made once.

        scale: a factor on the matrices of the blocks.
        """
        if self.tiny:
            config = GPTConfig(2, 2, 64, config.block_size)
        name = f"{config.n_layer}x{config.n_embd}x{config.block_size}x{scale}"
        folder = self.scratch / name
        if not folder.exists():
            torch.manual_seed(0)
            model = GPT(config)
            scale_blocks(model, scale)
            model.save_pretrained(folder, bos_token_id=50256, eos_token_id=50256)
            save_tokenizer(get_encoding("gpt2"), folder)
        return str(folder)


@torch.no_grad()
def scale_blocks(model: GPT, scale: int) -> None:
    for block in model.transformer.h:
        for parameter in block.parameters():
            if parameter.dim() == 2:
                parameter.mul_(scale)


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(50257, shape, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------------------------- processes


def contend(pipe, contender: Callable[..., Ready], arguments: tuple, alone: bool) -> None:
    """A contender's process: set up, then work one round whenever asked.

    alone: it leaves a GPU's memory to the others between rounds.
    """
    # The start method of our scripts, which is the system's, and not what started this process.
    multiprocessing.set_start_method(None, force=True)
    start = time.perf_counter()
    try:
        ready = contender(*arguments)
        pipe.send(
            {
                "output": ready.output,
                "start_seconds": time.perf_counter() - start,
                "peak_memory": peak_memory(),
                "note": ready.note,
            }
        )
        while pipe.recv():
            pipe.send(timed_round(ready.work, alone))
    except EOFError:  # the parent has gone
        pass
    except ImportError as error:
        pipe.send({"fault": f"not installed: {error}"})
    except Exception as error:
        traceback.print_exc()
        reason = " ".join(str(error).split())[:200]
        pipe.send({"fault": f"failed: {type(error).__name__}: {reason}"})


def timed_round(work: Callable[[], Any], alone: bool) -> dict:
    """Seconds and peak memory of one round."""
    on_cuda = torch.cuda.is_initialized()
    if on_cuda:
        if alone:
            work()  # takes the memory back, untimed
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    work()
    if on_cuda:
        torch.cuda.synchronize()
    figures = {"seconds": time.perf_counter() - start, "peak_memory": peak_memory()}
    if on_cuda and alone:
        torch.cuda.empty_cache()
    return figures


def peak_memory() -> int:
    """Bytes: of tensors on CUDA, else of the larger of this process and its largest child."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status")
    if status.exists():  # Linux counts the parent's memory into a child's ru_maxrss
        kilobytes = int(status.read_text().partition("VmHWM:")[2].split()[0])
    return 1024 * max(kilobytes, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)


class Contender:
    """The parent's end of a contender's process."""

    def __init__(self, name: str, alone: bool, function: Callable[..., Ready], *arguments):
        self.name = name
        self.output = None
        self.seconds = []
        self.facts = {"fault": None, "peak_memory": 0}
        context = multiprocessing.get_context("spawn")  # a fresh interpreter
        self.pipe, child = context.Pipe()
        self.process = context.Process(target=contend, args=(child, function, arguments, alone))
        self.process.start()
        child.close()

    def wait_until_ready(self) -> None:
        self.output = self.receive().get("output")

    def receive(self) -> dict:
        """The process's next message, whose facts are remembered."""
        try:
            message = self.pipe.recv()
        except EOFError:
            self.process.join()
            message = {"fault": f"failed: its process ended with {self.process.exitcode}"}
        message["peak_memory"] = max(message.get("peak_memory", 0), self.facts["peak_memory"])
        for key, value in message.items():
            if key not in ("output", "seconds"):
                self.facts[key] = value
        return message

    def work_a_round(self) -> None:
        if not self.facts["fault"]:
            self.pipe.send(True)
            self.seconds.append(self.receive().get("seconds"))

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send(False)
        self.process.join(60)
        if self.process.is_alive():
            self.process.kill()


# ---------------------------------------------------------------------------------------- a case


def run_case(case: Case, rounds: int) -> dict:
    """Set all contenders up, compare their outputs, time them in turn.

    Returns the results as values that JSON can hold.
    """
    contenders: list[Contender] = []
    try:
        set_up(case, contenders)
        compare_outputs(case, contenders)
        busy = busy_cores()
        for _ in range(rounds):
            for contender in contenders:
                contender.work_a_round()
    finally:
        for contender in contenders:
            contender.stop()
    rows = {contender.name: row_of(case, contender, contenders[0]) for contender in contenders}
    timed = {name: row for name, row in rows.items() if not row["fault"]}
    return {
        "title": case.title,
        "unit": case.unit,
        "amount": case.amount,
        "rounds": rounds,
        "busy_cores": busy,
        "rows": rows,
        "remark": case.remark(timed),
    }


def set_up(case: Case, contenders: list[Contender]) -> None:
    """Start the case's contenders and add them to the list, where the caller can stop them."""
    alone = not case.set_up_together
    for name, (function, *arguments) in case.contenders.items():
        contenders.append(Contender(name, alone, function, *arguments))
        if alone:
            contenders[-1].wait_until_ready()
    if not alone:
        for contender in contenders:
            contender.wait_until_ready()


def compare_outputs(case: Case, contenders: list[Contender]) -> None:
    """Mark as faulty whoever computes something else than the first that works."""
    sound = [contender for contender in contenders if not contender.facts["fault"]]
    for contender in sound:
        difference = case.difference(contender.output, sound[0].output)
        if not np.all(difference <= case.tolerance):  # NaN is a difference too
            contender.facts["fault"] = (
                f"outputs differ from those of {sound[0].name} by up to {difference.max():.2g}, "
                f"more than {case.tolerance}"
            )


def row_of(case: Case, contender: Contender, first: Contender) -> dict:
    """A row of the table. Its ratio to the first row is taken within each round."""
    row = contender.facts
    if row["fault"]:
        return row
    row["all_seconds"] = contender.seconds
    row["seconds"] = spread(contender.seconds)
    row["rate"] = case.amount / row["seconds"][0]
    row["ratio"] = None
    if not first.facts["fault"]:
        pairs = zip(contender.seconds, first.seconds, strict=True)
        row["ratio"] = spread([seconds / base for seconds, base in pairs])
    return row


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, least and largest."""
    return statistics.median(values), min(values), max(values)


def busy_cores() -> float | None:
    """Cores that others keep busy, over a second in which we do nothing; None but on Linux."""
    if not Path("/proc/stat").exists():
        return None
    start = busy_ticks()
    time.sleep(1)
    return (busy_ticks() - start) / os.sysconf("SC_CLK_TCK")


def busy_ticks() -> int:
    fields = Path("/proc/stat").read_text().split()[1:8]
    user, nice, system, _idle, _iowait, irq, softirq = map(int, fields)
    return user + nice + system + irq + softirq


# ---------------------------------------------------------------------------------------- output


def table(result: dict) -> str:
    """A case in Markdown."""
    busy = ""
    if result["busy_cores"] is not None:
        busy = f", {result['busy_cores']:.1f} cores busy with other work"
    lines = [
        f"### {result['title']}, {result['rounds']} rounds{busy}",
        "",
        f"| | {result['unit']}/s | seconds a round (min–max) | ratio (min–max) "
        "| peak GB | start s |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        if row["fault"]:
            lines.append(f"| {name} | {row['fault']} | | | | |")
        else:
            lines.append(f"| {name} | {' | '.join(figures_of(row))} |")
    lines.append("")
    notes = [row.get("note") for row in result["rows"].values()]
    for text in [result["remark"], *notes]:
        if text:
            lines += [text, ""]
    return "\n".join(lines)


def figures_of(row: dict) -> list[str]:
    """The cells of a row that was timed."""
    rate = f"{row['rate']:,.0f}" if row["rate"] >= 1000 else f"{row['rate']:.3g}"
    seconds = "{:.3g} ({:.3g}–{:.3g})".format(*row["seconds"])
    ratio = ""
    if row["ratio"]:
        ratio = "{:.3g} ({:.3g}–{:.3g})".format(*row["ratio"])
    return [
        rate,
        seconds,
        ratio,
        f"{row['peak_memory'] / 1e9:.2f}",
        f"{row['start_seconds']:.1f}",
    ]


def machine(device: str) -> dict:
    """What the figures were measured on."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        versions[name] = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    capabilities = torch.cpu.get_capabilities()
    return {
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capabilities": [name for name, has_it in capabilities.items() if has_it is True],
        "system": platform.platform(),
        "versions": versions,
    }


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(": ")[2]
    return platform.processor()
