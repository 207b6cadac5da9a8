"""Recipes compared: a GPT-2 trained with AdamW and with Muon, by sizes, seeds and token budgets.

    python benchmarks/recipes.py tune               # the trials that chose each optimizer's values
    python benchmarks/recipes.py final              # the comparison, on seeds that chose nothing
    python benchmarks/recipes.py tune --size 12M    # the same for a larger model
    python benchmarks/recipes.py speed              # seconds per step, the optimizers in turn
    python benchmarks/recipes.py trunk              # one trunk and its cool-downs; see trunk.py
    python benchmarks/recipes.py averages           # averages of the weights; see averages.py
    python benchmarks/recipes.py report             # tables as Markdown, and the picture

Each finished run is one JSON line of --results. A run that has its line is not repeated, so a
command that was interrupted goes on where it stopped. --only and --seeds share an experiment out
over processes. The rules of the comparison and its outcome are in docs/recipes.md.
"""

import math
import statistics
import sys
import sysconfig
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import averages  # noqa: E402
import trunk  # noqa: E402
from results import add_result, difference, read_results  # noqa: E402

from fineweb import PrepareConfig, prepare  # noqa: E402
from model import GPT, NextTokenLoss  # noqa: E402
from support.optimizer import set_learning_rate  # noqa: E402
from support.runtime import Runtime, start  # noqa: E402
from support.script import UserError, parse_flags, run_script, say  # noqa: E402
from tokens import Mixture, get_encoding, token_bytes  # noqa: E402
from train_gpt2 import (  # noqa: E402
    RECIPES,
    TrainConfig,
    build_optimizer,
    evaluate,
    learning_rate,
    load_data,
    step_batch,
    train_step,
)

# ------------------------------------------------------------------------------- the experiments

# The first run's model and corpus: bytes, 1,024 of them a step.
SMALL = TrainConfig(
    recipe="first-run",
    data=("data/first-run",),
    tokenizer="bytes",
    device="cpu",
    n_layer=4,
    n_head=4,
    n_embd=128,
    seq_len=128,
    total_batch_tokens=1024,
    micro_batch=8,
    eval_tokens=65_536,
    hellaswag_every=0,
    schedule="linear",
    compile=False,
)

STDLIB = sysconfig.get_paths()["stdlib"]
# Corpora of GPT-2 tokens, made when they are first needed.
CORPORA = {
    "data/recipes-gpt2": f"{STDLIB}/*.py",  # the standard library's modules without its packages
    "data/recipes-python": f"{STDLIB}/**/*.py",  # and with all packages that are installed
}


@dataclass(frozen=True)
class Size:
    """A size of the model: what is tried on it, and what its final runs are."""

    config: TrainConfig
    # What each optimizer's trials start from, and what is then changed in it, one value at a time.
    # The final runs have the values of the centres; docs/recipes.md says what the trials found.
    centres: dict[str, dict]
    trials: dict[str, list[dict]]
    tuning_steps: int
    final_steps: int
    final_seeds: tuple[int, ...]
    fractions: tuple[float, ...]  # of the tokens, for Muon; each is a complete run of its own


SMALL_CENTRES = {
    "adamw": {"optimizer": "adamw", "learning_rate": 4e-3, "beta2": 0.99},
    "muon": {"optimizer": "muon", "learning_rate": 16e-3, "muon_learning_rate": 0.02},
}
RATES = {
    "adamw": [{}, {"learning_rate": 2e-3}, {"learning_rate": 8e-3}],
    "muon": [{}, {"muon_learning_rate": 0.01}, {"muon_learning_rate": 0.04}],
}
DECAYS = [{"weight_decay": 0.03}, {"weight_decay": 0.3}]


def larger_size(
    n_layer: int, n_embd: int, steps: int, fractions: tuple[float, ...], **changes
) -> Size:
    """A size on GPT-2 tokens, as far as one core gets: trials are as long as final runs."""
    config = replace(
        SMALL,
        data=("data/recipes-gpt2",),
        tokenizer="gpt2",
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=6,
        eval_tokens=16_384,
    )
    size = Size(
        config=config,
        centres=SMALL_CENTRES,
        trials=RATES,
        tuning_steps=steps,
        final_steps=steps,
        final_seeds=(11, 12, 13),
        fractions=fractions,
    )
    return replace(size, **changes)


