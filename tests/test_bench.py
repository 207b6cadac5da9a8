"""bench.py: contenders are compared before they are timed, what is missing or fails is said, and every subject's peers agree with us."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import bench
from bench import Case, Ready, Setting, run_case, table


def contender(value: float, log=None, name: str = "") -> Ready:
    def work():
        if log:
            with open(log, "a") as f:
                f.write(name)

    return Ready(np.array([1.0, value]), work)


def not_installed() -> Ready:
    import no_such_package  # noqa: F401


def broken() -> Ready:
    raise ValueError("no luck")


def test_outputs_are_compared_before_anything_is_timed_and_faults_leave_empty_rows(tmp_path):
    log = tmp_path / "log"
    contenders = {
        name: (contender, value, log, name) for name, value in {"A": 1, "B": 1.01, "C": 1.2}.items()
    }
    result = run_case(
        Case(
            "case",
            "x",
            6,
            contenders | {"D": (not_installed,), "E": (broken,)},
            tolerance=0.1,
            together=True,
        ),
        rounds=3,
    )
    rows = result["rows"]
    assert log.read_text() == "ABABAB"  # in turn, and only those that agree
    assert rows["B"]["rate"] == pytest.approx(6 / np.median(rows["B"]["all_seconds"]))
    assert rows["C"]["fault"] == "outputs differ from those of A by up to 0.2, more than 0.1"
    assert rows["D"]["fault"] == "not installed: No module named 'no_such_package'"
    assert rows["E"]["fault"] == "failed: ValueError: no luck"
    assert all(rows[name]["fault"] in table(result) for name in "CDE")


@pytest.mark.parametrize("subject", ["train", "hellaswag", "sample"])
def test_peers_give_our_outputs(gpt2_vocabulary, tmp_path, subject):
    """In this process, without the compiled ones: each costs a minute of compiling."""
    case = next(bench.SUBJECTS[subject](Setting("cpu", "float32", tmp_path, tiny=True)))
    outputs = {
        name: what[0](*what[1:]).output
        for name, what in case.contenders.items()
        if "compiled" not in name
    }
    first, *others = outputs.values()
    assert others and all(
        np.all(case.difference(other, first) <= case.tolerance) for other in others
    )
    wrong = np.roll(first, 1, axis=1) if subject == "sample" else first + 1
    assert not np.all(case.difference(wrong, first) <= case.tolerance)


def test_command_line_measures_data_and_writes_json(gpt2_vocabulary, tmp_path):
    file = tmp_path / "data.json"
    done = subprocess.run(
        [sys.executable, ROOT / "bench.py", "data", "--tiny", "--rounds", "1", "--json", file],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    assert figures["machine"]["versions"]["torch"] and figures["date"]
    (case,) = figures["results"]
    assert len(case["rows"]) == 3 and not any(row["fault"] for row in case["rows"].values())
    assert table(case) in done.stdout
