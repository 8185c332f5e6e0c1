"""Dynamic loss scaling for fp16

Scales gradients above the smallest number of half precision (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2).
The scale doubles after a number of steps without overflow. If a gradient overflows, the scale is halved and the step is
skipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_START: Final = 2.0**16
_LEAST: Final = 2.0**-6  # below it, the scale is not the cause of infinite gradients
_GROWS_AFTER: Final = 2000  # steps


@dataclass
class LossScale:
    """The factor on the loss, the same on all workers, with its whole state."""

    scale: float = _START
    good: int = 0  # steps without overflow since the scale last changed

    @property
    def exhausted(self) -> bool:
        """Return whether even the smallest scale overflows: the gradient itself is not finite."""
        return self.scale < _LEAST

    def update(self, overflowed: bool) -> None:
        """Record a step, which was skipped if its gradient `overflowed`.

        >>> scale = LossScale(4.0, 1999)
        >>> scale.update(False); scale
        LossScale(scale=8.0, good=0)
        >>> scale.update(True); scale
        LossScale(scale=4.0, good=0)
        """
        self.good = 0 if overflowed else self.good + 1
        if overflowed:
            self.scale /= 2
        elif self.good == _GROWS_AFTER:
            self.scale, self.good = self.scale * 2, 0
