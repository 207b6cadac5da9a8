"""Pictures of runs: what is drawn is what the logs say, whatever else stands in them."""

import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from tools import run_main

from support import plot
from support.script import UserError

STEPS = 100


def write_run(
    folder: Path,
    loss: float = 3.1,
    hellaswag: bool = False,
    steps: int = STEPS,
    trunk: Path | None = None,
    **config,
) -> Path:
    """A run whose training loss falls to `loss`, validated at every 50th step.

    trunk: the run that it was forked from, at step 50; its log begins with that run's.
    """
    events = []
    if trunk:
        config["origin"] = {"run": str(trunk), "step": 50, "samples": 400, "weights": "0"}
        events = [event for event in read_events(trunk) if event["step"] <= 50]
    for step in range(51 if trunk else 0, steps + 1):
        if step:
            events.append(
                entry("train", step, loss=loss + 8 / step, lr=1 / step, elapsed=step / 10)
            )
        if step % 50 == 0:
            events.append(entry("eval", step, val_loss=loss + 0.002 * (STEPS - step)))
    if hellaswag:
        events.append(entry("hellaswag", steps, acc=0.3, acc_norm=0.31))
    events.append({"event": "sample", "step": steps, "text": "To be"})
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    values = {"n_layer": 12, "data": "novel.txt", "tokenizer": "gpt2", "seed": 1}
    values |= {"max_steps": STEPS, "out": str(folder), "origin": None}
    (folder / "train.json").write_text(json.dumps(values | config))
    return folder


