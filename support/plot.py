"""Curves of one or several runs, from their log.jsonl.

    python -m support.plot runs/gpt2                         # losses, and HellaSwag where scored
    python -m support.plot runs/* --out sweep.png            # several runs in one picture
    python -m support.plot runs/* --y grad_norm --x seconds  # any number in the log
    python -m support.plot runs/* --table                    # losses as a Markdown table

A folder that is not a run stands for the runs below it. Finished runs that differ in their seed
alone are drawn as one curve, their mean, in a band from the lowest of them to the highest. The
legend says what tells each curve from the others. An unfinished run stands alone, and the legend
says how far it came. A forked run has a mark where it left its trunk; if the trunk is drawn too,
the branch begins there.
"""

import io
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from support import script
from support.files import read_json, read_jsonl, same_folder, write_file
from support.script import UserError, parse_flags, require, run_script, shown

# OpenAI's GPT-2 by number of layers. HellaSwag is acc_norm, completion style, from build-nanogpt
# (124M and XL) and llm.c (the two between). The loss is that of the 124M model on FineWeb-Edu's
# validation shard, from build-nanogpt.
OPENAI_HELLASWAG = {12: 0.2955, 24: 0.3752, 36: 0.4320, 48: 0.4893}
OPENAI_LOSS = {12: 3.2924}
FINEWEB_EDU = "edu_fineweb10B"  # the name of the folder that fineweb.py makes

Key = tuple[str, str]  # an event of log.jsonl, and the name of a number in it

# What is drawn without --y.
TRAINING, VALIDATION, SCORE = ("train", "loss"), ("eval", "val_loss"), ("hellaswag", "acc_norm")
DRAWN_OF_EVENT = dict([TRAINING, VALIDATION, SCORE])

# What the horizontal axis shows: the key of the log's entries, and the axis' label.
AXES = {
    "tokens": ("tokens", "training tokens"),
    "steps": ("step", "steps"),
    "seconds": ("elapsed", "seconds of training"),
}

# Values of which a run that has diverged has too much. It must not set the scale for the others.
GROWS_IN_DIVERGENCE = {"loss", "val_loss", "bits_per_byte", "grad_norm"}

# Entries of train.json that change nothing in what is learned, or no more than a seed does.
NOT_LEARNED = {
    "seed",
    "out",
    "resume",
    "config",
    "fork",
    "forked_from",
    "device",
    "compile",
    "micro_batch",
    "wandb",
    "tensorboard",
    "eval_every",
    "hellaswag_every",
    "sample_every",
    "save_every",
    "keep",
    "keep_best",
    "eval_only",
    "dry_run",
}

KINDS = ("png", "svg", "pdf")  # of pictures
MOST_POINTS = 200  # of a training curve; each is the mean of as many steps as that takes
SMOOTHED, LEAST_POINTS = 5, 20  # a point is the mean of 5 steps at least, if that leaves 20 points
UNSETTLED = 0.1  # part of a training curve, from its start, that falls steeply from ln V
MOST_TRAINING_CURVES = 4  # with more groups only validation is drawn, where there is any
MOST_LABELS = 30  # of groups in a legend
LONGEST_NAME = 30  # characters of a run's name in a legend
LONGEST_LABEL = 82  # characters of an entry of a legend
LINE_STYLES = ("-", "--", ":", "-.")

_matplotlib = threading.Lock()  # its settings are global


