# SPDX-License-Identifier: Apache-2.0
"""The guard of joint training: a move of masks or temperatures that makes the loss jump is undone and made smaller.

Source: docs/method.md, cooperative optimisation, step 6.
"""

from __future__ import annotations

from collections.abc import Callable

MIN_PART = 1 / 8  # part of a move that is made whatever it does, or the target would never be reached


class Guard:
    """Makes moves, looks what they do to a loss, and where it jumps leaves half of them, a quarter or an eighth.

    Args:
        loss: gives what it is now.
        tolerance: share by which one move may raise it.
    """

    def __init__(self, loss: Callable[[], float], tolerance: float):
        self.loss, self.tolerance = loss, tolerance
        self.undone = 0  # times that half of a move was taken back
        self.loss_increase = 0.0  # by the last move that was looked at, as a share of the loss before

    def move(self, make: Callable[[], None], halve: Callable[[], None]) -> float:
        """Makes a move, and halves what is left of it until the loss bears it; returns the part that stays."""
        before, part = self.loss(), 1.0
        make()
        while part > MIN_PART and not self._bears(before):
            halve()
            part /= 2
            self.undone += 1
        return part

    def state_dict(self) -> dict[str, float]:
        return {"undone": self.undone, "loss_increase": self.loss_increase}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.undone, self.loss_increase = int(state["undone"]), state["loss_increase"]

    def _bears(self, before: float) -> bool:
        after = self.loss()
        self.loss_increase = after / before - 1 if before else 0.0
        return after <= (1 + self.tolerance) * before  # not where it is NaN