SIZES = {
    "0.8M": Size(
        config=SMALL,
        centres=SMALL_CENTRES,
        trials={
            "adamw": [
                *RATES["adamw"],
                {"learning_rate": 1e-3},
                {"beta2": 0.95},
                {"beta2": 0.999},
                *DECAYS,
            ],
            "muon": [
                *RATES["muon"],
                {"learning_rate": 8e-3},
                {"learning_rate": 32e-3},
                {"learning_rate": 64e-3},
                *DECAYS,
            ],
        },
        tuning_steps=1_000,
        final_steps=4_200,
        final_seeds=(11, 12, 13, 14, 15),
        fractions=(1.0, 0.7, 0.5, 0.4, 0.3),
    ),
    # 11.5 and 30 million parameters, most of them in the embedding.
    "12M": larger_size(
        n_layer=4,
        n_embd=192,
        steps=300,
        fractions=(1.0, 0.4, 0.25),
        centres={
            "adamw": {"optimizer": "adamw", "learning_rate": 1e-3, "beta2": 0.99},
            "muon": SMALL_CENTRES["muon"],
        },
        trials={
            "adamw": [{"learning_rate": rate} for rate in (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)],
            "muon": [*RATES["muon"], {"learning_rate": 8e-3}, {"learning_rate": 4e-3}],
        },
    ),
    "30M": larger_size(
        n_layer=6,
        n_embd=384,
        steps=200,
        fractions=(1.0, 0.4),
        # The best rate for AdamW's updates was at first the lowest that had been tried, for either,
        # so each had three trials more.
        centres={
            "adamw": {"optimizer": "adamw", "learning_rate": 5e-4, "beta2": 0.99},
            "muon": {"optimizer": "muon", "learning_rate": 4e-3, "muon_learning_rate": 0.02},
        },
        trials={
            "adamw": [{"learning_rate": rate} for rate in (25e-5, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)],
            "muon": [
                {"learning_rate": 2e-3},
                {},
                {"learning_rate": 8e-3},
                {"learning_rate": 16e-3},
                {"learning_rate": 16e-3, "muon_learning_rate": 0.01},
                {"learning_rate": 16e-3, "muon_learning_rate": 0.04},
            ],
        },
    ),
    # GPT-2's smallest, for one GPU: about 0.4 billion tokens in all.
    "124M": Size(
        config=replace(
            RECIPES["gpt2"],
            data=("data/recipes-python",),
            device="cuda",
            total_batch_tokens=65_536,
            eval_tokens=262_144,
            hellaswag_every=0,
            schedule="linear",
        ),
        centres={
            "adamw": {"optimizer": "adamw", "learning_rate": 1.2e-3, "beta2": 0.99},
            "muon": {"optimizer": "muon", "learning_rate": 3.6e-3, "muon_learning_rate": 0.02},
        },
        trials={
            "adamw": [{}, {"learning_rate": 6e-4}, {"learning_rate": 2.4e-3}],
            "muon": [{}, {"muon_learning_rate": 0.01}, {"muon_learning_rate": 0.04}],
        },
        tuning_steps=400,
        final_steps=1_600,
        final_seeds=(11,),
        fractions=(1.0, 0.4),
    ),
}

TUNING_SEED = 1
TUNING_VAL_TOKENS = 131_072  # of the validation split; a final run is measured on all of it
POINTS = 8  # of a final run's curve


@dataclass(frozen=True)
class Trial:
    """One training run of an experiment."""

    experiment: str
    size: str  # a key of SIZES
    recipe: str  # the name under which runs of several seeds are put together
    config: TrainConfig

    @property
    def changes(self) -> dict:
        """The values of the configuration that are not those of the size."""
        plain = SIZES[self.size].config
        return {
            field.name: getattr(self.config, field.name)
            for field in fields(TrainConfig)
            if getattr(self.config, field.name) != getattr(plain, field.name)
        }