# ---------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Curve:
    """A value against what the horizontal axis shows, with what it is the mean of; all (n,)."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    steps: int = 1  # that each point is the mean of

    def part(self, kept: np.ndarray) -> "Curve":
        """The points where `kept` is true."""
        x, mean, low, high = (a[kept] for a in (self.x, self.mean, self.low, self.high))
        return replace(self, x=x, mean=mean, low=low, high=high)

    def beginning_at(self, x: float, value: float) -> "Curve":
        """The curve with a point before its first one."""
        mean, low, high = (np.append(value, a) for a in (self.mean, self.low, self.high))
        return replace(self, x=np.append(x, self.x), mean=mean, low=low, high=high)


@dataclass(frozen=True)
class Run:
    """What a run directory says of its run."""

    folder: Path
    config: dict[str, Any]  # the single values of train.json; empty if it cannot be read
    curves: dict[Key, Curve]
    clock: np.ndarray  # (2, n): steps, and where the horizontal axis has them
    names: set[str]  # of all numbers in the log
    best: dict[str, Any]  # step and val_loss of the best checkpoint; empty if none is kept

    @property
    def name(self) -> str:
        return shown(self.folder.name or str(self.folder), LONGEST_NAME)

    @property
    def last_step(self) -> int:
        return int(self.clock[0, -1]) if self.clock.size else 0

    @property
    def is_finished(self) -> bool:
        """Whether it has made all of its steps. Without train.json that cannot be known."""
        return self.last_step >= self.config.get("max_steps", 0)

    def x(self, step: float) -> float:
        """Where the horizontal axis has a step."""
        return float(np.interp(step, *self.clock))


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
    named = ", ".join(map(str, folders)) or "no folder"
    require(
        bool(runs),
        f"{named}: no log.jsonl in it or below it; expected run directories, or folders of them, "
        "as the first arguments; for example runs/first-run",
    )
    return runs


def runs_below(folder: Path) -> list[Path]:
    """The run directories in a folder, itself included, in order of their names."""
    found = []
    for parent, below, files in os.walk(folder):
        below.sort()
        if "log.jsonl" in files:
            found.append(Path(parent))
            below.clear()  # what a run directory holds are no further runs
    return found


def read_run(
    folder: Path, x: str = "tokens", y: Sequence[str] = (), say: Callable[[str], None] = script.say
) -> Run:
    """Read a run directory. What is damaged in it is passed over, with one line for each file.

    x: a key of AXES. y: the names of the numbers that are read; empty: those of DRAWN_OF_EVENT, and
    the validation loss of each corpus of a mixture.
    """
    config = read_config(folder, say)
    curves, clock, names = read_log(folder, x, y, say)
    best = read_or_pass_over(folder / "best.json", {"step": int, "val_loss": float}, say)
    return Run(folder, config, curves, clock, names, best)


def read_config(folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """The single values of train.json, by which runs are compared; {} where it cannot be read.

    With them the run and the step that it was forked from, and the code that trained it, since runs
    of edited code are no seeds of each other.
    """
    shape = {"max_steps?": int, "started?": {"code?": str}}
    config = read_or_pass_over(folder / "train.json", shape, say)
    values = {}
    for key, value in config.items():
        if isinstance(value, list):  # such as the paths of --data
            value = " ".join(map(str, value))
        if not isinstance(value, dict | None):
            values[key] = value
    origin = config.get("origin")
    if isinstance(origin, dict) and type(origin.get("step")) is int:
        values |= {"forked_from": str(origin.get("run")), "forked_at": origin["step"]}
    code = config.get("started", {}).get("code")
    if code:
        values["code"] = code[:7]
    return values


def read_or_pass_over(file: Path, shape: dict, say: Callable[[str], None]) -> dict[str, Any]:
    """A JSON file, or {} where there is none or it is damaged."""
    if not file.is_file():
        return {}
    try:
        return read_json(file, shape)
    except UserError:
        say(f"{file}: damaged, passed over")
        return {}


def read_log(
    folder: Path, x: str, y: Sequence[str], say: Callable[[str], None]
) -> tuple[dict[Key, Curve], np.ndarray, set[str]]:
    """The curves of a Run, its clock and its names, from its log.jsonl."""
    file = folder / "log.jsonl"
    require(file.is_file(), f"{file}: not there; expected a run directory; name one below runs/")
    points: dict[Key, dict[int, float]] = {}  # the value at each step
    place_of_step = {}
    names = set()
    passed_over = 0
    for _, entry in read_jsonl(file):
        if entry is None or type(entry.get("step")) is not int:
            passed_over += 1
            continue
        step, event = entry["step"], str(entry.get("event"))
        numbers = {name: value for name, value in entry.items() if is_number(value)}
        names.update(numbers)
        expected = DRAWN_OF_EVENT.get(event)
        for name in y or [name for name in numbers if name.split(" ")[0] == expected]:
            if name in numbers:
                points.setdefault((event, name), {})[step] = numbers[name]
        if AXES[x][0] in numbers:
            place_of_step[step] = numbers[AXES[x][0]]
        passed_over += bool(expected) and expected not in numbers
    if passed_over:
        say(f"{file}: {passed_over} of its lines are no entries of a log, passed over")
    clock = np.array(sorted(place_of_step.items()), dtype=np.float64).reshape(-1, 2).T
    curves = {}
    for key, value_of_step in points.items():
        steps, values = np.array(sorted(value_of_step.items()), dtype=np.float64).T
        if clock.size:
            curve = Curve(np.interp(steps, *clock), values, values, values)
            curves[key] = thinned(curve) if key[0] == "train" else curve
    return curves, clock, names


def is_number(value: Any) -> bool:
    """Whether a value can be drawn. NaN, infinities and integers of hundreds of digits cannot."""
    return type(value) in (int, float) and -1e30 < value < 1e30


def thinned(curve: Curve) -> Curve:
    """At most MOST_POINTS points, each the mean of as many steps."""
    length = len(curve.mean)
    n = max(-(-length // MOST_POINTS), min(SMOOTHED, length // LEAST_POINTS), 1)
    starts = np.arange(0, length, n)
    sizes = np.diff([*starts, length])
    return Curve(
        x=curve.x[starts + sizes - 1],
        mean=np.add.reduceat(curve.mean, starts) / sizes,
        low=np.minimum.reduceat(curve.mean, starts),
        high=np.maximum.reduceat(curve.mean, starts),
        steps=n,
    )


# --------------------------------------------------------------------------------------- arranging


@dataclass(frozen=True)
class Group:
    """Runs that are drawn as one curve."""

    runs: list[Run]
    differs: str  # what its configuration has that others drawn beside it do not have

    @property
    def name(self) -> str:
        """The first run's name, and of how many runs the curve is the mean."""
        name = self.runs[0].name
        return name if len(self.runs) == 1 else f"{name}, mean of {len(self.runs)}"

    @property
    def how_far(self) -> str:
        """How far an unfinished run came."""
        run = self.runs[0]
        if run.is_finished:
            return ""
        return f" at step {run.last_step:,} of {run.config['max_steps']:,}"

    def curves(self, keys: Iterable[Key]) -> dict[Key, Curve]:
        """The means of the runs' curves, of those keys that any of them has."""
        found = {key: [run.curves[key] for run in self.runs if key in run.curves] for key in keys}
        return {key: mean_curve(curves) for key, curves in found.items() if curves}


