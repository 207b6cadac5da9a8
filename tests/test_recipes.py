"""benchmarks/recipes.py: the rules of the comparison, and one line of results for each run."""

import json
import math
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from tools import ROOT, write_bytes_data

sys.path.insert(0, str(ROOT / "benchmarks"))

import averages  # noqa: E402
import recipes  # noqa: E402
import trunk  # noqa: E402
from recipes import SIZES, RecipesConfig, final_trials, tuning_trials  # noqa: E402

from support import launch  # noqa: E402
from train_gpt2 import RECIPES, TrainConfig  # noqa: E402

sizes = pytest.mark.parametrize("size", SIZES)


@sizes
def test_both_optimizers_get_the_same_number_of_different_trials(size):
    trials = tuning_trials(size)
    changes = {
        name: {str(trial.changes) for trial in trials if trial.recipe == name}
        for name in ("adamw", "muon")
    }
    assert len(changes["adamw"]) == len(changes["muon"]) == len(trials) / 2


@sizes
def test_the_seeds_of_final_runs_chose_nothing(size):
    tuned = {trial.config.seed for trial in tuning_trials(size)}
    assert tuned.isdisjoint(trial.config.seed for trial in final_trials(size))


@sizes
def test_every_chosen_rate_has_trials_on_both_sides(size):
    plan = SIZES[size]
    rate_of = {"adamw": "learning_rate", "muon": "muon_learning_rate"}
    for name, rate in rate_of.items():
        tried = [(plan.centres[name] | changes)[rate] for changes in plan.trials[name]]
        assert min(tried) < plan.centres[name][rate] < max(tried)


def shrunk(config: TrainConfig, folder: Path) -> TrainConfig:
    return replace(
        config,
        data=(str(write_bytes_data(folder)),),
        n_layer=1,
        n_embd=16,
        seq_len=16,
        total_batch_tokens=32,
        micro_batch=2,
        eval_tokens=64,
    )


def test_a_finished_run_is_one_line_and_is_not_repeated(tmp_path, monkeypatch):
    tiny = shrunk(SIZES["0.8M"].config, tmp_path / "data")
    monkeypatch.setitem(SIZES, "0.8M", replace(SIZES["0.8M"], config=tiny, final_steps=10))
    config = RecipesConfig("final", results=str(tmp_path / "results.jsonl"), seeds=(11,))
    recipes.run_experiment(final_trials("0.8M"), config, points=2, val_tokens=64)
    results = recipes.read_results(tmp_path / "results.jsonl")
    recipes.run_experiment(final_trials("0.8M"), config, points=2, val_tokens=64)
    assert recipes.read_results(tmp_path / "results.jsonl") == results
    assert [result["steps"] for result in results] == [10, 10, 7, 5, 4, 3]


# ------------------------------------------------------------------------------ the trunk


def test_forks_begin_at_checkpoints_that_the_trunk_saves():
    steps = 3600
    runs = {planned.name: planned for planned in trunk.planned_runs(steps)}
    for planned in runs.values():
        if planned.trunk:
            begins = planned.forked_at
            assert begins % (steps // 5) == 0
            assert begins <= runs[planned.trunk].steps
    cooled = runs["cooled-0.25"]
    assert (cooled.forked_at, cooled.steps, cooled.trained) == (720, 900, 180)


@pytest.fixture
def commands(monkeypatch):
    """The commands of the experiment, none of which is run."""
    commands = []

    def call(script, *args):
        commands.append([script, *map(str, args)])
        if "--eval-only" in args:
            return "validation loss 1.25 nats per token"
        out = Path(args[args.index("--out") + 1])
        out.mkdir(parents=True)
        (out / "train.json").write_text('{"data": "data/first-run"}')
        (out / "log.jsonl").touch()
        return ""

    monkeypatch.setattr(trunk, "call", call)
    return commands


def test_the_trunk_experiment_makes_each_run_once(commands, tmp_path, capsys):
    where = (tmp_path / "results.jsonl", tmp_path / "runs", tmp_path / "trunk.png")
    trunk.run_all(80, (11, 12), *where)
    table = capsys.readouterr().out
    made = len(commands)
    assert made == 2 * 2 * len(trunk.planned_runs(80))  # trained and measured, two seeds
    assert table.count("1.2500, 1.2500") == len(trunk.planned_runs(80))
    assert where[2].exists()
    trunk.run_all(80, (11, 12), *where)
    assert len(commands) == made
    results = [json.loads(line) for line in where[0].read_text().splitlines()]
    assert {result["seed"] for result in results} == {11, 12}


def test_the_commands_of_the_trunk_experiment_are_understood(commands, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for planned in trunk.planned_runs(80):
        trunk.train(planned, 11, 80, Path("runs"), Path("runs", f"{planned.name}-seed11"))
    saved = json.dumps(asdict(RECIPES["first-run"]) | {"seed": 11, "warmup_steps": 1})
    for train_json in Path("runs").glob("*/train.json"):
        train_json.write_text(saved)  # what a fork takes its values from
    for number, (_script, *flags) in enumerate(commands):
        flags[flags.index("--out") + 1] = f"new-{number}"
        config, _ = launch.configuration(TrainConfig, RECIPES, "", flags)
        assert (config.recipe, config.seed) == ("first-run", 11)
        assert config.schedule == "wsd" or not config.decay_steps


# ------------------------------------------------------------------------------ averages


def averaged(share, values: list[float]) -> float:
    mean = 0.0
    for step, value in enumerate(values, start=1):
        mean += share(step) * (value - mean)
    return mean


def test_each_average_is_the_one_that_it_is_called():
    values = [math.sin(step) for step in range(2000)]
    shares = averages.share_of_newest(2000)
    assert math.isclose(averaged(shares["window"], values), statistics.mean(values[-100:]))
    assert math.isclose(
        averaged(shares["window"], values[:1600]), statistics.mean(values[1500:1600])
    )
    for decay in (0.98, 0.99):
        exact = sum((1 - decay) * decay**age * value for age, value in enumerate(values[::-1]))
        assert math.isclose(averaged(shares[str(decay)], values), exact, abs_tol=1e-6)


def test_the_averages_are_measured_once_a_run(tmp_path, monkeypatch, capsys):
    tiny = shrunk(RECIPES["first-run"], tmp_path / "data")
    monkeypatch.setitem(averages.RECIPES, "first-run", tiny)
    monkeypatch.setattr(averages, "EVAL_TOKENS", 64)
    file = tmp_path / "results.jsonl"
    averages.run_all(20, (11, 12), file)
    results = recipes.read_results(file)
    table = capsys.readouterr().out.splitlines()[-4:]
    averages.run_all(20, (11, 12), file)
    assert recipes.read_results(file) == results
    assert [list(result["losses"]) for result in results] == [["16", "20"]] * 4
    for result in results:
        for losses in result["losses"].values():
            assert losses["window"] == losses["weights"]  # a twentieth of 20 is the last update
            assert losses["0.98"] != losses["weights"]
    assert [line.split(" | ")[:2] for line in table] == [
        ["| linear", "16"],
        ["| linear", "20"],
        ["| wsd", "16"],
        ["| wsd", "20"],
    ]
