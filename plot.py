"""Loss and HellaSwag curves of one or several runs, from their log.jsonl.

python plot.py runs/gpt2 runs/gpt2-2 --out curves.png
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from cli import UserError, parse_flags, run_script

# OpenAI's GPT-2 by number of layers: HellaSwag acc_norm, completion style (build-nanogpt for 124M and XL, llm.c for the
# two between), and the loss of the 124M model on FineWeb-Edu's validation shard (build-nanogpt).
OPENAI_HELLASWAG = {12: 29.55, 24: 37.52, 36: 43.20, 48: 48.93}
OPENAI_FINEWEB_EDU_LOSS = {12: 3.2924}


def read_log(run: Path) -> dict[str, dict[str, list]]:
    """Columns of log.jsonl by event: read_log(run)["train"]["loss"] is a list in step order."""
    events: dict[str, dict[str, list]] = {}
    try:
        lines = (run / "log.jsonl").read_text().splitlines()
    except FileNotFoundError:
        raise UserError(
            f"{run}/log.jsonl: not there", expected="a run directory", remedy="name one below runs/"
        ) from None
    for line in lines:
        entry = json.loads(line)
        columns = events.setdefault(entry["event"], {})
        for key, value in entry.items():
            columns.setdefault(key, []).append(value)
    return events


def draw_curves(runs: list[Path], file: Path) -> None:
    """Training and validation loss against tokens, HellaSwag beside it where it was scored, as a PNG."""
    from matplotlib.figure import Figure  # slow to import, and most ranks never draw

    logs, settled = {run: read_log(run) for run in runs}, []
    panels = 2 if any("hellaswag" in log for log in logs.values()) else 1
    figure = Figure(figsize=(1.5 + 5 * panels, 4), dpi=200, layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for color, (run, log) in zip((f"C{i % 10}" for i in range(len(logs))), logs.items()):
        name = f"{run.name}: " if len(logs) > 1 else ""
        if "train" in log:
            tokens, loss = (np.array(log["train"][key]) for key in ("tokens", "loss"))
            n = max(1, len(loss) // 100)  # steps in a mean
            means = np.convolve(loss, np.full(n, 1 / n), "valid")
            settled += means[len(means) // 20 :].tolist()
            axes[0].plot(tokens, loss, color=color, alpha=0.15, linewidth=0.6)
            axes[0].plot(
                tokens[n - 1 :],
                means,
                color=color,
                alpha=0.55,
                linewidth=1,
                label=f"{name}training" + f", mean of {n} steps" * (n > 1),
            )
        if "eval" in log:
            last = log["eval"]["val_loss"][-1]
            axes[0].plot(
                log["eval"]["tokens"],
                log["eval"]["val_loss"],
                color=color,
                linewidth=1.6,
                marker=".",
                label=f"{name}validation ({last:.3f})",
            )
        if "hellaswag" in log:
            acc = [100 * x for x in log["hellaswag"]["acc_norm"]]
            axes[1].plot(
                log["hellaswag"]["tokens"],
                acc,
                color=color,
                linewidth=1.6,
                marker=".",
                label=f"{name}acc_norm ({acc[-1]:.2f})",
            )
    for ax in axes:
        ax.set_xlabel("training tokens")
        ax.xaxis.set_major_formatter(lambda tokens, _: short(tokens))
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("loss (nats per token)")
    if (
        settled
    ):  # the first steps fall from ln V; showing them whole would flatten all that comes after
        low, high = min(settled), max(settled)
        axes[0].set_ylim(low - 0.15 * (high - low), high + 0.15 * (high - low) + 1e-3)
    if panels == 2:
        axes[1].set_ylabel("HellaSwag acc_norm (%), completion style")
        axes[1].axhline(25, color="grey", linewidth=0.8, linestyle=":", label="chance (25)")
    configs = [
        json.loads((run / "train.json").read_text())
        for run in runs
        if (run / "train.json").exists()
    ]
    for layers in sorted({c["n_layer"] for c in configs if c["data"] == "edu_fineweb10B"}):
        if loss := OPENAI_FINEWEB_EDU_LOSS.get(layers):
            axes[0].axhline(
                loss,
                color="black",
                linewidth=0.8,
                linestyle="--",
                label=f"OpenAI GPT-2, same size ({loss})",
            )
        if panels == 2 and (acc := OPENAI_HELLASWAG.get(layers)):
            axes[1].axhline(
                acc,
                color="black",
                linewidth=0.8,
                linestyle="--",
                label=f"OpenAI GPT-2, same size ({acc})",
            )
    for ax in axes:
        if ax.has_data():
            ax.legend(frameon=False, fontsize=8)
    figure.savefig(file)


def short(count: float) -> str:
    """1500000 as 1.5M: thousands, millions and billions."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(count) >= unit:
            return f"{count / unit:g}{letter}"
    return f"{count:g}"


@dataclass(frozen=True)
class PlotConfig:
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()  # run directories
    out: Path = Path("curves.png")  # the picture


def main() -> None:
    config = parse_flags(PlotConfig, PlotConfig(), __doc__)
    if not config.runs:
        raise UserError(
            "no runs named",
            expected="one or more run directories",
            remedy="for example python plot.py runs/first-run",
        )
    draw_curves(list(config.runs), config.out)
    print(config.out)


if __name__ == "__main__":
    run_script(main)
