"""support/progress.py: a bar on a terminal, lines elsewhere, and no number that is a mere guess."""

import io
import sys

import pytest

from support import progress
from support.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """The time, in seconds, which a test sets."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    return clock


def lines_of(clock, updates, **settings) -> list[str]:
    """What is said of updates, each at a time with what is done then and the total."""
    said = []
    with Progress("step", say=said.append, **settings) as shown:
        for seconds, done, total in updates:
            clock[0] = seconds
            shown.update(done, lambda seconds=seconds: f"at {seconds} s", total)
    return said


def test_a_line_at_the_first_update_and_then_every_30_seconds(clock):
    updates = [(float(t), t, None) for t in range(1, 100)]
    said = lines_of(clock, updates, total=1000)
    assert said == [
        "step 1/1,000  at 1.0 s",
        "step 31/1,000  at 31.0 s  eta 0:16:09",
        "step 61/1,000  at 61.0 s  eta 0:15:39",
        "step 91/1,000  at 91.0 s  eta 0:15:09",
    ]


def test_the_time_left_counts_neither_the_first_update_nor_an_earlier_process(clock):
    """The first step compiles; what an earlier process has done says nothing of this one."""
    updates = [(100.0, 501, None), (140.0, 541, None)]
    assert lines_of(clock, updates, total=600, initial=500)[-1].endswith("eta 0:00:59")


@pytest.mark.parametrize("total", [None, 0, 2**63, 10**30, float("inf"), float("nan"), 5])
def test_a_total_that_is_unknown_or_cannot_be_right_is_not_shown(clock, total):
    said = lines_of(clock, [(1.0, 10, total), (31.0, 60, total)])
    assert said == ["step 10  at 1.0 s", "step 60  at 31.0 s"]


def test_a_time_left_of_years_is_not_shown(clock):
    said = lines_of(clock, [(1.0, 1, None), (31.0, 2, None)], total=10**9)
    assert said[-1] == "step 2/1,000,000,000  at 31.0 s"


def test_nothing_is_shown_unless_enabled(clock):
    assert lines_of(clock, [(1.0, 10, None)], enabled=False) == []


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("total, shown", [(20, "10/20"), (None, "10 step"), (2e6, "10.0/2.00M")])
def test_on_a_terminal_it_is_a_bar(monkeypatch, total, shown):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("step", total, say=pytest.fail) as bar:
        bar.update(10, lambda: "loss 2.41")
    assert shown in terminal.getvalue()
    assert "loss 2.41" in terminal.getvalue()


def test_a_terminal_that_has_gone_does_not_end_the_work(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("step", 20) as bar:
        monkeypatch.setattr(
            terminal, "write", lambda text: (_ for _ in ()).throw(OSError(5, "EIO"))
        )
        bar.update(10, lambda: "loss 2.41")
    assert bar.done == 10