def mean_curve(curves: list[Curve]) -> Curve:
    """The mean of several runs' curves, as far as the shortest goes."""
    if len(curves) == 1:
        return curves[0]
    end = min(curve.x[-1] for curve in curves)
    x = curves[0].x[curves[0].x <= end]
    if len(x) == 0:
        x = np.array([end])
    values = np.stack([np.interp(x, curve.x, curve.mean) for curve in curves])
    return Curve(x, values.mean(0), values.min(0), values.max(0), curves[0].steps)


def arrange(runs: list[Run]) -> list[Group]:
    """Finished runs that differ in no more than their seed are put together.

    Runs of one seed go to different groups: they say nothing of other seeds.
    """
    runs = [from_fork_on(run, runs) for run in runs]
    groups: dict[str, list[Run]] = {}
    times = Counter()
    for number, run in enumerate(runs):
        key = str(number)
        if run.config and run.is_finished:
            same = (json.dumps(learned(run), sort_keys=True), run.config.get("seed"))
            key = f"{same[0]} {times[same]}"
            times[same] += 1
        groups.setdefault(key, []).append(run)
    differences = what_differs([group[0] for group in groups.values()])
    return [Group(*both) for both in zip(groups.values(), differences, strict=True)]


def learned(run: Run) -> dict[str, Any]:
    """The entries of a run's configuration that decide what it learns, its seed aside."""
    return {key: value for key, value in run.config.items() if key not in NOT_LEARNED}


def what_differs(runs: list[Run]) -> list[str]:
    """For each run the values of its configuration that not all of the others share, in words.

    Those come first that the fewest share, and the hash of the code comes last.
    """
    configs = [{name: str(value) for name, value in learned(run).items()} for run in runs]
    sharing = Counter(entry for config in configs for entry in config.items())
    readable = sum(map(bool, configs))
    words = []
    for config in configs:
        differing = [entry for entry in config.items() if entry[1] and sharing[entry] < readable]
        differing.sort(key=lambda entry: (entry[0] == "code", sharing[entry]))
        words.append(
            ", ".join(f"{shown(name, 30)} {shown(value, 30)}" for name, value in differing)
        )
    return words