def read_events(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def entry(event: str, step: int, **values) -> dict:
    return {"event": event, "step": step, "tokens": 1000 * step, **values}


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """draw(runs, …) gives the figure that draw_curves saves."""
    saved = []
    savefig = Figure.savefig

    def remember(self, *args, **kwargs):
        saved.append(self)
        savefig(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", remember)

    def draw(*runs: Path, **how) -> Figure:
        plot.draw_curves(list(runs), tmp_path / "c.png", **how)
        assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
        return saved[-1]

    return draw


def labels(figure: Figure) -> list[str]:
    """What stands in the legends, OpenAI's lines left out."""
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
    texts = [text.get_text() for legend in legends if legend for text in legend.get_texts()]
    return [text for text in texts if "OpenAI" not in text]


def lines(axes) -> list[np.ndarray]:
    """The points (n, 2) of each line and mark, in the order in which they were drawn."""
    return [line.get_xydata() for line in axes.get_lines()]


# ------------------------------------------------------------------------------ what is drawn


def test_a_curve_has_the_points_of_the_log(tmp_path, draw):
    figure = draw(write_run(tmp_path / "a", steps=30, max_steps=30))
    training = lines(figure.axes[0])[0]
    steps = np.arange(1, 31)
    np.testing.assert_allclose(training, np.stack([1000 * steps, 3.1 + 8 / steps], axis=1))
    assert labels(figure) == ["training (3.367)", "validation (3.300)"]


def test_several_runs_are_drawn_on_the_same_axes_and_hellaswag_beside_them(tmp_path, draw):
    figure = draw(
        write_run(tmp_path / "a", 3.1, hellaswag=True, learning_rate=1e-3),
        write_run(tmp_path / "b", 3.2, learning_rate=2e-3),
    )
    assert len(figure.axes) == 2
    assert labels(figure) == [
        "a: learning_rate 0.001 (validation 3.100, acc_norm 31.00%)",
        "b: learning_rate 0.002 (validation 3.200)",
        "training",
        "validation",
        "chance (25%)",
    ]


def test_validation_starts_within_the_picture(tmp_path, draw):
    """Not at ln V, from where a line would cross all of a short run's picture."""
    run = write_run(tmp_path / "a")
    log = (run / "log.jsonl").read_text().replace('"val_loss": 3.3', '"val_loss": 11.0')
    (run / "log.jsonl").write_text(log)
    _, validation = lines(draw(run).axes[0])[:2]
    assert validation[:, 0].tolist() == [50_000, 100_000]


def test_fine_tuning_shows_the_loss_that_it_starts_from(tmp_path, draw):
    _, validation = lines(draw(write_run(tmp_path / "a", init_from="gpt2")).axes[0])[:2]
    assert validation[:, 0].tolist() == [0, 50_000, 100_000]


@pytest.mark.parametrize(
    "steps,points,of_each", [(30, 30, 1), (100, 20, 5), (800, 160, 5), (19_073, 199, 96)]
)
def test_a_training_curve_is_thinned_to_means(steps, points, of_each):
    """Between the least and the largest of the steps that a point stands for."""
    values = np.random.default_rng(0).normal(size=steps)
    curve = plot.thinned(plot.Curve(np.arange(float(steps)), values, values, values))
    assert (len(curve.mean), curve.steps) == (points, of_each)
    np.testing.assert_allclose(curve.mean[0], values[:of_each].mean())
    np.testing.assert_allclose(curve.mean[-1], values[(points - 1) * of_each :].mean())
    assert curve.low[0] == values[:of_each].min()
    assert curve.high[0] == values[:of_each].max()
    assert curve.x[-1] == steps - 1


def test_seeds_of_one_configuration_are_drawn_as_their_mean(tmp_path, draw):
    for seed, loss in ((1, 3.0), (2, 3.2), (3, 3.4)):
        write_run(tmp_path / f"s{seed}", loss, seed=seed, started={"date": seed})
    write_run(tmp_path / "other", 3.4, learning_rate=1)
    figure = draw(*plot.find_runs([tmp_path]))
    assert labels(figure)[1] == "s1, mean of 3 (validation 3.200)"
    _, _, _, validation = lines(figure.axes[0])[:4]
    np.testing.assert_allclose(validation[-2:, 1], [3.3, 3.2])
    bands = [band.get_paths()[0].vertices[:, 1] for band in figure.axes[0].collections]
    assert (bands[-1].min(), bands[-1].max()) == pytest.approx((3.0, 3.6))


def test_what_is_not_learned_does_not_part_seeds_and_anything_else_does(tmp_path):
    runs = [
        plot.read_run(write_run(tmp_path / "a", seed=1, learning_rate=1)),
        plot.read_run(write_run(tmp_path / "b", seed=2, learning_rate=1, eval_every=7)),
        plot.read_run(write_run(tmp_path / "c", seed=2, learning_rate=2)),
        plot.read_run(write_run(tmp_path / "d", seed=2, learning_rate=2, started={"code": "x"})),
    ]
    groups = plot.arrange(runs)
    assert [[run.name for run in group.runs] for group in groups] == [["a", "b"], ["c"], ["d"]]
    assert [group.differs for group in groups] == [
        "learning_rate 1",
        "learning_rate 2",
        "learning_rate 2, code x",
    ]


def test_two_runs_of_one_seed_are_not_two_seeds(tmp_path):
    seeds = {"a": 1, "a-again": 1, "b": 2, "b-again": 2, "c": 3}
    runs = [plot.read_run(write_run(tmp_path / name, seed=seed)) for name, seed in seeds.items()]
    groups = [[run.name for run in group.runs] for group in plot.arrange(runs)]
    assert groups == [["a", "b", "c"], ["a-again", "b-again"]]


def test_the_legend_says_first_what_the_fewest_share(tmp_path, draw):
    """As much as fits of what differs; the hash of the code last, for all its rarity."""
    for n in range(3):
        write_run(tmp_path / f"base-{n}", recipe="first-run", schedule="cosine", warmup_steps=n)
    low = {"recipe": "first-run", "warmup_steps": 0, "dropout": 0.0}
    write_run(tmp_path / "low", schedule="wsd", started={"code": "abcdef0123"}, **low)
    write_run(tmp_path / "other", recipe="of another name", schedule="linear")
    figure = draw(*plot.find_runs([tmp_path]))
    assert labels(figure)[3:5] == [
        "low: schedule wsd, dropout 0.0, warmup_steps 0, … (validation 3.100)",
        "other: recipe of another name, schedule linear (validation 3.100)",
    ]


def test_an_unfinished_run_stands_apart_and_says_how_far_it_came(tmp_path, draw):
    runs = [write_run(tmp_path / f"s{seed}", seed=seed) for seed in (1, 2)]
    stopped = write_run(tmp_path / "s3", seed=3, steps=60)
    assert labels(draw(*runs, stopped))[:2] == [
        "s1, mean of 2 (validation 3.100)",
        "s3 (validation 3.200 at step 60 of 100)",
    ]
    assert draw(stopped).axes[0].get_xlabel() == "training tokens, at step 60 of 100"


def test_seeds_are_averaged_as_far_as_the_shortest_goes():
    short, long = (
        plot.Curve(np.array(x), np.array(y), np.array(y), np.array(y))
        for x, y in (([1.0, 2, 3], [1.0, 2, 3]), ([2.0, 4], [4.0, 4]))
    )
    for order in ([short, long], [long, short]):
        assert plot.mean_curve(order).x[-1] <= 3
    np.testing.assert_allclose(plot.mean_curve([short, long]).mean, [2.5, 3, 3.5])


def test_a_diverged_run_does_not_set_the_scale(tmp_path, draw):
    runs = [write_run(tmp_path / name, learning_rate=name) for name in "abc"]
    _, alone = draw(*runs).axes[0].get_ylim()
    worse = write_run(tmp_path / "worse", 5.0, learning_rate=4)
    diverged = write_run(tmp_path / "diverged", 9.0, learning_rate=5)
    figure = draw(*runs, diverged)
    assert figure.axes[0].get_ylim()[1] == pytest.approx(alone)
    assert "diverged: learning_rate 5 (validation 9.000)" in labels(figure)
    assert draw(*runs, worse).axes[0].get_ylim()[1] > 5.0


def test_many_runs_have_a_legend_that_stays_on_the_page(tmp_path, draw):
    runs = [
        write_run(
            tmp_path / f"shakespeare-muon-{number}", learning_rate=number, weight_decay=number
        )
        for number in range(1, plot.MOST_LABELS + 3)
    ]
    figure = draw(*runs[:22])
    legend = figure.legends[0].get_window_extent()
    page = figure.bbox
    assert len(labels(figure)) == 22
    assert legend.x0 >= 0 and legend.y0 >= 0 and legend.x1 <= page.x1
    assert legend.y1 <= figure.axes[0].get_tightbbox().y0
    figure = draw(*runs)
    assert len(labels(figure)) == plot.MOST_LABELS + 1
    assert labels(figure)[-1] == "and 2 more"


def test_the_best_checkpoint_is_marked_beside_the_last_value(tmp_path, draw, capsys):
    run = write_run(tmp_path / "a")
    (run / "best.json").write_text('{"step": 50, "val_loss": 3.05}')
    figure = draw(run)
    assert labels(figure)[-2:] == ["validation (3.100)", "best checkpoint (3.050 at step 50)"]
    (star,) = (line for line in figure.axes[0].get_lines() if line.get_marker() == "*")
    assert star.get_xydata().tolist() == [[50_000, 3.05]]


def test_a_validation_far_below_the_training_loss_is_in_the_picture(tmp_path, draw):
    run = write_run(tmp_path / "a", steps=50, max_steps=50)
    log = (run / "log.jsonl").read_text().replace('"val_loss": 3.2', '"val_loss": 1.2')
    (run / "log.jsonl").write_text(log)
    bottom, _ = draw(run).axes[0].get_ylim()
    assert bottom < 1.2


# ------------------------------------------------------------------------------ mixtures


def write_mixture(folder: Path, **config) -> Path:
    """A run that is validated on two corpora beside their mean, of which one falls from ln V."""
    run = write_run(folder, data=["code=0.5", "novel=0.5"], **config)
    events = read_events(run)
    for event in events:
        if event["event"] == "eval":
            event["val_loss code"] = event["val_loss"] - 2 if event["step"] else 11.0
            event["val_loss novel"] = 7.0
    (run / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return run


def test_a_single_run_of_a_mixture_has_a_line_for_each_corpus(tmp_path, draw):
    run = write_mixture(tmp_path / "a")
    figure = draw(run)
    assert labels(figure)[1:] == [
        "validation (3.100)",
        "validation code (1.100)",
        "validation novel (7.000)",
    ]
    _, validation, code, novel = figure.axes[0].get_lines()
    assert [line.get_linestyle() for line in (validation, code, novel)] == ["-", "--", ":"]
    low, high = figure.axes[0].get_ylim()
    assert low < 1.1 and 7 < high < 9
    both = draw(run, write_run(tmp_path / "b", learning_rate=1))
    assert len(both.axes[0].get_lines()) == 4
    *_, fork = lines(draw(write_mixture(tmp_path / "branch", trunk=run)).axes[0])
    assert fork.tolist() == [[50_000, pytest.approx(3.2)]]


def test_several_numbers_share_a_picture(tmp_path, monkeypatch, draw):
    runs = [write_mixture(tmp_path / name, learning_rate=name) for name in "ab"]
    figure = draw(*runs, y=["val_loss code", "val_loss novel"])
    assert labels(figure) == [
        "a: learning_rate a (val_loss novel 7)",
        "b: learning_rate b (val_loss novel 7)",
        "val_loss code",
        "val_loss novel",
    ]
    drawn = [(line.get_color(), line.get_linestyle()) for line in figure.axes[0].get_lines()]
    assert drawn == [("C0", "-"), ("C0", "--"), ("C1", "-"), ("C1", "--")]
    assert figure.axes[0].get_ylabel() == "val_loss code, val_loss novel"
    assert figure.axes[0].get_ylim()[1] < 9
    monkeypatch.chdir(tmp_path)
    assert run_main(plot.main, "a", "--y", "val_loss code", "lr") == 0


def test_numbers_that_are_asked_for_are_drawn_of_any_number_of_runs(tmp_path, draw):
    runs = [
        write_run(tmp_path / f"{number}", learning_rate=number)
        for number in range(1, plot.MOST_TRAINING_CURVES + 2)
    ]
    assert len(lines(draw(*runs).axes[0])) == len(runs)
    assert len(lines(draw(*runs, y=["loss", "val_loss"]).axes[0])) == 2 * len(runs)


# ------------------------------------------------------------------------------ forks


def test_a_fork_is_marked_where_it_left_its_trunk(tmp_path, draw):
    trunk = write_run(tmp_path / "trunk")
    branch = write_run(tmp_path / "branch", 2.9, trunk=trunk, learning_rate=1)
    figure = draw(branch)
    assert "fork" in labels(figure)
    _, validation, mark = lines(figure.axes[0])[:3]
    assert mark.tolist() == [[50_000, pytest.approx(3.2)]]
    assert validation[:, 0].tolist() == [0, 50_000, 100_000]


@pytest.mark.parametrize("moved", [False, True])
def test_a_branch_begins_on_its_trunk_if_that_is_drawn_too(moved, tmp_path, draw):
    trunk = write_run(tmp_path / "runs" / "trunk", steps=150, max_steps=150)
    branch = write_run(tmp_path / "runs" / "branch", 2.9, trunk=trunk)
    if moved:
        (tmp_path / "runs").rename(tmp_path / "elsewhere")
        trunk, branch = (tmp_path / "elsewhere" / run.name for run in (trunk, branch))
    figure = draw(trunk, branch)
    assert "fork" in labels(figure)
    of_branch = [line.get_xydata() for line in figure.axes[0].get_lines()][2:]
    training, validation, mark = of_branch
    assert training[0, 0] == validation[0, 0] == mark[0, 0] == 50_000
    assert validation[0, 1] == mark[0, 1] == pytest.approx(3.2)  # the trunk's value
    assert labels(figure)[:2] == [
        "trunk: max_steps 150 (validation 3.000)",
        "branch: max_steps 100, forked_at 50 (validation 2.900)",
    ]


def test_forks_of_several_seeds_are_averaged(tmp_path, draw):
    trunks = [write_run(tmp_path / f"trunk-{seed}", seed=seed) for seed in (1, 2)]
    branches = [
        write_run(tmp_path / f"branch-{seed}", 2 + seed, trunk=trunk, seed=seed)
        for seed, trunk in enumerate(trunks)
    ]
    assert "branch-0, mean of 2: forked_at 50 (validation 2.500)" in labels(
        draw(*trunks, *branches)
    )


# ------------------------------------------------------------------------------ axes


def test_any_number_of_the_log_can_be_drawn_against_any_axis(tmp_path, draw):
    run = write_run(tmp_path / "a", steps=30, max_steps=30)
    figure = draw(run, x="seconds", y=["lr"])
    steps = np.arange(1, 31)
    np.testing.assert_allclose(lines(figure.axes[0])[0], np.stack([steps / 10, 1 / steps], axis=1))
    assert figure.axes[0].get_xlabel() == "seconds of training"
    assert figure.axes[0].get_ylabel() == "lr"
    figure = draw(write_run(tmp_path / "b"), x="seconds")  # a validation's seconds are its step's
    assert lines(figure.axes[0])[1][-2:, 0].tolist() == [5, 10]
    figure = draw(run, x="steps")
    assert lines(figure.axes[0])[1][0, 0] == 0


def test_a_metric_of_ones_own_is_drawn_from_whatever_event_has_it(tmp_path, draw):
    run = write_run(tmp_path / "a")
    with open(run / "log.jsonl", "a") as log:
        log.write(json.dumps(entry("mine", 40, cloze=0.5)) + "\n")
        log.write(json.dumps(entry("mine", 90, cloze=0.75)) + "\n")
    figure = draw(run, y=["cloze"])
    assert lines(figure.axes[0])[0].tolist() == [[40_000, 0.5], [90_000, 0.75]]
    assert labels(figure) == ["cloze (0.75)"]


def test_a_number_that_no_log_has_is_refused_with_those_that_there_are(tmp_path, draw):
    with pytest.raises(UserError, match="--y nope: .* elapsed, loss, lr, step, tokens, val_loss"):
        draw(write_run(tmp_path / "a"), y=["nope"])


@pytest.mark.parametrize(
    "data", [["edu_fineweb10B"], "edu_fineweb10B", "edu_fineweb10B/", "/data/edu_fineweb10B"]
)
def test_openais_loss_is_drawn_on_fineweb_edu_wherever_it_lies(data, tmp_path, draw):
    figure = draw(write_run(tmp_path / "a", data=data))
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert "OpenAI GPT-2, same size (3.2924)" in texts


def test_openais_loss_is_not_drawn_on_other_data(tmp_path, draw):
    figure = draw(write_run(tmp_path / "a"))
    assert not any("OpenAI" in text.get_text() for text in figure.axes[0].get_legend().get_texts())


@pytest.mark.parametrize("tokenizer,unit", [("bytes", "byte"), ("gpt2", "token")])
def test_the_axis_names_the_unit_of_the_loss(tokenizer, unit, tmp_path, draw):
    figure = draw(write_run(tmp_path / "a", tokenizer=tokenizer))
    assert figure.axes[0].get_ylabel() == f"loss (nats per {unit})"


def test_losses_of_different_encodings_are_said_not_to_be_comparable(tmp_path, capsys, draw):
    runs = [write_mixture(tmp_path / name, tokenizer=name) for name in ("bytes", "gpt2")]
    for run in runs:
        log = (run / "log.jsonl").read_text().replace("val_loss novel", "bits_per_byte")
        (run / "log.jsonl").write_text(log)
    said = []
    line = "losses per byte and per token are not comparable; --y bits_per_byte is"
    draw(*runs, say=said.append)
    draw(*runs, y=["val_loss code"], say=said.append)
    assert said == [line, line]
    draw(*runs, y=["bits_per_byte"], say=said.append)
    draw(runs[0], say=said.append)
    assert len(said) == 2
    assert run_main(plot.main, tmp_path, "--table") == 0
    assert capsys.readouterr().out.startswith(line)


# ------------------------------------------------------------------------------ the command line


def test_runs_are_found_in_nested_folders(tmp_path):
    runs = [tmp_path / "a", tmp_path / "sweep" / "b", tmp_path / "sweep" / "deep" / "c"]
    for run in runs:
        write_run(run)
    write_run(tmp_path / "a" / "step_000100" / "not-a-run-of-its-own")
    assert plot.find_runs([tmp_path]) == runs
    assert plot.find_runs([runs[0], tmp_path / "sweep", tmp_path / "sweep"]) == runs


def test_a_folder_without_runs_is_passed_over_beside_one_that_has(tmp_path):
    run = write_run(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    said = []
    assert plot.find_runs([tmp_path / "a", tmp_path / "empty"], said.append) == [run]
    assert said == [f"{tmp_path}/empty: no log.jsonl in it or below it, passed over"]


def test_no_run_at_all_is_an_error_that_names_the_folder(tmp_path, capsys):
    assert run_main(plot.main, tmp_path) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert run_main(plot.main) == 2


def test_a_suffix_that_names_no_picture_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"curves\.doc"):
        plot.draw_curves([write_run(tmp_path / "a")], tmp_path / "curves.doc")


def test_the_table_has_mean_and_deviation_over_seeds(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, loss in ((1, 3.0), (2, 3.2)):
        write_run(tmp_path / "runs" / f"s{seed}", loss, hellaswag=True, seed=seed)
    write_run(tmp_path / "runs" / "t", 2.5, learning_rate=1, steps=60)
    assert run_main(plot.main, "runs", "--table") == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[2] == (
        "| s1 |  | 2 | 100K | 3.1816 ± 0.1414 | 3.1000 ± 0.1414 | 3.1000 ± 0.1414 at step 100 | "
        "31.00% ± 0.00% |"
    )
    assert rows[3].startswith("| t, unfinished at step 60 of 100 | learning_rate 1 | 1 | 60K | ")
    assert rows[3].endswith(" | 2.6000 | 2.6000 at step 50 | – |")
    assert not Path("curves.png").exists()


def test_the_table_has_the_lowest_validation_loss_and_its_step(tmp_path):
    """The step is left out where seeds do not agree. A fork has none of its trunk's."""
    trunk = write_run(tmp_path / "trunk", max_steps=150, steps=150)
    rose = write_run(tmp_path / "rose")
    for run, step in ((trunk, 50), (rose, 50)):
        events = read_events(run)
        for event in events:
            if event["event"] == "eval" and event["step"] == step:
                event["val_loss"] = 2.0
        (run / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    fell = write_run(tmp_path / "fell", seed=2)
    branch = write_run(tmp_path / "branch", trunk=trunk)

    def lowest(*runs: Path) -> list[str]:
        rows = plot.table(plot.arrange([plot.read_run(run) for run in runs])).splitlines()
        return [row.split(" | ")[6] for row in rows[2:]]

    assert lowest(trunk, branch) == ["2.0000 at step 50", "3.1000 at step 100"]
    assert lowest(branch) == ["3.1000 at step 100"]
    assert lowest(rose, fell) == ["2.5500 ± 0.7778"]


# ------------------------------------------------------------------------------ damaged and foreign

FOREIGN_LINES = [
    b"\xff\xfe",
    b"{}",
    b"[]",
    b"7",
    b'{"event": "train", "step": "1", "tokens": 1000, "loss": 3.0}',
    b'{"event": "train", "step": 1, "tokens": 1000, "loss": NaN}',
    b'{"event": "hellaswag", "step": 1, "tokens": 1000}',
    b'{"event": "train", "st',
]


@pytest.mark.parametrize("line", FOREIGN_LINES, ids=range(len(FOREIGN_LINES)))
def test_a_foreign_line_is_passed_over_and_said(line, tmp_path):
    run = write_run(tmp_path / "a")
    expected = plot.read_run(run)
    log = run / "log.jsonl"
    log.write_bytes(line + b"\n" + log.read_bytes())
    said = []
    found = plot.read_run(run, say=said.append)
    assert said == [f"{log}: 1 of its lines are no entries of a log, passed over"]
    assert found.curves.keys() == expected.curves.keys()
    for event, curve in found.curves.items():
        np.testing.assert_array_equal(curve.mean, expected.curves[event].mean)


@pytest.mark.parametrize("name", ["train.json", "best.json"])
@pytest.mark.parametrize("text", [b"", b"[]", b"\xff", b'{"max_steps": "a", "step": {}}'])
def test_a_damaged_file_does_not_stop_the_picture(name, text, tmp_path, draw):
    run = write_run(tmp_path / "a")
    (run / name).write_bytes(text)
    said = []
    draw(run, say=said.append)
    assert said == [f"{run / name}: damaged, passed over"]


def test_an_empty_log_gives_an_empty_picture(tmp_path, draw):
    run = write_run(tmp_path / "a")
    (run / "log.jsonl").write_text("")
    draw(run)


@pytest.mark.parametrize("name", ["$\\write18{x}$", "_hidden", "a\nb", "\udcff", "long" * 60])
def test_a_folders_name_is_drawn_as_text(name, tmp_path, draw):
    figure = draw(write_run(tmp_path / name), write_run(tmp_path / "b", learning_rate=1))
    texts = figure.legends[0].get_texts()
    assert texts[0].get_text().startswith(plot.shown(name, plot.LONGEST_NAME))
    assert not any(text.get_parse_math() for text in texts)


def test_settings_of_the_process_are_ignored_and_left_as_they_were(tmp_path, draw):
    import matplotlib

    with matplotlib.rc_context({"text.usetex": True, "font.family": "no such font"}):
        draw(write_run(tmp_path / "a"))
        assert matplotlib.rcParams["text.usetex"]


def test_several_threads_draw_one_after_the_other(tmp_path, monkeypatch):
    """matplotlib's settings are those of the process."""
    drawing, most = [], []
    savefig = Figure.savefig

    def counted(self, *args, **kwargs):
        drawing.append(self)
        time.sleep(0.1)
        most.append(len(drawing))
        savefig(self, *args, **kwargs)
        drawing.remove(self)

    monkeypatch.setattr(Figure, "savefig", counted)
    run = write_run(tmp_path / "a")
    files = [tmp_path / f"{number}.png" for number in range(3)]
    threads = [threading.Thread(target=plot.draw_curves, args=([run], file)) for file in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1]
    assert len({file.read_bytes() for file in files}) == 1


def test_a_picture_replaces_a_link_instead_of_following_it(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("canary")
    (tmp_path / "curves.png").symlink_to(secret)
    plot.draw_curves([write_run(tmp_path / "a")], tmp_path / "curves.png")
    assert secret.read_text() == "canary"
    assert not (tmp_path / "curves.png").is_symlink()
