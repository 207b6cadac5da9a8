"""benchmarks/: contenders are compared and then timed, faults are said, and our peers agree."""

import json
import re
import sys

import numpy as np
import pytest
from tools import ROOT, run_python

sys.path.insert(0, str(ROOT / "benchmarks"))

import bench  # noqa: E402
import gpu  # noqa: E402
import harness  # noqa: E402
from harness import Case, Ready, Setting, run_case, table  # noqa: E402


def contender(value: float, log=None, name: str = "") -> Ready:
    """Computes 1 and `value`; each round adds its name to the log."""

    def work():
        if log:
            with open(log, "a") as f:
                f.write(name)

    return Ready(np.array([1.0, value]), work)


def not_installed() -> Ready:
    import no_such_package  # noqa: F401


def broken() -> Ready:
    raise ValueError("no luck")


def exits() -> Ready:
    sys.exit(3)


def run_letters(log, rounds: int, values: dict[str, float]) -> dict:
    """A case in which every contender is a letter that computes a value."""
    contenders = {name: (contender, value, log, name) for name, value in values.items()}
    return run_case(Case("case", "x", 6, contenders, 0.1, set_up_together=True), rounds)


def test_contenders_work_in_turn_and_only_those_that_agree(tmp_path):
    log = tmp_path / "log"
    result = run_letters(log, 3, {"A": 1, "B": 1.01, "C": 1.2, "D": float("nan")})
    rows = result["rows"]
    assert log.read_text() == "ABABAB"
    assert rows["B"]["rate"] == pytest.approx(6 / np.median(rows["B"]["all_seconds"]))
    assert rows["C"]["fault"] == "outputs differ from those of A by up to 0.2, more than 0.1"
    assert rows["D"]["fault"].startswith("outputs differ")


def test_a_fault_leaves_a_row_that_says_it():
    contenders = {"A": (contender, 1), "B": (not_installed,), "C": (broken,), "D": (exits,)}
    result = run_case(Case("case", "x", 6, contenders), rounds=1)
    rows = result["rows"]
    assert rows["B"]["fault"] == "not installed: No module named 'no_such_package'"
    assert rows["C"]["fault"] == "failed: ValueError: no luck"
    assert rows["D"]["fault"] == "failed: its process ended with 3"
    for name in "BCD":
        assert f"| {name} | {rows[name]['fault']} | | | | |" in table(result)


@pytest.mark.parametrize(
    "fault,is_raised", [("not installed: x", False), ("failed: x", True), (None, False)]
)
def test_the_run_fails_if_a_contender_failed_but_not_if_it_is_missing(fault, is_raised):
    results = [{"title": "case", "rows": {"A": {"fault": fault}}}]
    if is_raised:
        with pytest.raises(bench.UserError, match="case: A: failed: x"):
            bench.raise_faults(results)
    else:
        bench.raise_faults(results)


def test_a_ratio_is_taken_within_a_round():
    first = harness.Contender.__new__(harness.Contender)
    second = harness.Contender.__new__(harness.Contender)
    first.facts, first.seconds = {"fault": None}, [1.0, 2.0, 4.0]
    second.facts, second.seconds = {"fault": None}, [3.0, 4.0, 4.0]
    row = harness.row_of(Case("case", "x", 6, {}), second, first)
    assert row["ratio"] == (2.0, 1.0, 3.0)
    assert row["seconds"] == (4.0, 3.0, 4.0)
    assert row["rate"] == 1.5


@pytest.mark.parametrize("subject", ["train", "hellaswag", "sample"])
def test_peers_give_our_outputs(tmp_path, subject):
    """In this process, without the compiled ones: each costs a minute of compiling."""
    case = next(bench.SUBJECTS[subject](Setting("cpu", "float32", tmp_path, tiny=True)))
    outputs = []
    for name, (function, *arguments) in case.contenders.items():
        if "compiled" not in name:
            outputs.append(function(*arguments).output)
    first, *others = outputs
    assert others
    for other in others:
        assert np.all(case.difference(other, first) <= case.tolerance)
    wrong = np.roll(first, 1, axis=1) if subject == "sample" else first + 1
    assert not np.all(case.difference(wrong, first) <= case.tolerance)


def test_the_command_measures_data_and_writes_json(tmp_path):
    """Four contenders, one of them ours, whose streams of tokens are equal."""
    file = tmp_path / "data.json"
    done = run_python("benchmarks/bench.py", "data", "--tiny", "--rounds", 1, "--json", file)
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    assert figures["machine"]["versions"]["torch"]
    assert figures["date"]
    (case,) = figures["results"]
    assert len(case["rows"]) == 4
    assert not any(row["fault"] for row in case["rows"].values())
    assert table(case) in done.stdout
    assert table(case) in file.with_suffix(".md").read_text()


def test_a_profile_says_the_longest_kernels_and_how_long_none_ran():
    kernels = [gpu.Kernel("a|b", 0, 3000), gpu.Kernel("c", 1000, 6000), gpu.Kernel("c", 9000, 12e3)]
    text = gpu.describe(kernels).splitlines()
    assert text[0].startswith("A step took 4.0 ms; in 25.0% of it no kernel ran. 1 kernels a step")
    assert text[4:] == ["| `c` | 0.667 | 2.67 | 66.7% |", "| `a¦b` | 0.333 | 1.00 | 25.0% |"]


def test_the_subject_gpu_measures_what_it_promises(tmp_path):
    """Its optimizers and its scoring run here. The rest is compiled, or a case of the others."""
    cases = {case.title: case for case in gpu.gpu(Setting("cpu", "float32", tmp_path, tiny=True))}
    assert len(cases) == 6
    for case in cases.values():
        for name, (function, *arguments) in case.contenders.items():
            if function in (gpu.optimizer_steps, gpu.score_ours):
                function(*arguments).work()
            assert "transformers" not in name or case.title.startswith("train")


def test_the_subject_gpu_wants_one():
    done = run_python("benchmarks/bench.py", "gpu", "--device", "cpu")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: gpu without a GPU")


def test_nothing_outside_imports_from_benchmarks():
    names = "|".join(file.stem for file in (ROOT / "benchmarks").glob("*.py"))
    pattern = rf"^\s*(import|from) (benchmarks|{names})\b"
    for file in ROOT.glob("*.py"):
        assert not re.search(pattern, file.read_text(), re.MULTILINE), file