def from_fork_on(run: Run, drawn: list[Run]) -> Run:
    """The run without what it has in common with its trunk, if that is drawn too.

    Its curves begin on the trunk's.
    """
    trunk = next((other for other in drawn if is_trunk(other, run)), None)
    if trunk is None:
        return run
    fork = run.x(run.config["forked_at"])
    curves = {}
    for key, curve in run.curves.items():
        curve = curve.part(curve.x > fork)
        common = trunk.curves.get(key)
        if common is not None:
            curve = curve.beginning_at(fork, np.interp(fork, common.x, common.mean))
        if len(curve.x):
            curves[key] = curve
    return replace(run, curves=curves)


def is_trunk(other: Run, branch: Run) -> bool:
    """Whether a run is the one that the branch says it comes from, be it that both were moved."""
    trunk = Path(branch.config.get("forked_from", ""))
    places = (trunk, branch.folder.parent / trunk.name) if trunk.name else ()
    return any(same_folder(other.folder, place) for place in places)


def say_if_not_comparable(runs: list[Run], say: Callable[[str], None]) -> None:
    """A byte and a token of GPT-2 do not have the same loss."""
    if len({run.config["tokenizer"] for run in runs if "tokenizer" in run.config}) > 1:
        say("losses per byte and per token are not comparable; --y bits_per_byte is")


# ---------------------------------------------------------------------------------------- drawing


def draw_curves(
    folders: list[Path],
    file: Path,
    say: Callable[[str], None] = script.say,
    x: str = "tokens",
    y: Sequence[str] = (),
) -> None:
    """Draw training and validation loss, and HellaSwag beside them if it was scored.

    folders: run directories. file: the picture, of the kind that its suffix names. It is replaced
    whole, so that nobody sees half of it. y: names of numbers in the log that are drawn instead.
    """
    kind = file.suffix.removeprefix(".").lower()
    require(
        kind in KINDS,
        f"{file}: its suffix names no kind of picture; expected one of {', '.join(KINDS)}; for "
        "example curves.png",
    )
    runs = [read_run(folder, x, y, say) for folder in folders]
    names = set().union(*(run.names for run in runs))
    for name in y:
        require(
            name in names,
            f"--y {name}: no log has a number of that name; expected one of "
            f"{', '.join(map(shown, sorted(names)))}; choose one of them",
        )
    if not y or any("loss" in name for name in y):
        say_if_not_comparable(runs, say)
    picture = io.BytesIO()
    with _matplotlib:
        import matplotlib

        with matplotlib.rc_context():
            matplotlib.rcdefaults()  # the user's settings must not decide whether it succeeds
            make_figure(arrange(runs), x, y).savefig(picture, format=kind)
    write_file(file, picture.getvalue())


def make_figure(groups: list[Group], x: str, y: Sequence[str]):
    """The figure: a panel of losses and one of HellaSwag scores, or one of `y`."""
    from matplotlib.figure import Figure  # not pyplot, which would choose a window system

    runs = [run for group in groups for run in group.runs]
    has_scores = any(SCORE in run.curves for run in runs) and not y
    figure = Figure(dpi=200)
    axes = figure.subplots(1, 2 if has_scores else 1, squeeze=False)[0]
    panels = [Panel(axis, groups, AXES[x][1]) for axis in axes]
    if y:
        panels[0].draw_numbers(y)
    else:
        panels[0].draw_losses()
    if has_scores:
        panels[1].draw_scores()
    arrange_figure(figure, panels)
    return figure


