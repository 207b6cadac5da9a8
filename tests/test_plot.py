"""Pictures of runs: what is drawn is what the logs say, whatever else stands in them."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from tools import run_main, run_python

from support import plot
from support.script import UserError

STEPS = 100


def write_run(folder: Path, loss: float = 3.1, hellaswag: bool = False, **config) -> Path:
    """A run of 100 steps whose training loss falls to `loss`, validated at steps 0, 50 and 100."""
    events = []
    for step in range(1, STEPS + 1):
        events.append(entry("train", step, loss=loss + 8 / step))
    for step, value in ((0, loss + 8), (50, loss + 0.1), (STEPS, loss)):
        events.append(entry("eval", step, val_loss=value))
    if hellaswag:
        events.append(entry("hellaswag", STEPS, acc=0.3, acc_norm=0.31))
    events.append({"event": "sample", "step": STEPS, "text": "To be"})
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    values = {"n_layer": 12, "data": "edu_fineweb10B", "tokenizer": "gpt2", "seed": 1}
    (folder / "train.json").write_text(json.dumps(values | {"out": str(folder)} | config))
    return folder


def entry(event: str, step: int, **values) -> dict:
    return {"event": event, "step": step, "tokens": 1000 * step, **values}


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """The figures that were saved."""
    saved = []
    savefig = Figure.savefig

    def remember(self, *args, **kwargs):
        saved.append(self)
        savefig(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", remember)
    return saved


def labels(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def curves(axes) -> dict[str, np.ndarray]:
    """By label, the points (n, 2) of what is drawn as a line."""
    handles = axes.get_legend().legend_handles
    assert len(handles) == len(labels(axes))
    lines = [line for line in axes.get_lines() if len(line.get_xdata()) != 2 or is_curve(line)]
    names = [label for label in labels(axes) if "OpenAI" not in label and "chance" not in label]
    return {name: line.get_xydata() for name, line in zip(names, lines, strict=True)}


def is_curve(line) -> bool:
    return line.get_linestyle() == "-"


# ------------------------------------------------------------------------------ what is drawn


def test_two_runs_are_drawn_on_the_same_axes_and_hellaswag_beside_them(tmp_path, figures):
    runs = [
        write_run(tmp_path / "a", 3.1, hellaswag=True),
        write_run(tmp_path / "b", 3.2, learning_rate=1),
    ]
    plot.draw_curves(runs, tmp_path / "c.png")
    losses, scores = figures[0].axes
    assert [label for label in labels(losses) if "OpenAI" not in label] == [
        "a: training",
        "b: training",
        "a: validation (3.100)",
        "b: validation (3.200)",
    ]
    assert "a: acc_norm (31.00)" in labels(scores)
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"


def test_a_curve_has_the_points_of_the_log(tmp_path, figures):
    plot.draw_curves([write_run(tmp_path / "a")], tmp_path / "c.png")
    drawn = curves(figures[0].axes[0])
    steps = np.arange(1, STEPS + 1)
    expected = np.stack([1000 * steps, 3.1 + 8 / steps], axis=1)
    np.testing.assert_allclose(drawn["training"], expected)


def test_validation_starts_within_the_picture(tmp_path, figures):
    """Not at ln V, from where a line would cross all of a short run's picture."""
    plot.draw_curves([write_run(tmp_path / "a")], tmp_path / "c.png")
    drawn = curves(figures[0].axes[0])["validation (3.100)"]
    assert drawn[:, 0].tolist() == [50_000, 100_000]


def test_fine_tuning_shows_the_loss_that_it_starts_from(tmp_path, figures):
    run = write_run(tmp_path / "a", init_from="gpt2")
    plot.draw_curves([run], tmp_path / "c.png")
    drawn = curves(figures[0].axes[0])["validation (3.100)"]
    assert drawn[:, 0].tolist() == [0, 50_000, 100_000]


def test_a_long_curve_is_thinned_to_means_between_the_least_and_the_largest():
    values = np.random.default_rng(0).normal(size=19_073)
    band, n = plot.thinned(plot.Curve(np.arange(19_073.0), values))
    assert n == 96
    assert len(band.mean) == 199
    np.testing.assert_allclose(band.mean[0], values[:96].mean())
    np.testing.assert_allclose(band.mean[-1], values[198 * 96 :].mean())
    assert band.low[0] == values[:96].min()
    assert band.high[0] == values[:96].max()
    assert band.tokens[-1] == 19_072