def make_trial(experiment: str, size: str, recipe: str, steps: int, changes: dict) -> Trial:
    """A complete schedule of `steps` steps, a twentieth of them warm-up."""
    schedule = {"max_steps": steps, "warmup_steps": steps // 20}
    config = replace(SIZES[size].config, **(schedule | changes))
    return Trial(experiment, size, recipe, config)


def tuning_trials(size: str) -> list[Trial]:
    """What changes is relative to the optimizer's centre, one trial for each entry of `trials`."""
    plan = SIZES[size]
    trials = []
    for name, centre in plan.centres.items():
        for changes in plan.trials[name]:
            values = centre | changes | {"seed": TUNING_SEED}
            trials.append(make_trial("tune", size, name, plan.tuning_steps, values))
    return trials


def final_trials(size: str) -> list[Trial]:
    plan = SIZES[size]
    trials = []
    for seed in plan.final_seeds:
        adamw = plan.centres["adamw"] | {"seed": seed}
        trials.append(make_trial("final", size, "adamw", plan.final_steps, adamw))
        for fraction in plan.fractions:
            steps = round(plan.final_steps * fraction)
            muon = plan.centres["muon"] | {"seed": seed}
            trials.append(make_trial("final", size, f"muon {fraction:g}", steps, muon))
    return trials


def prepare_corpus(folder: str) -> None:
    """Tokenise a corpus of CORPORA that is not there yet."""
    if folder in CORPORA and not Path(folder, "manifest.json").exists():
        prepare(PrepareConfig(input=(CORPORA[folder],), tokenizer="gpt2", out=folder), say)


# --------------------------------------------------------------------------------- one run


class Training:
    """A model under training, with the clock of its steps."""

    def __init__(self, config: TrainConfig, rt: Runtime):
        self.config = config
        self.rt = rt
        (folder,) = config.data
        prepare_corpus(folder)
        self.data: Mixture = load_data(config, rt)  # of this one corpus
        torch.manual_seed(config.seed)
        self.model = GPT(config.shape(self.data.encoding)).to(rt.device)
        self.loss_fn = NextTokenLoss(self.model)
        if config.compile:
            self.loss_fn = rt.compile(self.loss_fn, config.seq_len)
        self.optimizer = build_optimizer(self.model, config)
        self.step = 0
        self.seconds = 0.0

    def clock(self) -> float:
        """Processor seconds, which other work does not change; on a GPU the clock."""
        if self.rt.device.type == "cuda":
            return time.perf_counter()  # `advance` has waited for the loss
        return time.process_time()

    def advance(self) -> None:
        """One update."""
        began = self.clock()
        set_learning_rate(self.optimizer, learning_rate(self.step, self.config))
        batch = step_batch(self.data, self.config, self.step * self.config.sequences_per_step, 0, 1)
        train_step(self.loss_fn, self.optimizer, batch, self.config, self.rt)["loss"].item()
        self.step += 1
        self.seconds += self.clock() - began

    def validation_loss(self, eval_tokens: float) -> float:
        """Nats per token over the first `eval_tokens` tokens of the validation split, or all."""
        (corpus,) = self.data.corpora.values()
        config = replace(self.config, eval_tokens=min(eval_tokens, len(corpus.val)))
        size = token_bytes(get_encoding(self.data.encoding))
        return evaluate(self.model, corpus.val, config, self.rt, size)["val_loss"]


def run_trial(trial: Trial, rt: Runtime, points: int, val_tokens: float) -> dict:
    """Train to the end of the schedule, and measure the loss on `val_tokens` of validation.

    The curve has `points` points, each measured on config.eval_tokens.
    """
    training = Training(trial.config, rt)
    steps = trial.config.max_steps
    measured_at = {round(steps * i / points) for i in range(1, points + 1)}
    curve = []
    while training.step < steps:
        training.advance()
        if training.step in measured_at:
            loss = training.validation_loss(trial.config.eval_tokens)
            curve.append({"step": training.step, "seconds": training.seconds, "val_loss": loss})
    return {
        "experiment": trial.experiment,
        "size": trial.size,
        "recipe": trial.recipe,
        "changes": trial.changes,
        "seed": trial.config.seed,
        "steps": steps,
        "tokens": steps * trial.config.total_batch_tokens,
        "seconds": training.seconds,
        "val_loss": training.validation_loss(val_tokens),
        "curve": curve,
    }


# ------------------------------------------------------------------------------------- results


def is_result_of(result: dict, trial: Trial) -> bool:
    identity = {
        "experiment": trial.experiment,
        "size": trial.size,
        "recipe": trial.recipe,
        "changes": trial.changes,
    }
    return all(result.get(name) == value for name, value in identity.items())


def run_experiment(
    trials: list[Trial], config: "RecipesConfig", points: int, val_tokens: float
) -> None:
    """Run what --only and --seeds select and --results does not hold yet."""
    rt = start(SIZES[config.size].config.device, config.dtype)
    for trial in trials:
        if config.only and trial.recipe not in config.only:
            continue
        if config.seeds and trial.config.seed not in config.seeds:
            continue
        results = read_results(Path(config.results))
        if any(is_result_of(result, trial) for result in results):
            continue
        result = run_trial(trial, rt, points, val_tokens)
        add_result(Path(config.results), result)
        outcome = f"{result['val_loss']:.4f}  {result['seconds']:.0f} s"
        say(f"{trial.size}  {trial.recipe}  {result['changes']}  {outcome}")


def measure_speed(config: "RecipesConfig", rounds: int = 20, steps: int = 5) -> None:
    """Processor seconds per step, the optimizers in turn so that both see the same machine."""
    plan = SIZES[config.size]
    rt = start(plan.config.device, config.dtype)
    trials = {
        name: make_trial("speed", config.size, name, 10_000, values)
        for name, values in plan.centres.items()
    }
    trainings = {name: Training(trial.config, rt) for name, trial in trials.items()}
    seconds = {name: [] for name in trainings}
    for _ in range(rounds):
        for name, training in trainings.items():
            start_of_round = training.seconds
            for _ in range(steps):
                training.advance()
            seconds[name].append((training.seconds - start_of_round) / steps)
    for name, values in seconds.items():
        median = statistics.median(values[1:])  # the first round warms up
        result = {
            "experiment": "speed",
            "size": config.size,
            "recipe": name,
            "seconds_per_step": median,
        }
        add_result(Path(config.results), result)
        say(f"{name}  {1000 * median:.1f} ms a step")


# -------------------------------------------------------------------------------------- report


def by_recipe(results: list[dict], experiment: str) -> dict[str, dict[int, dict]]:
    """Results of an experiment by recipe and seed."""
    found = {}
    for result in results:
        if result["experiment"] == experiment:
            found.setdefault(result["recipe"], {})[result["seed"]] = result
    return found


def losses(runs: dict[int, dict]) -> dict[int, float]:
    return {seed: run["val_loss"] for seed, run in runs.items()}


def print_tuning(results: list[dict], size: str) -> None:
    say("| optimizer | changed from its centre | validation loss |", "|---|---|---|")
    changes_of_trials = [
        changes for name in SIZES[size].centres for changes in SIZES[size].trials[name]
    ]
    for trial, changes in zip(tuning_trials(size), changes_of_trials, strict=True):
        for result in results:
            if is_result_of(result, trial):
                words = ", ".join(f"{name} {value:g}" for name, value in changes.items())
                say(f"| {trial.recipe} | {words or 'nothing'} | {result['val_loss']:.3f} |")


def print_finals(results: list[dict]) -> None:
    runs = by_recipe(results, "final")
    say(
        "| recipe | steps | seeds | validation loss | less tuned AdamW's |", "|---|---|---|---|---|"
    )
    for recipe, seeds in sorted(runs.items()):
        values = losses(seeds).values()
        spread = f"{statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"
        adamw = {} if recipe == "adamw" else runs.get("adamw", {})
        gap_text = difference(losses(seeds), losses(adamw))
        steps = next(iter(seeds.values()))["steps"]
        say(f"| {recipe} | {steps:,} | {len(seeds)} | {spread} | {gap_text} |")


def tokens_to_equal_loss(results: list[dict]) -> dict[int, float]:
    """For each seed, the part of the tokens with which Muon's complete run ends at AdamW's loss.

    It lies between the two budgets whose losses enclose AdamW's, found linearly in the loss.
    """
    runs = by_recipe(results, "final")
    parts = {}
    for seed, adamw in runs.get("adamw", {}).items():
        budgets = [
            (seeds[seed]["steps"] / adamw["steps"], seeds[seed]["val_loss"])
            for recipe, seeds in runs.items()
            if recipe.startswith("muon") and seed in seeds
        ]
        budgets.sort()
        for (less, worse), (more, better) in zip(budgets, budgets[1:], strict=False):
            if worse > adamw["val_loss"] >= better:
                share = (worse - adamw["val_loss"]) / (worse - better)
                parts[seed] = less + share * (more - less)
    return parts


# Recipes of the finals that are drawn as curves: name in the legend, color, whose speed it has.
CURVES = {
    "adamw": ("AdamW, tuned", "tab:blue", "adamw"),
    "muon 1": ("Muon", "tab:red", "muon"),
}
SHORTER = "Muon, ends of shorter complete runs"


def draw(results: list[dict], file: Path) -> None:
    """The smallest size's loss against tokens and seconds; a band spans the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    speeds = {r["recipe"]: r["seconds_per_step"] for r in results if r["experiment"] == "speed"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for recipe, seeds in by_recipe(results, "final").items():
        curves = [result["curve"] for result in seeds.values()]
        if recipe in CURVES:
            label, color, optimizer = CURVES[recipe]
        else:
            # A shorter run is drawn as its end alone: what it was planned for.
            label, color, optimizer = None, "tab:red", "muon"
            curves = [curve[-1:] for curve in curves]
        million_tokens_per_step = SMALL.total_batch_tokens / 1e6
        _draw_curves(left, curves, million_tokens_per_step, color, label)
        _draw_curves(right, curves, speeds[optimizer], color, label)
    left.plot([], [], color="tab:red", marker="*", markersize=11, linestyle="", label=SHORTER)
    left.legend()
    left.set_xlabel("million bytes of training")
    left.set_ylabel("validation loss, nats per byte")
    right.set_xlabel("seconds of one core")
    for axis in (left, right):
        axis.set_ylim(1.0, 2.0)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def _draw_curves(
    axis, curves: list[list[dict]], scale: float, color: str, label: str | None
) -> None:
    """The seeds' mean against steps times `scale`, and the band of the seeds around it."""
    x = [point["step"] * scale for point in curves[0]]
    losses = [[point["val_loss"] for point in points] for points in zip(*curves, strict=True)]
    mean = [statistics.mean(values) for values in losses]
    low = [min(values) for values in losses]
    high = [max(values) for values in losses]
    if label:
        axis.plot(x, mean, color=color, label=label, marker="o", markersize=4)
        axis.fill_between(x, low, high, color=color, alpha=0.25)
    else:
        axis.plot(x, mean, color=color, marker="*", markersize=11)
        axis.vlines(x, low, high, color=color)


def report(config: "RecipesConfig") -> None:
    results = read_results(Path(config.results))
    if not results:
        raise UserError(
            f"{config.results}: no results; expected one JSON line for each finished run; run the "
            "experiments tune, final and speed first"
        )
    for size in SIZES:
        of_size = [result for result in results if result["size"] == size]
        if not of_size:
            continue
        say(f"## {size}", "")
        print_tuning(of_size, size)
        say("")
        print_finals(of_size)
        parts = tokens_to_equal_loss(of_size)
        words = ", ".join(f"{part:.2f} with seed {seed}" for seed, part in sorted(parts.items()))
        say("", f"Part of the tokens with which Muon ends at tuned AdamW's loss: {words}", "")
    draw([result for result in results if result["size"] == "0.8M"], Path(config.picture))


# ---------------------------------------------------------------------------------------- flags


EXPERIMENTS = ("tune", "final", "speed", "trunk", "averages", "report")


@dataclass(frozen=True)
class RecipesConfig:
    # what to do
    experiment: tyro.conf.Positional[Literal[EXPERIMENTS]]
    size: Literal[tuple(SIZES)] = "0.8M"  # of the model; `report` takes all
    results: str = "docs/recipes.jsonl"  # where each finished run gets its line
    picture: str = "docs/recipes.png"  # where `report` draws
    only: tuple[str, ...] = ()  # recipes of the experiment to run; none: all
    seeds: tuple[int, ...] = ()  # seeds of the experiment to run; none: all
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # dtype of matrix products
    steps: int = 3600  # the budget of the experiments trunk and averages
    runs: str = "runs"  # where its runs are kept
    trunk_picture: str = "docs/trunk.png"  # where it draws


def main() -> None:
    torch.set_num_threads(1)
    config = parse_flags(RecipesConfig, RecipesConfig("report"), __doc__)
    if config.experiment == "tune":
        run_experiment(tuning_trials(config.size), config, 0, TUNING_VAL_TOKENS)
    elif config.experiment == "final":
        run_experiment(final_trials(config.size), config, POINTS, math.inf)
    elif config.experiment == "speed":
        measure_speed(config)
    elif config.experiment == "trunk":
        files = (Path(config.results), Path(config.runs), Path(config.trunk_picture))
        trunk.run_all(config.steps, config.seeds, *files)
    elif config.experiment == "averages":
        averages.run_all(config.steps, config.seeds, Path(config.results))
    else:
        report(config)


if __name__ == "__main__":
    run_script(main)
