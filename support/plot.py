"""Loss and HellaSwag curves of one or several runs, from their log.jsonl.

    python support/plot.py runs/gpt2 runs/gpt2-2 --out curves.png
    python support/plot.py runs/* --table            # final losses as a Markdown table, no picture

A folder that is not a run stands for the runs below it. Runs whose configurations differ only in
their seed are drawn as one curve, their mean, in a band from the lowest of them to the highest.
"""

import io
import itertools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import numpy as np
import tyro

from fineweb import FINEWEB_EDU_FOLDER
from support import script
from support.files import read_json, read_lines, same_folder, walking, write_file
from support.script import UserError, parse_flags, run_script

# OpenAI's GPT-2 by number of layers. HellaSwag is acc_norm in percent, completion style, from
# build-nanogpt (124M and XL) and llm.c (the two between). The loss is that of the 124M model on
# FineWeb-Edu's validation shard, from build-nanogpt.
OPENAI_HELLASWAG = {12: 29.55, 24: 37.52, 36: 43.20, 48: 48.93}
OPENAI_FINEWEB_EDU_LOSS = {12: 3.2924}

# The events of log.jsonl that are drawn, and the value that is drawn of each.
VALUE_OF_EVENT = {"train": "loss", "eval": "val_loss", "hellaswag": "acc_norm"}

# Two runs are seeds of one configuration if their train.json differ in these entries alone.
NOT_CONFIGURATION = {"seed", "out", "resume", "config", "started"}

MOST_POINTS = 200  # of a training curve; each is the mean of as many steps as that takes
UNSETTLED = 0.1  # part of a training curve, from its start, that falls steeply from ln V
LONGEST_NAME = 40  # characters of a run's name in a legend


# ---------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Curve:
    """A value against training tokens, both float64 (n,), n >= 1."""

    tokens: np.ndarray
    values: np.ndarray

    @property
    def last(self) -> float:
        return float(self.values[-1])


@dataclass(frozen=True)
class Run:
    """What a run directory says of its run."""

    name: str
    config: dict[str, Any]  # train.json; empty if it cannot be read
    curves: dict[str, Curve]  # by event: "train", "eval", "hellaswag"


def find_runs(folders: list[Path], say: Callable[[str], None] = script.say) -> list[Path]:
    """The run directories among `folders` and below them, in order of their names.

    A folder without any is passed over with a line that says so. Raises UserError if no run is
    found at all.
    """
    runs = []
    for folder in folders:
        found = runs_below(folder)
        if not found and folder.is_dir():
            say(f"{folder}: no log.jsonl in it or below it, passed over")
        runs += [run for run in found if run not in runs]
    if not runs:
        raise UserError(
            f"{', '.join(map(str, folders)) or 'no folder'}: no log.jsonl in it or below it; "
            "expected run directories, or folders of them; for example runs/first-run"
        )
    return runs


def runs_below(folder: Path) -> list[Path]:
    """The run directories in a folder, itself included, in order of their names."""
    found = []
    with walking(folder):
        for parent, below, files in os.walk(folder):
            below.sort()
            if "log.jsonl" in files:
                found.append(Path(parent))
                below.clear()  # what a run directory holds are no further runs
    return found


def read_run(folder: Path, say: Callable[[str], None] = script.say) -> Run:
    """Read train.json and log.jsonl. What is damaged in them is passed over with one line each."""
    return Run(folder.name or str(folder), read_config(folder, say), read_log(folder, say))