def test_seeds_of_one_configuration_are_drawn_as_their_mean(tmp_path, figures):
    for seed, loss in ((1, 3.0), (2, 3.2), (3, 3.4)):
        write_run(tmp_path / f"s{seed}", loss, seed=seed, started={"date": seed})
    plot.draw_curves(plot.find_runs([tmp_path]), tmp_path / "c.png")
    losses = figures[0].axes[0]
    drawn = curves(losses)
    np.testing.assert_allclose(drawn["s1, mean of 3 runs: validation (3.200)"][:, 1], [3.3, 3.2])
    bands = [band.get_paths()[0].vertices[:, 1] for band in losses.collections]
    assert [(band.min(), band.max()) for band in bands][1] == pytest.approx((3.0, 3.5))


def test_another_learning_rate_is_another_configuration(tmp_path):
    runs = [
        plot.read_run(write_run(tmp_path / "a", seed=1, learning_rate=1)),
        plot.read_run(write_run(tmp_path / "b", seed=2, learning_rate=1)),
        plot.read_run(write_run(tmp_path / "c", seed=2, learning_rate=2)),
    ]
    groups = plot.group_by_configuration(runs)
    assert [[run.name for run in group] for group in groups] == [["a", "b"], ["c"]]


def test_runs_of_different_lengths_are_averaged_as_far_as_the_shorter_goes():
    short = plot.Curve(np.array([1.0, 2, 3]), np.array([1.0, 2, 3]))
    long = plot.Curve(np.array([2.0, 4]), np.array([4.0, 4]))
    for order in ([short, long], [long, short]):
        assert plot.band_of_seeds(order).tokens[-1] <= 3
    np.testing.assert_allclose(plot.band_of_seeds([short, long]).mean, [2.5, 3, 3.5])


@pytest.mark.parametrize("data", ["edu_fineweb10B", "edu_fineweb10B/", "./edu_fineweb10B", "link"])
def test_openais_loss_is_drawn_on_fineweb_edu_by_whatever_path(
    data, tmp_path, figures, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("edu_fineweb10B").mkdir()
    Path("link").symlink_to("edu_fineweb10B")
    plot.draw_curves([write_run(tmp_path / "a", data=data)], tmp_path / "c.png")
    assert "OpenAI GPT-2, same size (3.2924)" in labels(figures[0].axes[0])


def test_openais_loss_is_not_drawn_on_other_data(tmp_path, figures):
    plot.draw_curves([write_run(tmp_path / "a", data="novel.txt")], tmp_path / "c.png")
    assert not any("OpenAI" in label for label in labels(figures[0].axes[0]))


@pytest.mark.parametrize("tokenizer,unit", [("bytes", "byte"), ("gpt2", "token")])
def test_the_axis_names_the_unit_of_the_loss(tokenizer, unit, tmp_path, figures):
    plot.draw_curves([write_run(tmp_path / "a", tokenizer=tokenizer)], tmp_path / "c.png")
    assert figures[0].axes[0].get_ylabel() == f"loss (nats per {unit})"


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


def test_runs_of_edited_code_are_no_seeds_of_each_other(tmp_path):
    runs = [
        plot.read_run(write_run(tmp_path / "gelu", seed=1, started={"code": "a"})),
        plot.read_run(write_run(tmp_path / "relu", seed=1, started={"code": "b"})),
    ]
    assert len(plot.group_by_configuration(runs)) == 2


def test_the_table_has_mean_and_deviation_over_seeds(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, loss in ((1, 3.0), (2, 3.2)):
        write_run(tmp_path / "runs" / f"s{seed}", loss, hellaswag=True, seed=seed)
    write_run(tmp_path / "runs" / "t", 2.5, learning_rate=1)
    assert run_main(plot.main, "runs", "--table") == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[2] == "| s1 | 2 | 100K | 3.1800 ± 0.1414 | 3.1000 ± 0.1414 | 31.00 ± 0.00 |"
    assert rows[3] == "| t | 1 | 100K | 2.5800 | 2.5000 | – |"
    assert not Path("curves.png").exists()


# ------------------------------------------------------------------------------ damaged and hostile

FOREIGN_LINES = [
    b"\xff\xfe",
    b"{}",
    b"[]",
    b"7",
    b'{"event": ["train"], "step": 1}',
    b'{"event": "train", "step": "1", "tokens": 1000, "loss": 3.0}',
    b'{"event": "train", "step": 1, "tokens": 1000, "loss": NaN}',
    b'{"event": "train", "step": 1, "tokens": 1' + b"0" * 400 + b', "loss": 3.0}',
    b'{"event": "eval", "step": 1, "tokens": true, "val_loss": 3.0}',
    b'{"event": "hellaswag", "step": 1, "tokens": 1000}',
    b"[" * 200_000,
    b'{"event": "train", "st',
]


@pytest.mark.parametrize("line", FOREIGN_LINES, ids=range(len(FOREIGN_LINES)))
def test_a_foreign_line_is_passed_over_and_said(line, tmp_path):
    run = write_run(tmp_path / "a")
    expected = plot.read_run(run)
    log = run / "log.jsonl"
    log.write_bytes(line + b"\n" + log.read_bytes())
    said = []
    found = plot.read_run(run, said.append)
    assert said == [f"{log}: 1 of its lines are no entries of a log, passed over"]
    assert found.curves.keys() == expected.curves.keys()
    for event, curve in found.curves.items():
        np.testing.assert_array_equal(curve.values, expected.curves[event].values)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"\xff", b"[" * 200_000, b'{"n_layer": {}, "data": "a\\u0000b"}']
)
def test_a_hostile_configuration_does_not_stop_the_picture(text, tmp_path):
    run = write_run(tmp_path / "a")
    (run / "train.json").write_bytes(text)
    plot.draw_curves([run], tmp_path / "c.png", say=lambda line: None)
    assert (tmp_path / "c.png").exists()


