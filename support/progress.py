"""How far a long piece of work is: a bar on a terminal, lines elsewhere."""

import contextlib
import datetime
import sys
import time
from collections.abc import Callable

from tqdm import tqdm

from support import script

LINE_SECONDS = 30
# More than any corpus or run has: such a total, or such a time, is a guess from too little.
MOST_DONE = 10**15
MOST_SECONDS = 365 * 24 * 3600


class Progress:
    """A bar on a terminal; elsewhere a line at the first update, and then one every 30 seconds.

        with Progress("step", total=600, initial=50) as progress:
            progress.update(51, lambda: "loss 2.41")

        step 51/600  loss 2.41
        step 94/600  loss 2.19  eta 0:05:53

    total: None where it is not known. initial: what an earlier process has done of it.
    """

    def __init__(
        self,
        unit: str,
        total: float | None = None,
        initial: int = 0,
        enabled: bool = True,
        say: Callable[[str], None] = script.say,
    ):
        self.unit = unit
        self.total = total
        self.initial = self.done = initial
        self.enabled = enabled
        self.say = say
        self.start = time.monotonic()
        self.first: tuple[int, float] | None = None  # what was done when at the first update
        self.next_line = 0.0
        on_terminal = enabled and sys.stderr is not None and sys.stderr.isatty()
        self.bar = tqdm(
            total=total,
            initial=initial,
            unit=f" {unit}",
            dynamic_ncols=True,
            disable=not on_terminal,
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def close(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # a terminal that has gone
            self.bar.close()

    @property
    def seconds(self) -> float:
        """Since the start of this process's part."""
        return time.monotonic() - self.start

    @property
    def rate(self) -> float:
        """Units a second since the start."""
        return (self.done - self.initial) / max(self.seconds, 1e-9)

    def update(
        self, done: int, describe: Callable[[], str] = str, total: float | None = None
    ) -> None:
        """So much is done now, what was done earlier included.

        describe: what else is shown; asked when it is. total: where an estimate of it has changed.
        """
        self.done = done
        self.total = total or self.total
        if not self.enabled:
            return
        if not self.bar.disable:
            self._draw(describe())
            return
        now = time.monotonic()
        self.first = self.first or (done, now)
        if now >= self.next_line:
            self.next_line = now + LINE_SECONDS
            self.say(self.line(describe(), now))

    def _draw(self, text: str) -> None:
        self.bar.total = self.known_total()
        self.bar.unit_scale = max(self.done, self.bar.total or 0) >= 10**6  # 1.23M
        with contextlib.suppress(OSError, ValueError):
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(self.done - self.bar.n)

    def known_total(self) -> float | None:
        """The total, unless it is unknown or cannot be right."""
        if self.total is None or not self.done <= self.total < MOST_DONE:
            return None
        return self.total

    def line(self, text: str, now: float) -> str:
        total = self.known_total()
        parts = [f"{self.unit} {self.done:,}" + (f"/{total:,.0f}" if total else "")]
        if text:
            parts.append(text)
        left = self.seconds_left(now)
        if left is not None:
            parts.append(f"eta {datetime.timedelta(seconds=round(left))}")
        return "  ".join(parts)

    def seconds_left(self, now: float) -> float | None:
        """Judged by the time since the first update, which itself may have had much to prepare."""
        total = self.known_total()
        first_done, first_time = self.first
        if total is None or self.done <= first_done:
            return None
        seconds = (total - self.done) * (now - first_time) / (self.done - first_done)
        return seconds if seconds < MOST_SECONDS else None