def read_config(folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """train.json, or {} where there is none that can be read."""
    file = folder / "train.json"
    if not file.is_file():
        return {}
    try:
        config = read_json(file, {})
    except UserError:
        say(f"{file}: not a configuration, passed over")
        return {}
    # All that a run is compared by are single values, and the code that it was trained by: runs of
    # edited code are no seeds of each other.
    values = {key: value for key, value in config.items() if not isinstance(value, (dict, list))}
    started = config.get("started")
    if isinstance(started, dict):
        values["code"] = str(started.get("code"))
    return values


def read_log(folder: Path, say: Callable[[str], None]) -> dict[str, Curve]:
    """The curves in log.jsonl, by event. Lines that are torn or foreign are counted and said."""
    file = folder / "log.jsonl"
    if not file.is_file():
        raise UserError(f"{file}: not there; expected a run directory; name one below runs/")
    points: dict[str, list[tuple[float, float]]] = {event: [] for event in VALUE_OF_EVENT}
    passed_over = 0
    for line in read_lines(file):
        entry = parse_json(line)
        if not isinstance(entry, dict) or not isinstance(entry.get("event"), str):
            passed_over += 1
            continue
        event = entry["event"]
        if event not in VALUE_OF_EVENT:
            continue  # samples and saves are not drawn
        tokens, value = entry.get("tokens"), entry.get(VALUE_OF_EVENT[event])
        if is_number(entry.get("step")) and is_number(tokens) and is_number(value):
            points[event].append((tokens, value))
        else:
            passed_over += 1
    if passed_over:
        say(f"{file}: {passed_over} of its lines are no entries of a log, passed over")
    curves = {}
    for event, pairs in points.items():
        if pairs:
            tokens, values = np.array(sorted(pairs), dtype=np.float64).T
            curves[event] = Curve(tokens, values)
    return curves


def parse_json(text: bytes) -> Any:
    """The value that the text stands for, or None if it is not JSON."""
    try:
        return json.loads(text.decode())
    except (ValueError, RecursionError):  # the latter from brackets nested thousands deep
        return None


def is_number(value: Any) -> bool:
    """Whether a value can be drawn. NaN, infinities and integers of hundreds of digits cannot."""
    return type(value) in (int, float) and -1e30 < value < 1e30


# ---------------------------------------------------------------------------------------- arranging


def group_by_configuration(runs: list[Run]) -> list[list[Run]]:
    """Runs that differ in their seed alone, together. A run without train.json stands alone."""
    groups: dict[str, list[Run]] = {}
    for number, run in enumerate(runs):
        key = str(number)
        if run.config:
            entries = {k: v for k, v in run.config.items() if k not in NOT_CONFIGURATION}
            key = json.dumps(entries, sort_keys=True)
        groups.setdefault(key, []).append(run)
    return list(groups.values())


@dataclass(frozen=True)
class Band:
    """A curve with what it is the mean of: everything lies between `low` and `high`."""

    tokens: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def thinned(curve: Curve) -> tuple[Band, int]:
    """At most MOST_POINTS points, each the mean of as many steps; and how many steps that is."""
    n = -(-len(curve.values) // MOST_POINTS)
    starts = np.arange(0, len(curve.values), n)
    sizes = np.diff([*starts, len(curve.values)])
    band = Band(
        tokens=curve.tokens[starts + sizes - 1],
        mean=np.add.reduceat(curve.values, starts) / sizes,
        low=np.minimum.reduceat(curve.values, starts),
        high=np.maximum.reduceat(curve.values, starts),
    )
    return band, n


def band_of_seeds(curves: list[Curve]) -> Band:
    """The mean of several runs' curves, as far as the shortest goes."""
    end = min(curve.tokens[-1] for curve in curves)
    tokens = curves[0].tokens[curves[0].tokens <= end]
    if len(tokens) == 0:
        tokens = np.array([end])
    values = np.stack([np.interp(tokens, curve.tokens, curve.values) for curve in curves])
    return Band(tokens, values.mean(0), values.min(0), values.max(0))


def training_band(group: list[Run]) -> tuple[Band, str]:
    """The training loss of a group of runs, and what it is the mean of, in words."""
    bands, steps = zip(*(thinned(run.curves["train"]) for run in group), strict=True)
    words = f", mean of {max(steps)} steps" if max(steps) > 1 else ""
    if len(group) == 1:
        return bands[0], words
    return band_of_seeds([Curve(band.tokens, band.mean) for band in bands]), words


def runs_with(group: list[Run], event: str) -> list[Run]:
    return [run for run in group if event in run.curves]


def is_fineweb_edu(config: dict[str, Any]) -> bool:
    """Whether the run was trained on FineWeb-Edu where fineweb.py puts it, by whatever path."""
    data = config.get("data")
    try:
        return isinstance(data, str) and same_folder(data, FINEWEB_EDU_FOLDER)
    except ValueError:  # no path, as with a zero byte
        return False


def unit_of_loss(runs: list[Run]) -> str:
    """Losses of byte models are nats per byte, which other models' are not comparable with."""
    if all(run.config.get("tokenizer") == "bytes" for run in runs):
        return "nats per byte"
    return "nats per token"


# ---------------------------------------------------------------------------------------- drawing


def draw_curves(folders: list[Path], file: Path, say: Callable[[str], None] = script.say) -> None:
    """Draw training and validation loss against tokens, and HellaSwag beside them if it was scored.

    folders: run directories. file: the picture, of the kind that its suffix names. It is replaced
    whole, so that nobody sees half of it.
    """
    groups = group_by_configuration([read_run(folder, say) for folder in folders])
    matplotlib = import_matplotlib()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the user's settings must not decide whether a picture succeeds
        figure = make_figure(groups)
        # For pgf a TeX would be started, which executes what it finds in a run's name.
        kinds = figure.canvas.get_supported_filetypes().keys() - {"pgf"}
        kind = file.suffix.removeprefix(".").lower()
        if kind not in kinds:
            raise UserError(
                f"{file}: its suffix names no kind of picture; expected one of "
                f"{', '.join(sorted(kinds))}; for example curves.png"
            )
        picture = io.BytesIO()
        figure.savefig(picture, format=kind)
    write_file(file, picture.getvalue())


def import_matplotlib():
    """matplotlib, imported without the settings of the working directory and the environment.

    On import matplotlib reads a file `matplotlibrc` in the working directory and the variable
    MPLBACKEND, and fails if they are broken. The file may have come with somebody else's runs; the
    variable is often left over from a notebook. To leave the working directory instead would move
    the threads that read training data too.
    """
    exists = os.path.exists

    def exists_elsewhere(path) -> bool:
        return path != "matplotlibrc" and exists(path)

    backend = os.environ.pop("MPLBACKEND", None)
    try:
        with mock.patch("os.path.exists", exists_elsewhere):
            import matplotlib
            import matplotlib.figure
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return matplotlib


def make_figure(groups: list[list[Run]]):
    """The figure: a panel of losses, and one of HellaSwag scores if there are any."""
    from matplotlib.figure import Figure  # not pyplot, which would choose a window system

    runs = list(itertools.chain.from_iterable(groups))
    panels = 2 if runs_with(runs, "hellaswag") else 1
    width, height = 6 * panels, 4  # inches
    figure = Figure(figsize=(width, height), dpi=200)
    # Fixed margins: matplotlib's layout engines draw everything twice to find them.
    figure.subplots_adjust(
        left=0.7 / width,
        right=1 - 0.2 / width,
        bottom=0.6 / height,
        top=1 - 0.2 / height,
        wspace=0.18,
    )
    axes = figure.subplots(1, panels, squeeze=False)[0]

    losses = Panel(axes[0])
    draw_losses(losses, groups)
    losses.axes.set_ylabel(f"loss ({unit_of_loss(runs)})")
    for layers in layers_of_runs_on_fineweb_edu(runs):
        losses.reference(OPENAI_FINEWEB_EDU_LOSS.get(layers))
    losses.finish()

    if panels == 2:
        scores = Panel(axes[1])
        draw_scores(scores, groups)
        scores.axes.set_ylabel("HellaSwag acc_norm (%), completion style")
        for layers in layers_of_runs_on_fineweb_edu(runs):
            scores.reference(OPENAI_HELLASWAG.get(layers))
        scores.finish()
    return figure


def layers_of_runs_on_fineweb_edu(runs: list[Run]) -> list[int]:
    """The depths for which OpenAI's model is a fair reference."""
    depths = set()
    for run in runs:
        layers = run.config.get("n_layer")
        if is_fineweb_edu(run.config) and type(layers) is int:
            depths.add(layers)
    return sorted(depths)


class Panel:
    """One pair of axes and its legend."""

    def __init__(self, axes):
        self.axes = axes
        self.legend = []  # (what is drawn, its label)
        axes.set_xlabel("training tokens")
        axes.xaxis.set_major_formatter(lambda tokens, _: short(tokens))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)

    def draw(self, band: Band, color: str, label: str, **style) -> None:
        """A curve in its band; a band as narrow as its curve is not drawn."""
        if np.any(band.high > band.low):
            self.axes.fill_between(
                band.tokens, band.low, band.high, color=color, alpha=0.15, linewidth=0
            )
        if len(band.tokens) == 1:
            style["marker"] = "."
        (line,) = self.axes.plot(band.tokens, band.mean, color=color, **style)
        self.legend.append((line, label))

    def reference(self, value: float | None) -> None:
        """A line at the value that OpenAI's model of the same size has, if it is known."""
        if value is not None:
            line = self.axes.axhline(value, color="black", linewidth=0.8, linestyle="--")
            self.legend.append((line, f"OpenAI GPT-2, same size ({value})"))

    def finish(self) -> None:
        """Add the legend. Labels hold names of folders, which are text and not formulas."""
        if not self.legend:
            return
        lines, labels = zip(*self.legend, strict=True)
        places = [str(number) for number in range(len(labels))]
        legend = self.axes.legend(lines, places, frameon=False, fontsize=8)
        for text, label in zip(legend.get_texts(), labels, strict=True):
            text.set_parse_math(False)
            text.set_text(label)


def draw_losses(panel: Panel, groups: list[list[Run]]) -> None:
    """Training loss, pale, and validation loss, strong, in one color for each group."""
    settled = []
    for number, group in enumerate(groups):
        trained = runs_with(group, "train")
        if trained:
            band, words = training_band(trained)
            label = f"{prefix(group, groups)}training{words}"
            panel.draw(band, color_of(number), label, alpha=0.55, linewidth=1)
            unsettled = 0 if group[0].config.get("init_from") else int(UNSETTLED * len(band.mean))
            settled += band.mean[unsettled:].tolist()
    top = np.inf
    if settled:
        # The first steps fall from ln V. To show them whole would flatten all that comes after.
        low, high = min(settled), max(settled)
        margin = 0.15 * (high - low) + 1e-3
        top = high + margin
        panel.axes.set_ylim(low - margin, top)
    for number, group in enumerate(groups):
        validated = runs_with(group, "eval")
        if validated:
            band = band_of_seeds([run.curves["eval"] for run in validated])
            last = np.mean([run.curves["eval"].last for run in validated])
            label = f"{prefix(group, groups)}validation ({last:.3f})"
            band = without_start_above(band, top)
            panel.draw(band, color_of(number), label, linewidth=1.6, marker=".")


def without_start_above(band: Band, top: float) -> Band:
    """Drop the first points if they lie above the picture.

    The line from a point outside, at step 0, would cross all of a short run's picture.
    """
    inside = np.flatnonzero(band.mean <= top)
    if len(inside) == 0:
        return band
    first = inside[0]
    return Band(band.tokens[first:], band.mean[first:], band.low[first:], band.high[first:])


def draw_scores(panel: Panel, groups: list[list[Run]]) -> None:
    """HellaSwag scores in percent."""
    for number, group in enumerate(groups):
        scored = runs_with(group, "hellaswag")
        if scored:
            curves = []
            for run in scored:
                curve = run.curves["hellaswag"]
                curves.append(Curve(curve.tokens, 100 * curve.values))
            last = np.mean([curve.last for curve in curves])
            label = f"{prefix(group, groups)}acc_norm ({last:.2f})"
            panel.draw(band_of_seeds(curves), color_of(number), label, linewidth=1.6, marker=".")
    chance = panel.axes.axhline(25, color="grey", linewidth=0.8, linestyle=":")
    panel.legend.append((chance, "chance (25)"))


def color_of(number: int) -> str:
    return f"C{number % 10}"  # matplotlib's cycle of ten colors


def prefix(group: list[Run], groups: list[list[Run]]) -> str:
    """What tells a group's curves from the others' in a legend."""
    if len(groups) == 1 and len(group) == 1:
        return ""
    return f"{title(group)}: "


def title(group: list[Run]) -> str:
    """The name of a group's first run, and how many runs there are."""
    name = printable(group[0].name)
    if len(group) == 1:
        return name
    return f"{name}, mean of {len(group)} runs"


def printable(name: str) -> str:
    """A folder's name on one line, without characters that fonts do not have."""
    name = "".join(c if c.isprintable() else "?" for c in name)
    if len(name) > LONGEST_NAME:
        name = name[: LONGEST_NAME - 1] + "…"
    return name


def short(count: float) -> str:
    """1500000 as 1.5M: thousands, millions and billions."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(count) >= unit:
            return f"{count / unit:g}{letter}"
    return f"{count:g}"


# ---------------------------------------------------------------------------------------- table


def table(groups: list[list[Run]]) -> str:
    """Final losses in Markdown: a row for each configuration, mean ± standard deviation."""
    lines = [
        "| run | runs | training tokens | training loss | validation loss | HellaSwag acc_norm |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for group in groups:
        trained = runs_with(group, "train")
        tokens = max((run.curves["train"].tokens[-1] for run in trained), default=0)
        training = [thinned(run.curves["train"])[0].mean[-1] for run in trained]
        validation = [run.curves["eval"].last for run in runs_with(group, "eval")]
        scores = [100 * run.curves["hellaswag"].last for run in runs_with(group, "hellaswag")]
        cells = [
            printable(group[0].name).replace("|", "\\|"),
            str(len(group)),
            short(tokens),
            mean_and_deviation(training, digits=4),
            mean_and_deviation(validation, digits=4),
            mean_and_deviation(scores, digits=2),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_and_deviation(values: list[float], digits: int) -> str:
    """The mean of several seeds and the standard deviation between them, which one seed lacks."""
    if not values:
        return "–"
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


# ---------------------------------------------------------------------------------------- script


run_folders = tyro.conf.arg(metavar="RUN …", help_behavior_hint="(one or more)")


@dataclass(frozen=True)
class PlotConfig:
    # run directories, or folders of them
    runs: tyro.conf.Positional[Annotated[tuple[Path, ...], run_folders]] = ()
    out: Path = Path("curves.png")  # the picture; its suffix names its kind
    table: bool = False  # print final losses as a Markdown table instead of drawing


def main() -> None:
    config = parse_flags(PlotConfig, PlotConfig(), __doc__)
    folders = find_runs(list(config.runs))
    if config.table:
        print(table(group_by_configuration([read_run(folder) for folder in folders])))
    else:
        draw_curves(folders, config.out)
        script.say(str(config.out))


if __name__ == "__main__":
    run_script(main)
