"""Subject `gpu`: what is worth knowing of a GPU that is lent for some minutes, without a network.

The tables come in the order of their worth, and each is written as soon as it is done: training
124M, where a step's time goes, decoding, the optimizers, HellaSwag.
"""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from generation import Work as Decoding
from generation import sample_case
from harness import Case, Ready, Setting
from scoring import hellaswag_case, score_ours
from training import Work, make_work, our_step, train_case, train_ours, train_transformers

from model import GPT, SIZES


def gpu(setting: Setting) -> Iterator[Case]:
    work = make_work(setting, SIZES["gpt2"], sequences_that_fit(setting), T=1024, steps=10)
    contenders = {
        "PyGPT2, compiled": (train_ours, work, True, work.B),
        "transformers, compiled": (train_transformers, work, True, work.B, True),
    }
    yield train_case("124M", SIZES["gpt2"], work, contenders)
    yield profile_case(work)
    folder = setting.weights(scale=setting.size(4, 8))
    for B in (1, setting.size(256, 4)):
        decoding = Decoding(setting, folder, B, setting.size(32, 8), setting.size(128, 8))
        yield sample_case(decoding, only_ours=True)
    yield optimizers_case(setting)
    yield hellaswag_case(setting, setting.size(10_042, 4), {"PyGPT2": score_ours})


def sequences_that_fit(setting: Setting) -> int:
    """A micro-batch of 1,024 tokens each that leaves room for transformers' step at 124M too."""
    if setting.device != "cuda":
        return 4
    memory = torch.cuda.get_device_properties(0).total_memory
    return 64 if memory > 70e9 else 16 if memory > 22e9 else 4


# ---------------------------------------------------------------------------- where the time goes

PROFILED = 3  # steps


class Kernel(NamedTuple):
    name: str
    start: float  # microseconds
    end: float


def profile_case(work: Work) -> Case:
    contenders = {"PyGPT2, compiled": (profiled_steps, work)}
    tokens = work.steps * work.B * work.T
    return Case(f"where a step goes, {work.B}×{work.T}", "tok", tokens, contenders)


def profiled_steps(work: Work) -> Ready:
    """Training as in `train_ours`, with what the profiler says of a few steps as its note."""
    exact, step = our_step(work, compiled=True, micro_batch=work.B)
    step()
    step()
    kind = torch.autograd.DeviceType.CUDA if work.setting.device == "cuda" else None
    with torch.profiler.profile() as profile:
        for _ in range(PROFILED):
            step()
        if kind:
            torch.cuda.synchronize()
    kernels = [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in profile.events()
        if kind in (None, event.device_type) and not event.is_user_annotation
    ]
    rounds = lambda: [step() for _ in range(work.steps)]  # noqa: E731
    return Ready(np.array([exact]), rounds, describe(kernels))


def describe(kernels: list[Kernel], most: int = 12) -> str:
    """The kernels that take most of the time, and how long none was running."""
    span = max(kernel.end for kernel in kernels) - min(kernel.start for kernel in kernels)
    times, calls = Counter(), Counter()
    for kernel in kernels:
        times[kernel.name] += kernel.end - kernel.start
        calls[kernel.name] += 1
    lines = [
        f"A step took {span / PROFILED / 1000:.1f} ms; in {1 - busy(kernels) / span:.1%} of it no "
        f"kernel ran. {sum(calls.values()) // PROFILED:,} kernels a step, the longest:",
        "",
        "| kernel | calls a step | ms a step | share |",
        "|---|---|---|---|",
    ]
    for name, time in times.most_common(most):
        shown = name.replace("|", "¦").replace("\n", " ")[:90]
        shares = f"{calls[name] / PROFILED:.3g} | {time / PROFILED / 1000:.2f} | {time / span:.1%}"
        lines.append(f"| `{shown}` | {shares} |")
    return "\n".join(lines)


def busy(kernels: list[Kernel]) -> float:
    """Microseconds in which at least one kernel ran."""
    total, reached = 0.0, -np.inf
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        total += max(0.0, kernel.end - max(kernel.start, reached))
        reached = max(reached, kernel.end)
    return total


# ---------------------------------------------------------------------------- optimizers


def optimizers_case(setting: Setting) -> Case:
    contenders = {name: (optimizer_steps, setting, name.lower()) for name in ("AdamW", "Muon")}
    return Case("the optimizer's part of a step at 124M", "steps", 10, contenders, tolerance=np.inf)


def optimizer_steps(setting: Setting, name: str) -> Ready:
    from train_gpt2 import TrainConfig, build_optimizer

    rt = setting.our_runtime()
    model = GPT.from_pretrained(setting.weights()).to(rt.device)
    optimizer = build_optimizer(model, TrainConfig(optimizer=name, learning_rate=1e-5, min_lr=0.0))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)

    def work() -> None:
        for _ in range(10):
            optimizer.step()

    work()
    return Ready(np.zeros(1), work)
