"""One trunk and its cool-downs against a run for each budget; and a finished run trained on.

    python benchmarks/recipes.py trunk                      # three seeds; about an hour of one core
    python benchmarks/recipes.py trunk --steps 1200         # a third of the budget
    python benchmarks/recipes.py trunk --seeds 11           # one of the seeds

The first run's model and corpus. All runs are made by train_gpt2.py as a user would start it, and
measured by its --eval-only on the whole validation split. Each finished run is one JSON line of
--results. What has its line is not repeated, and what was interrupted goes on from its checkpoint,
so the same command goes on. Two processes may have different --seeds.
"""

import json
import os
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from results import add_result, difference, read_results

from support.plot import draw_curves
from support.script import require, say

ROOT = Path(__file__).resolve().parents[1]

BUDGETS = (0.25, 0.5, 1.0)  # of the steps
DECAY = 0.2  # the part of a budget in which the trunk cools down
WARMUP = 0.05  # of the shortest budget for the trunk, else of the run's own
SEEDS = (11, 12, 13)


@dataclass(frozen=True)
class PlannedRun:
    """A run of train_gpt2.py."""

    name: str
    steps: int  # where it ends
    flags: tuple[str, ...]  # beside those that all runs share
    trunk: str = ""  # the run that it is forked from
    forked_at: int = 0

    @property
    def trained(self) -> int:
        """Steps that this run costs by itself."""
        return self.steps - self.forked_at


def planned_runs(steps: int) -> list[PlannedRun]:
    """All runs of a seed. Each comes after the one that it is forked from."""
    require(steps % 80 == 0, f"--steps {steps}; expected a multiple of 80; for example 3600")
    runs = []
    for budget in BUDGETS:
        length = round(budget * steps)
        runs.append(linear(f"linear-{budget:g}", length, ()))
    warmup = round(WARMUP * BUDGETS[0] * steps)
    runs.append(wsd("trunk", steps, ("--warmup-steps", str(warmup))))
    for budget in BUDGETS[:-1]:  # the trunk's own cool-down is that of the whole budget
        length = round(budget * steps)
        begin = round((1 - DECAY) * length)
        runs.append(wsd(f"cooled-{budget:g}", length, (), "trunk", begin))
    runs.append(linear("linear-2", 2 * steps, ()))
    runs.append(PlannedRun("finished-on", 2 * steps, (), "linear-1", steps))
    begin = round((1 - DECAY) * steps)
    runs.append(wsd("trunk-on", 2 * steps, (), "trunk", begin))
    return runs


def linear(name: str, steps: int, flags: tuple[str, ...]) -> PlannedRun:
    warmup = ("--warmup-steps", str(round(WARMUP * steps)))
    return PlannedRun(name, steps, ("--schedule", "linear", *warmup, *flags))


def wsd(
    name: str, steps: int, flags: tuple[str, ...], trunk: str = "", forked_at: int = 0
) -> PlannedRun:
    decay = ("--schedule", "wsd", "--decay-steps", str(round(DECAY * steps)))
    return PlannedRun(name, steps, (*decay, *flags), trunk, forked_at)


def run_all(steps: int, seeds: tuple[int, ...], results: Path, runs: Path, picture: Path) -> None:
    """Make what is missing, print the table, draw the first seed's runs."""
    folder = runs / f"trunk-{steps}"
    for planned in planned_runs(steps):
        for seed in seeds or SEEDS:
            if not any(
                is_result_of(found, planned, seed) for found in read_results(results, "trunk")
            ):
                out = folder / f"{planned.name}-seed{seed}"
                train(planned, seed, steps, folder, out)
                add_result(results, result_of(planned, seed, validation_loss(out)))
    report(steps, results)
    drawn = ("linear-0.25", "linear-0.5", "linear-1", "trunk", "cooled-0.25", "cooled-0.5")
    of_one_seed = [folder / f"{name}-seed{(seeds or SEEDS)[0]}" for name in drawn]
    found = [run for run in of_one_seed if run.exists()]
    if found:
        draw_curves(found, picture)


def train(planned: PlannedRun, seed: int, steps: int, folder: Path, out: Path) -> None:
    """Start a run, or go on with it."""
    flags = ["--out", out, "--resume", "--max-steps", planned.steps, "--eval-tokens", 16_384]
    flags += ["--sample-every", 0, "--hellaswag-every", 0, "--device", "cpu", *planned.flags]
    if planned.trunk:
        fork = folder / f"{planned.trunk}-seed{seed}" / f"step_{planned.forked_at:06d}"
        flags += ["--fork", fork, "--eval-every", steps // 80, "--save-every", steps]
    else:
        # Checkpoints where the trunk is forked: at 0.8 of a quarter, of a half, of the whole.
        flags += ["--recipe", "first-run", "--seed", seed, "--eval-every", steps // 40]
        flags += ["--save-every", steps // 5, "--keep", 100]
    say(f"{out}")
    call("train_gpt2.py", *flags)


def validation_loss(run: Path) -> float:
    """Of the newest checkpoint, on the whole validation split; in nats per byte."""
    data = json.loads((run / "train.json").read_text())["data"]
    data = data if isinstance(data, list) else [data]
    flags = [
        "--eval-only",
        "--init-from",
        run,
        "--data",
        *data,
        "--eval-tokens",
        2**30,
        "--micro-batch",
        64,
    ]
    out = call("train_gpt2.py", *flags, "--device", "cpu")
    return float(re.search(r"validation loss (\S+)", out)[1])


def call(script: str, *args) -> str:
    """What a script prints; it is started as a user would start it."""
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    require(done.returncode == 0, f"{' '.join(command)}: exit code {done.returncode}; see above")
    return done.stdout


# ------------------------------------------------------------------------------------- results


def is_result_of(result: dict, planned: PlannedRun, seed: int) -> bool:
    identity = (result["recipe"], result["steps"], result["seed"])
    return identity == (planned.name, planned.steps, seed)


def result_of(planned: PlannedRun, seed: int, loss: float) -> dict:
    return {
        "experiment": "trunk",
        "size": "0.8M",
        "recipe": planned.name,
        "seed": seed,
        "steps": planned.steps,
        "trained": planned.trained,
        "val_loss": loss,
    }


# What each way of training is compared with.
COMPARED = {
    "cooled-0.25": "linear-0.25",
    "cooled-0.5": "linear-0.5",
    "trunk": "linear-1",
    "finished-on": "linear-2",
    "trunk-on": "linear-2",
}


def report(steps: int, results: Path) -> None:
    """A Markdown table: losses by seed, and the difference from a run planned with that budget."""
    say("| run | steps | trained | loss by seed | mean | less the separate run's |")
    say("|---|---|---|---|---|---|")
    losses = {}
    for planned in planned_runs(steps):
        found = [
            result
            for result in read_results(results, "trunk")
            if is_result_of(result, planned, result["seed"])
        ]
        losses[planned.name] = {result["seed"]: result["val_loss"] for result in found}
        if found:
            by_seed = [losses[planned.name][seed] for seed in sorted(losses[planned.name])]
            other = losses.get(COMPARED.get(planned.name, ""), {})
            cells = [
                planned.name,
                f"{planned.steps:,}",
                f"{planned.trained:,}",
                ", ".join(f"{loss:.4f}" for loss in by_seed),
                f"{statistics.mean(by_seed):.4f}",
                difference(losses[planned.name], other),
            ]
            say(f"| {' | '.join(cells)} |")
