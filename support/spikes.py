"""Loss spikes: a step whose loss jumps is noticed, and with --skip-spikes its update is left out.

The loss is judged, and not the norm of the gradient, because it wavers evenly around its mean.
Norms of ten times the usual one are common, and --grad-clip is the answer to them. The loss is
there before the update is made, and it is the same number on every rank, so that all decide alike.
"""

import math

from torch import Tensor


class SpikeGuard:
    """Tells a loss that jumps from one that wavers.

    `z` is how far the last loss lay above the mean of the WINDOW losses before it, in their
    standard deviations. Above LIMIT it is a spike. While the loss falls, as it does steeply at
    first, the losses before it are higher, and z is low. At first fewer will do, and until there
    are LEAST of them z is 0.

    A spike counts among the losses before the next one. So after a rise that lasts, only the first
    four steps are spikes: then it is the new level, and training goes on from there.
    """

    WINDOW = 128
    LEAST = 32
    LIMIT = 6.0  # the first run's 3,600 steps stay below 5

    def __init__(self, skips: bool):
        self.skips = skips  # whether the update of a spike is left out
        self.losses: list[float] = []  # the last ones, at most WINDOW
        self.left_out = 0  # updates, in all of the run
        self.z = 0.0

    def note(self, loss: float) -> None:
        """Take note of a step's loss, each step once."""
        self.z = self._z_of(loss)
        self.losses = [*self.losses, loss][-self.WINDOW :]

    def leaves_out(self, loss: Tensor) -> bool:
        """Whether the update of this loss is to be left out; without `skips` never.

        It notes the loss, and for that the host waits until a GPU has computed it.
        """
        if not self.skips:
            return False
        self.note(float(loss))
        self.left_out += self.sees_spike
        return self.sees_spike

    @property
    def sees_spike(self) -> bool:
        """Whether the last loss was a spike."""
        return self.z > self.LIMIT

    def _z_of(self, loss: float) -> float:
        count = len(self.losses)
        if count < self.LEAST:
            return 0.0
        # fsum rounds once, so that the ranks' machines cannot differ in the last bit.
        mean = math.fsum(self.losses) / count
        variance = math.fsum((x - mean) ** 2 for x in self.losses) / count
        return (loss - mean) / max(math.sqrt(variance), 1e-6)

    def state(self) -> dict:
        """What a continued run must know, for state.json."""
        return {"losses": self.losses, "left_out": self.left_out}

    def load(self, state: dict | None) -> None:
        """Go on from there. Checkpoints of older versions say nothing."""
        if state is None:
            return
        self.losses = state["losses"][-self.WINDOW :]
        self.left_out = state["left_out"]
