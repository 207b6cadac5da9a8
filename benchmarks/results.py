"""Results of the experiments of recipes.py: one JSON line for each finished run."""

import json
import os
import statistics
from pathlib import Path

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t at 97.5% by number of seeds


def read_results(file: Path, experiment: str = "") -> list[dict]:
    """Those of an experiment; without one all."""
    if not file.exists():
        return []
    results = [json.loads(line) for line in file.read_text().splitlines()]
    return [result for result in results if experiment in ("", result["experiment"])]


def add_result(file: Path, result: dict) -> None:
    """Append one line in one write, so that several processes can share the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "ab", buffering=0) as f:
        f.write(json.dumps(result).encode() + b"\n")
        os.fsync(f.fileno())


def difference(losses: dict[int, float], others: dict[int, float]) -> str:
    """The mean difference of runs of equal seeds, and half of its 95% interval."""
    values = [losses[seed] - others[seed] for seed in losses.keys() & others.keys()]
    if len(values) not in T_95:
        return ""
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):+.4f} ± {T_95[len(values)] * error:.4f}"
