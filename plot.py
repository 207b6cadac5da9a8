"""Loss curves of one or several runs, from their log.jsonl.

    python plot.py runs/gpt2 runs/gpt2-2        # writes curves.png
"""

import json
from pathlib import Path


def read_log(run: Path, event: str) -> list[dict]:
    """The events of one kind in a run's log.jsonl, in order."""
    with open(run / "log.jsonl") as f:
        return [entry for entry in map(json.loads, f) if entry["event"] == event]


def draw_curves(runs: list[Path], file: Path) -> None:
    """Train and validation loss against tokens, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot(xlabel="tokens", ylabel="loss (nats per token)")
    for i, run in enumerate(runs):
        train, val = read_log(run, "train"), read_log(run, "eval")
        axes.plot([e["tokens"] for e in train], [e["loss"] for e in train], color=f"C{i}", alpha=0.35, linewidth=0.8, label=f"{run.name}: training")
        axes.plot([e["tokens"] for e in val], [e["val_loss"] for e in val], color=f"C{i}", marker="o", markersize=3, label=f"{run.name}: validation")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file)
