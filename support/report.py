"""What a run says before, while and after it trains, and the side work that may fail.

Every line that a person reads of a training run is written here. Nothing here decides what is
learned.
"""

import contextlib
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from support import plan, script
from support.plot import draw_curves
from support.progress import Progress
from support.run_directory import RunDirectory, read_best
from support.runtime import Runtime, multiplies_bfloat16, peak_flops, peak_memory
from support.script import UserError
from support.spikes import SpikeGuard

# --------------------------------------------------------------------------------- before


def runtime_line(rt: Runtime, T: int) -> str:
    """Device, precision, ranks and attention kernels."""
    kernels = [kernel.name for kernel in rt.attention_kernels(T)]
    names = " > ".join(name.removesuffix("_ATTENTION").lower() for name in kernels)
    dtype = str(rt.dtype).removeprefix("torch.")
    ranks = plan.count(rt.world_size, "rank", "ranks")
    line = f"running on     {rt.device.type}, {dtype}, {ranks}, attention kernels {names}"
    if rt.device.type == "cuda" and not multiplies_bfloat16(rt.device):
        line += "\nnote: this GPU has no bfloat16, so it trains in float32, which takes several "
        line += "times as long as on one that has; --dry-run says how long"
    return line


def before(config: Any, model: Any, data: Any, run: RunDirectory, rt: Runtime) -> list[str]:
    """The plan of the run, and where its data and its directory are.

    model: model.GPT. data: tokens.Mixture.
    """
    batch = (config.max_steps, config.total_batch_tokens, config.micro_batch)
    lines = plan.plan(model.config, model.num_parameters(), rt, *batch)
    lines += data_lines(config, data)
    where = f"run directory  {run.folder}"
    if run.step == config.max_steps:
        where += f", complete with {run.step} steps"
    elif run.step:
        where += f", going on after step {run.step}"
    lines += [where, ""]
    if config.warmup_steps > config.max_steps / 2:
        lines.append(
            f"note: {config.warmup_steps} steps of warm-up in a run of {config.max_steps}: the "
            "learning rate grows for most of the run; --warmup-steps shortens it"
        )
    return lines + note_on_busy_cores(rt)


def data_lines(config: Any, data: Any) -> list[str]:
    """The corpora: their tokens, their parts in the mixture, and how often the run reads each."""
    samples = config.max_steps * config.sequences_per_step
    lines = []
    for (name, corpus), share, times in zip(
        data.corpora.items(), data.shares, data.times_read(samples, config.seq_len), strict=True
    ):
        line = f"{'data' if not lines else '':<14} {name}: {len(corpus.train):,} training and "
        line += f"{len(corpus.val):,} validation tokens ({data.encoding})"
        if len(data.corpora) > 1:
            line += f", {share:.1%} of the samples"
        if times >= 2 or len(data.corpora) > 1:
            line += f", read {times:,.1f} times"
        lines.append(line)
    return lines


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


# --------------------------------------------------------------------------------- during


