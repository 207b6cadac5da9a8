"""Does an average of the weights along the way pay? Measured before the rate falls and at the end.

    python benchmarks/recipes.py averages                # three seeds; half an hour of one core
    python benchmarks/recipes.py averages --seeds 11     # one of the seeds

The first run's model and corpus. Three averages of the weights are updated after each step: two
exponential ones, and the plain mean of the last twentieth of the steps (latest weight averaging,
Kaddour, 2022). Training does not see them. Each is measured in the model's place where the rate of
a `wsd` run begins to fall, and at the end.
"""

import copy
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from results import add_result, difference, read_results

from model import GPT, NextTokenLoss
from support.optimizer import set_learning_rate
from support.runtime import start
from support.script import say
from tokens import get_encoding, token_bytes
from train_gpt2 import (
    RECIPES,
    TrainConfig,
    build_optimizer,
    evaluate,
    learning_rate,
    load_data,
    step_batch,
    train_step,
)

SEEDS = (11, 12, 13)
SCHEDULES = ("linear", "wsd")
WARMUP = 0.05  # of the steps
DECAY = 0.2  # of the steps, in which the rate of wsd falls
WINDOW = 0.05  # of the steps, for the plain mean
EVAL_TOKENS = 262_144


def share_of_newest(steps: int) -> dict[str, Callable[[int], float]]:
    """Each average's name, and how much of the newest weights it takes after update `step`."""

    def exponential(decay: float) -> Callable[[int], float]:
        # The first updates are forgotten sooner, or the initial weights would count for long.
        return lambda step: 1 - min(decay, step / (step + 9))

    def window(step: int) -> float:
        """The plain mean of the last WINDOW of the steps before a measurement."""
        length = round(WINDOW * steps)
        for measured_at in points(steps):
            into = step - (measured_at - length)
            if 0 < into <= length:
                return 1 / into
        return 0.0

    return {"0.98": exponential(0.98), "0.99": exponential(0.99), "window": window}


def points(steps: int) -> tuple[int, int]:
    return round((1 - DECAY) * steps), steps


def run_all(steps: int, seeds: tuple[int, ...], results: Path) -> None:
    """Make what is missing, and print the table."""
    for seed in seeds or SEEDS:
        for schedule in SCHEDULES:
            if not find(results, schedule, seed, steps):
                config = replace(
                    RECIPES["first-run"],
                    seed=seed,
                    schedule=schedule,
                    max_steps=steps,
                    warmup_steps=round(WARMUP * steps),
                    decay_steps=round(DECAY * steps) if schedule == "wsd" else 0,
                    device="cpu",
                )
                result = {"experiment": "averages", "size": "0.8M", "recipe": schedule}
                result |= {"seed": seed, "steps": steps, "losses": train_and_measure(config)}
                add_result(results, result)
    report(steps, results)


def find(results: Path, schedule: str, seed: int, steps: int) -> dict | None:
    for result in read_results(results, "averages"):
        if (result["recipe"], result["seed"], result["steps"]) == (schedule, seed, steps):
            return result
    return None


def train_and_measure(config: TrainConfig) -> dict[str, dict[str, float]]:
    """By step, the validation losses of the weights and of their averages, in nats per byte."""
    rt = start(config.device, config.dtype)
    data = load_data(config, rt)
    (corpus,) = data.corpora.values()
    bytes_per_token = token_bytes(get_encoding("bytes"))
    measuring = replace(config, eval_tokens=EVAL_TOKENS, micro_batch=64)
    torch.manual_seed(config.seed)
    model = GPT(config.shape(data.encoding))
    optim = build_optimizer(model, config, rt)
    loss_fn = NextTokenLoss(model)
    shares = share_of_newest(config.max_steps)
    averages = {name: copy.deepcopy(model) for name in shares}
    losses = {}
    for step in range(1, config.max_steps + 1):
        set_learning_rate(optim, learning_rate(step - 1, config))
        batch = step_batch(data, config, (step - 1) * config.sequences_per_step, 0, 1)
        train_step(loss_fn, optim, batch, config, rt, step - 1)
        for name, average in averages.items():
            mix(average, model, shares[name](step))
        if step in points(config.max_steps):
            found = {}
            for name, weights in {"weights": model, **averages}.items():
                result = evaluate(weights, corpus.val, measuring, rt, bytes_per_token)
                found[name] = result["val_loss"]
            losses[str(step)] = found
            say(f"{config.schedule}, seed {config.seed}, step {step}: {found}")
    return losses


@torch.no_grad()
def mix(average: GPT, model: GPT, share: float) -> None:
    for mean, newest in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(newest, share)


def report(steps: int, results: Path) -> None:
    """A Markdown table: mean losses, and what each average gains on the weights."""
    say("| schedule | step | the weights | 0.98 | 0.99 | window |", "|---|---|---|---|---|---|")
    for schedule in SCHEDULES:
        of_schedule = [
            result
            for result in read_results(results, "averages")
            if (result["recipe"], result["steps"]) == (schedule, steps)
        ]
        for step in points(steps) if of_schedule else ():
            losses = {result["seed"]: result["losses"][str(step)] for result in of_schedule}
            weights = {seed: found["weights"] for seed, found in losses.items()}
            cells = [schedule, f"{step:,}", f"{statistics.mean(weights.values()):.4f}"]
            for name in ("0.98", "0.99", "window"):
                averaged = {seed: found[name] for seed, found in losses.items()}
                cells.append(difference(averaged, weights))
            say(f"| {' | '.join(cells)} |")