def test_an_empty_log_gives_an_empty_picture(tmp_path):
    run = write_run(tmp_path / "a")
    (run / "log.jsonl").write_text("")
    plot.draw_curves([run], tmp_path / "c.png")
    assert (tmp_path / "c.png").exists()


@pytest.mark.parametrize("name", ["$\\write18{x}$", "_hidden", "a\nb", "\udcff", "long" * 60])
def test_a_folders_name_is_drawn_as_text(name, tmp_path, figures):
    runs = [write_run(tmp_path / name), write_run(tmp_path / "b", learning_rate=1)]
    plot.draw_curves(runs, tmp_path / "c.png")
    legend = figures[0].axes[0].get_legend()
    assert legend.get_texts()[0].get_text() == f"{plot.printable(name)}: training"
    assert not any(text.get_parse_math() for text in legend.get_texts())


def test_nothing_around_the_script_decides_whether_it_can_draw(tmp_path):
    """A matplotlibrc in the working directory and MPLBACKEND, both of which end an import."""
    write_run(tmp_path / "a")
    (tmp_path / "matplotlibrc").write_bytes(b"text.usetex: true\nbackend: \xff\n")
    script = Path(plot.__file__)
    done = run_python(script, "a", env={"MPLBACKEND": "no such backend"}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "curves.png").exists()
    broken = run_python("-c", "import matplotlib", cwd=tmp_path)
    assert broken.returncode != 0  # so the file is as bad as it should be


def test_settings_of_the_process_are_ignored_and_left_as_they_were(tmp_path):
    import matplotlib

    with matplotlib.rc_context({"text.usetex": True, "font.family": "no such font"}):
        plot.draw_curves([write_run(tmp_path / "a")], tmp_path / "c.png")
        assert matplotlib.rcParams["text.usetex"]
    assert (tmp_path / "c.png").exists()


def test_a_picture_replaces_a_link_instead_of_following_it(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("canary")
    (tmp_path / "curves.png").symlink_to(secret)
    plot.draw_curves([write_run(tmp_path / "a")], tmp_path / "curves.png")
    assert secret.read_text() == "canary"
    assert not (tmp_path / "curves.png").is_symlink()