class TrainingProgress:
    """The bar or the lines of a training run, and its speed."""

    def __init__(self, config: Any, sizes: Any, run: RunDirectory, rt: Runtime):
        self.config = config
        self.run = run
        self.rt = rt
        self.first_step = self.step = run.step
        self.validation_loss: float | None = None
        self.losses: list[float] = []  # since the last line
        self.seconds = 0.0  # of training since the start of this process
        self.flops_per_token = plan.flops_per_token(sizes)
        self.peak = peak_flops(rt.device, rt.dtype)
        self.progress = Progress("step", config.max_steps, run.step, enabled=rt.is_main)
        run.listeners.append(self.hear)

    def __enter__(self) -> "TrainingProgress":
        return self

    def __exit__(self, *exc_info) -> None:
        self.progress.close()

    def hear(self, event: str, step: int, values: dict) -> None:
        """Take note of a validation that is logged."""
        if event == "eval":
            self.validation_loss = values["val_loss"]

    def step_done(self, step: int, loss: float, seconds: float) -> dict:
        """Show a step; returns its speed for the log."""
        tokens_per_second = self.config.total_batch_tokens / seconds
        self.step = step
        self.seconds += seconds
        if self.rt.is_main:
            self.losses.append(loss)
        self.progress.update(step, self.describe)
        mfu = self.mfu(tokens_per_second)
        return {"tokens_per_second": round(tokens_per_second, 1), "mfu": mfu}

    def describe(self) -> str:
        """`loss 2.41 (mean of 42)  val 2.19  19.9k tok/s`."""
        text = f"loss {sum(self.losses) / len(self.losses):.3f}"
        if len(self.losses) > 1:
            text += f" (mean of {len(self.losses)})"
        if self.validation_loss is not None:
            text += f"  val {self.validation_loss:.3f}"
        self.losses = []
        return f"{text}  {self.rate / 1000:.1f}k tok/s"

    @property
    def rate(self) -> float:
        """Tokens a second since the start of this process, evaluations and saves left out."""
        steps = self.step - self.first_step
        return steps * self.config.total_batch_tokens / self.seconds

    def mfu(self, tokens_per_second: float) -> float | None:
        """Model FLOPs a second over the devices' peak; None where no peak is known."""
        if not self.peak:
            return None
        return tokens_per_second * self.flops_per_token / (self.peak * self.rt.world_size)

    def summary(self) -> list[str]:
        """What is said at the end of a run: time, last and lowest validation, memory, speed."""
        line = f"Done: {self.seconds:,.0f} s of training"
        if self.first_step:
            line += f" since step {self.first_step}, {self.run.elapsed:,.0f} s in all"
        if self.validation_loss is not None:
            line += f", validation loss {self.validation_loss:.4f} nats per token"
        lines = [line + "."]
        best = read_best(self.run.folder)
        if best:
            lines.append(
                f"Best: step {best['step']}, validation loss {best['val_loss']:.4f}; this one is "
                "loaded where the run is named as a model."
            )
        elif losses := self.run.validation_losses:
            lowest = min(losses, key=losses.get)
            if losses[lowest] < losses[max(losses)]:
                lines.append(
                    f"Lowest: step {lowest}, validation loss {losses[lowest]:.4f}. With "
                    "--keep-best that checkpoint is kept, and loaded for the run."
                )
        if self.step > self.first_step:
            text = f"Peak memory {peak_memory(self.rt.device) / 1e9:.2f} GB"
            text += f", {self.rate:,.0f} tokens per second"
            if self.peak:
                text += f", {self.mfu(self.rate):.1%} of the datasheet's peak"
            lines.append(text + ".")
        return lines


class UpdateLog:
    """Writes what updates have given, one line each in log.jsonl.

    The line of step s has the loss before update s, the s-th of the run. On a GPU it is written
    when update s + 1 has been launched. To read a figure waits until the device has computed it,
    and meanwhile the device must have more to do. So a loss that is not finite ends the run one
    update late. It never reaches a checkpoint, since `finish` comes before each.
    """

    def __init__(
        self, run: RunDirectory, guard: SpikeGuard, progress: TrainingProgress, rt: Runtime
    ):
        self.run = run
        self.guard = guard
        self.progress = progress
        self.rt = rt
        self.unread: tuple[int, float, dict[str, Tensor]] | None = None
        # On a CPU they are there at once. Whoever leaves out spikes has waited for them already.
        self.reads_at_once = rt.device.type == "cpu" or guard.skips
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out of the time of training what was done since the last line."""
        self.began = time.perf_counter()

    def add(self, step: int, rate: float, figures: dict[str, Tensor]) -> None:
        """Take note of an update's scalars, and write the line of the update before it."""
        self.finish()
        self.unread = (step, rate, figures)
        if self.reads_at_once:
            self.finish()

    def finish(self) -> None:
        """Write the line that is not written yet. Ends every rank where its loss is not finite."""
        if self.unread is None:
            return
        (step, rate, scalars), self.unread = self.unread, None
        values = torch.stack([value.float() for value in scalars.values()]).tolist()  # one transfer
        figures = dict(zip(scalars, values, strict=True))
        now = time.perf_counter()
        seconds, self.began = now - self.began, now
        loss, norm = figures["loss"], figures["grad_norm"]
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.rt.raise_on_all(
                UserError(
                    f"update {step}: loss {loss}, gradient norm {norm}; expected finite numbers; "
                    "go on with --resume from the last checkpoint, or start anew with a lower "
                    "--learning-rate"
                )
            )
        self.run.elapsed += seconds
        speed = self.progress.step_done(step, loss, seconds)
        elapsed = round(self.run.elapsed, 3)
        self.run.log("train", step, **figures, lr=rate, **speed, elapsed=elapsed)
        self.watch_for_spikes(step, loss)

    def watch_for_spikes(self, step: int, loss: float) -> None:
        guard = self.guard
        if not guard.skips:  # else the loss was noted before its update
            guard.note(loss)
        if guard.sees_spike:
            self.run.log("spike", step, loss=loss, z=round(guard.z, 2), left_out=guard.skips)
            self.rt.say(spike_line(step, loss, guard))