def arrange_figure(figure, panels: list["Panel"]) -> None:
    """Sizes in inches, and legends: in its panel for one group, else one below the panels."""
    legend = [] if panels[0].is_single else legend_of_groups(panels)
    rows = -(-len(legend) // len(panels))
    width, below = 6 * len(panels), 0.62 + 0.17 * rows
    height = 3.38 + below
    figure.set_size_inches(width, height)
    # Fixed margins: matplotlib's layout engines draw everything twice to find them.
    figure.subplots_adjust(
        left=0.7 / width,
        right=1 - 0.2 / width,
        bottom=below / height,
        top=1 - 0.2 / height,
        wspace=0.18,
    )
    if legend:
        place = (0.4 / width, (below - 0.5) / height)
        add_legend(figure, legend, ncols=len(panels), loc="upper left", bbox_to_anchor=place)
        return
    for panel in panels:
        add_legend(panel.axes, [(line, label) for label, line in panel.kinds.items()], loc="best")


def legend_of_groups(panels: list["Panel"]) -> list[tuple]:
    """An entry for each group, with its last values, then what kinds of lines there are."""
    groups = panels[0].groups
    entries = []
    for number, group in enumerate(groups[:MOST_LABELS]):
        ends = [panel.ends[number] for panel in panels if number in panel.ends]
        words = f" ({', '.join(ends)}{group.how_far})" if ends else ""
        differs = group.differs
        room = max(LONGEST_LABEL - len(group.name + words), 0)
        if len(differs) > room:
            differs = f"{differs[:room].rpartition(', ')[0]}, …".lstrip(", ")
        label = f"{group.name}: {differs}" if differs else group.name
        entries.append((line_of(color_of(number), linestyle=style_of(number)), label + words))
    if len(groups) > MOST_LABELS:
        entries.append((line_of("none"), f"and {len(groups) - MOST_LABELS} more"))
    kinds = {}
    for panel in panels:
        kinds |= panel.kinds
    return entries + [(line, label) for label, line in kinds.items()]


def line_of(color: str, **style):
    """A line that stands in a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, **style)


def add_legend(owner, entries: list[tuple], **where) -> None:
    """A legend of (line, label). Labels hold names, which are text and no formulas."""
    lines, labels = zip(*entries, strict=True) if entries else ((), ())
    numbers = [str(number) for number in range(len(labels))]
    legend = owner.legend(lines, numbers, frameon=False, fontsize=8, **where)
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_parse_math(False)
        text.set_text(label)


class Panel:
    """One pair of axes, and what a legend can say of it.

    kinds: by label, a line of each kind that is drawn. ends: by group, its last value in words.
    """

    def __init__(self, axes, groups: list[Group], label_of_x: str):
        self.axes = axes
        self.groups = groups
        self.is_single = len(groups) == 1
        self.kinds: dict[str, Any] = {}
        self.ends: dict[int, str] = {}
        if self.is_single and groups[0].how_far:
            label_of_x += f",{groups[0].how_far}"
        axes.set_xlabel(label_of_x)
        axes.xaxis.set_major_formatter(lambda value, _: short(value))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)

    def draw_losses(self) -> None:
        """Training loss, pale, and validation loss, strong, in one color for each group.

        A single run of a mixture has a line for each corpus too.
        """
        runs = [group.runs[0] for group in self.groups]
        is_bytes = [run.config.get("tokenizer") == "bytes" for run in runs]
        self.axes.set_ylabel(f"loss (nats per {'byte' if all(is_bytes) else 'token'})")
        words = {TRAINING: "training", VALIDATION: "validation"}
        for key in runs[0].curves:
            if self.is_single and key[1].startswith("val_loss "):
                words[key] = shown(key[1].replace("val_loss", "validation"), LONGEST_NAME)
        if len(runs) > MOST_TRAINING_CURVES and all(VALIDATION in run.curves for run in runs):
            del words[TRAINING]
        self.draw_curves(words, ".3f")
        for number, group in enumerate(self.groups):
            run = group.runs[0]
            if len(group.runs) == 1 and run.best:
                step, loss = run.best["step"], run.best["val_loss"]
                label = "best checkpoint"
                if self.is_single:
                    label += f" ({loss:.3f} at step {step:,})"
                self.mark(number, run.x(step), loss, label, marker="*", markersize=11)
        self.draw_references(OPENAI_LOSS, ".4f")

    def draw_scores(self) -> None:
        """HellaSwag scores."""
        from matplotlib.ticker import PercentFormatter

        self.axes.set_ylabel("HellaSwag acc_norm, completion style")
        self.axes.yaxis.set_major_formatter(PercentFormatter(1))
        self.draw_curves({SCORE: "acc_norm"}, ".2%")
        style = {"color": "grey", "linewidth": 0.8, "linestyle": ":"}
        self.kinds["chance (25%)"] = self.axes.axhline(0.25, **style)
        self.draw_references(OPENAI_HELLASWAG, ".2%")

    def draw_numbers(self, y: Sequence[str]) -> None:
        """Any numbers of the log, of each event that has them."""
        self.axes.set_ylabel(", ".join(shown(name, LONGEST_NAME) for name in y))
        keys = [key for group in self.groups for run in group.runs for key in run.curves]
        self.draw_curves({key: shown(key[1], LONGEST_NAME) for key in keys}, ".4g")

    def draw_curves(self, words: dict[Key, str], form: str) -> None:
        """Draw some curves of each group that has them.

        words: what the legend calls each. form: how its values are written.
        """
        drawn_of_group = [group.curves(words) for group in self.groups]
        is_bounded = any(name.split(" ")[0] in GROWS_IN_DIVERGENCE for _, name in words)
        top = self.limit_height(drawn_of_group) if is_bounded else np.inf
        nth = {}  # curves of one event have different lines
        for key in words:
            nth[key] = sum(key[0] == event for event, _ in nth)
        for number, (group, drawn) in enumerate(zip(self.groups, drawn_of_group, strict=True)):
            for key, curve in drawn.items():
                end = format(curve.mean[-1], form)
                self.ends[number] = f"{words[key]} {end}"
                label = words[key] if self.is_single or len(words) > 1 else ""
                if self.is_single:
                    label += f" ({end})"
                    label += f", mean of {curve.steps} steps" if curve.steps > 1 else ""
                self.draw(number, key, curve, label, nth[key], top)
            run = group.runs[0]
            if drawn and "forked_at" in run.config:
                curve = drawn.get(VALIDATION, curve)
                x = run.x(run.config["forked_at"])
                y = np.interp(x, curve.x, curve.mean)
                self.mark(number, x, y, "fork", marker="D", markersize=6, markerfacecolor="white")

    def draw(self, number: int, key: Key, curve: Curve, label: str, nth: int, top: float) -> None:
        """A group's curve, pale for training. A band says what it is the mean of."""
        color, style = color_of(number), {"linestyle": style_of(10 * nth), "linewidth": 1.6}
        if key[0] == "train":
            style |= {"alpha": 0.55, "linewidth": 1}
        else:
            curve = without_start_above(curve, top)
        if key[0] != "train" or len(curve.x) == 1:
            style["marker"] = "."
        if self.is_single or len(self.groups[number].runs) > 1:
            band = {"color": color, "alpha": 0.15, "linewidth": 0}
            self.axes.fill_between(curve.x, curve.low, curve.high, **band)
        of_group = style | {"color": color, "linestyle": style_of(number + 10 * nth)}
        self.axes.plot(curve.x, curve.mean, **of_group)
        if label:
            self.add_kind(label, style)

    def mark(self, number: int, x: float, y: float, label: str, **style) -> None:
        """A point of a group's curve that the legend explains."""
        style |= {"linestyle": "", "zorder": 4}
        self.axes.plot([x], [y], color=color_of(number), **style)
        self.add_kind(label, style)

    def add_kind(self, label: str, style: dict) -> None:
        """Let the legend explain a kind of line, once."""
        color = color_of(0) if self.is_single else "black"
        self.kinds.setdefault(label, line_of(color, **style))

    def draw_references(self, values: dict[int, float], form: str) -> None:
        """A line at the value of OpenAI's model of the same number of layers, where it is fair."""
        for config in (group.runs[0].config for group in self.groups):
            value = values.get(config.get("n_layer"))
            if value and Path(str(config.get("data"))).name == FINEWEB_EDU:
                label = f"OpenAI GPT-2, same size ({value:{form}})"
                if label not in self.kinds:
                    style = {"color": "black", "linewidth": 0.8, "linestyle": "--"}
                    self.kinds[label] = self.axes.axhline(value, **style)

    def limit_height(self, drawn_of_group: list[dict[Key, Curve]]) -> float:
        """Limit the height to where the curves are once they have settled; returns the top.

        The first steps fall from ln V. To show them whole would flatten all that comes after. Nor
        does a curve set the scale that ends above twice the lowest end of its key: it has diverged.
        """
        ends = [curve.x[-1] for drawn in drawn_of_group for curve in drawn.values()]
        unsettled = UNSETTLED * max(ends, default=0)
        lowest_end: dict[Key, float] = {}
        for drawn in drawn_of_group:
            for key, curve in drawn.items():
                lowest_end[key] = min(curve.mean[-1], lowest_end.get(key, np.inf))
        kept = []
        for group, drawn in zip(self.groups, drawn_of_group, strict=True):
            begin = 0 if group.runs[0].config.get("init_from") else unsettled
            for key, curve in drawn.items():
                values = curve.mean[curve.x >= begin]
                if len(values) and values[-1] <= 2 * lowest_end[key]:
                    kept.append(values)
        if not kept:
            return np.inf
        low, high = np.concatenate(kept).min(), np.concatenate(kept).max()
        margin = 0.15 * (high - low) + 1e-3
        self.axes.set_ylim(low - margin, high + margin)
        return high + margin


def without_start_above(curve: Curve, top: float) -> Curve:
    """Drop the first points if they lie above the picture.

    The line from a point outside, at step 0, would cross all of a short run's picture.
    """
    inside = np.logical_or.accumulate(curve.mean <= top)
    return curve.part(inside) if inside.any() else curve


def color_of(number: int) -> str:
    """One of matplotlib's ten colors for each group, and grey for those without a label."""
    return f"C{number % 10}" if number < MOST_LABELS else "lightgrey"


def style_of(number: int) -> str:
    """Another kind of line for each ten groups."""
    return LINE_STYLES[number // 10 % len(LINE_STYLES)]


def short(count: float) -> str:
    """1500000 as 1.5M: thousands, millions and billions."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(count) >= unit:
            return f"{count / unit:.4g}{letter}"
    return f"{count:.4g}"


# ---------------------------------------------------------------------------------------- table


def table(groups: list[Group]) -> str:
    """Losses in Markdown: a row for each configuration, mean ± standard deviation."""
    head = ["run", "differs in", "runs", "tokens", "training loss"]
    head += ["validation loss, last", "lowest", "HellaSwag acc_norm"]
    rows = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for group in groups:
        ends = {}
        for key in (TRAINING, VALIDATION, SCORE):
            ends[key] = [run.curves[key].mean[-1] for run in group.runs if key in run.curves]
        lowest = [found for run in group.runs if (found := lowest_validation(run))]
        steps = {step for _, step in lowest}
        at = f" at step {steps.pop():,.0f}" if len(steps) == 1 else ""
        row = [
            group.runs[0].name + (f", unfinished{group.how_far}" if group.how_far else ""),
            group.differs,
            str(len(group.runs)),
            short(max(run.clock[1].max(initial=0) for run in group.runs)),
            mean_and_deviation(ends[TRAINING], ".4f"),
            mean_and_deviation(ends[VALIDATION], ".4f"),
            mean_and_deviation([loss for loss, _ in lowest], ".4f") + at,
            mean_and_deviation(ends[SCORE], ".2%"),
        ]
        rows.append([cell.replace("|", "\\|") for cell in row])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def lowest_validation(run: Run) -> tuple[float, float] | None:
    """The lowest validation loss and its step. A fork has none of its trunk's."""
    if VALIDATION not in run.curves:
        return None
    curve = run.curves[VALIDATION]
    steps = np.interp(curve.x, *run.clock[::-1])
    own = steps > run.config.get("forked_at", -1)
    return min(zip(curve.mean[own], steps[own], strict=True), default=None)


def mean_and_deviation(values: list[float], form: str) -> str:
    """The mean of several seeds and the standard deviation between them, which one seed lacks."""
    if len(values) < 2:
        return format(values[0], form) if values else "–"
    return f"{np.mean(values):{form}} ± {np.std(values, ddof=1):{form}}"


# ---------------------------------------------------------------------------------------- script


run_folders = tyro.conf.arg(metavar="RUN …", help_behavior_hint="(one or more)")
losses = tyro.conf.arg(metavar="KEY …", help_behavior_hint="(default: losses and HellaSwag)")


@dataclass(frozen=True)
class PlotConfig:
    # run directories, or folders of them
    runs: tyro.conf.Positional[Annotated[tuple[Path, ...], run_folders]] = ()
    out: Path = Path("curves.png")  # the picture: png, svg or pdf, as its suffix says
    x: Literal["tokens", "steps", "seconds"] = "tokens"  # what the horizontal axis shows
    # numbers in the log to draw, such as lr, grad_norm, tokens_per_second or metrics of your own
    y: Annotated[tuple[str, ...], losses] = ()
    table: bool = False  # print last and lowest losses as a Markdown table instead of drawing


def main() -> None:
    config = parse_flags(PlotConfig, PlotConfig(), __doc__)
    folders = find_runs(list(config.runs))
    if config.table:
        runs = [read_run(folder) for folder in folders]
        say_if_not_comparable(runs, script.say)
        print(table(arrange(runs)))
    else:
        draw_curves(folders, config.out, x=config.x, y=config.y)
        script.say(str(config.out))


if __name__ == "__main__":
    run_script(main)