def validation_line(step: int, result: dict) -> str:
    """What a validation has found, of each corpus where there are several."""
    line = (
        f"step {step:>6}  validation loss {result['val_loss']:.4f} nats per token, "
        f"{result['bits_per_byte']:.4f} bits per byte"
    )
    parts = [
        f"{key.removeprefix('val_loss ')} {loss:.4f}"
        for key, loss in result.items()
        if key.startswith("val_loss ")
    ]
    return f"{line} ({', '.join(parts)})" if parts else line


def spike_line(step: int, loss: float, guard: SpikeGuard) -> str:
    """The warning of a loss that has jumped."""
    outcome = "its update was made; in a new run --skip-spikes would leave such updates out"
    if guard.skips:
        outcome = "its update was left out"
    return (
        f"warning: step {step}: loss {loss:.4f} is a spike, {guard.z:.1f} standard deviations "
        f"above the mean of those before it; {outcome}"
    )


class SideWork:
    """What a run does beside training. A fault there is a warning, once of each kind.

    Not so a lost rank and little memory: training would meet them next.
    """

    def __init__(self, run: RunDirectory, rt: Runtime):
        self.run = run
        self.rt = rt
        self.warned: set[str] = set()

    @contextlib.contextmanager
    def may_fail(self, if_it_fails: str) -> Iterator[None]:
        """Let a block fail, and say then what does not happen and why."""
        try:
            yield
        except Exception as error:
            if script.has_lost_contact(error) or script.is_out_of_memory(error):
                raise
            if if_it_fails not in self.warned:
                self.warned.add(if_it_fails)
                reason = f"{type(error).__name__}: {error}"
                self.rt.say(f"warning: {if_it_fails} ({reason}); training goes on")

    def draw_curves(self) -> None:
        with self.may_fail("no curves are drawn"):
            draw_curves([self.run.folder], self.run.folder / "curves.png")


# --------------------------------------------------------------------------------- after


def how_to_go_on(step: int, config: Any, run: RunDirectory) -> str:
    """The last line of a run that was stopped."""
    if run.last_saved != step:
        return f"stopped after step {step}; this step was not saved, since --save-every is 0"
    flags = ["--out", str(run.folder), "--resume"]
    if config.resume:  # its data may lie elsewhere now than where train.json says
        flags += ["--data", *config.data]
    ranks_here = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if os.environ.get("WORLD_SIZE", "1") != ranks_here:
        return (
            f"stopped after step {step}; to go on: the same command on each machine, with "
            f"{shlex.join(flags)}"
        )
    return f"stopped after step {step}; to go on: {shlex.join([*launcher(), *flags])}"


def launcher() -> list[str]:
    """The command that this process was started with, up to the script's flags."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ["python", sys.argv[0]]
    command = ["torchrun", "--standalone", f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"]
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts != "0":
        command.append(f"--max-restarts={restarts}")
    return [*command, sys.argv[0]]


def what_next(config: Any, run: RunDirectory, encoding: str) -> list[str]:
    """What can be done with the finished run."""
    folder = shlex.quote(str(run.folder))
    if not config.save_every:
        return [f"The log and the curves are in {folder}/. No checkpoint: --save-every is 0."]
    lines = [f"Saved in {folder}/: checkpoints, log.jsonl, curves.png. Next:"]
    lines.append(f"  python sample.py --model {folder} --num-samples 3")
    if config.recipe == "first-run":
        lines.append(f"  python train_gpt2.py --init-from {folder} --data input.txt")
    if encoding != "bytes":  # a model of bytes knows too few words to be asked
        lines.append(f"  python hellaswag.py --model {folder}")
    lines.append(f"  python train_gpt2.py --fork {folder} --max-steps {2 * config.max_steps}")
    return lines
