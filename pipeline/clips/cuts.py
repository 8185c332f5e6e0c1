"""Frames of a source video → frames at a constant rate, and where a new scene starts"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Final

import cv2
import numpy as np

SMALL: Final = (64, 36)  # width and height at which frames are compared
_NEIGHBOURS: Final = 8  # frames before, whose differences a cut's must exceed
_TIMES: Final = 3.0  # as often as their mean,
_KNOWN: Final = 2  # once this many are known since the last cut
_LATE: Final = 1e-6  # seconds: time stamps are rounded


def at_constant_rate(frames: Iterable[tuple[float, float, Any]], fps: int) -> Iterator[Any]:
    """Yield, for every 1/fps of a second, the frame that is shown then; `frames` yields (start, end, frame).

    Frames may be far apart or close together: only their times count, not their number.
    """
    number, shown, until = 0, None, 0.0
    for start, end, frame in frames:
        while shown is not None and number / fps < start - _LATE:
            yield shown
            number += 1
        shown, until = frame, end
    while shown is not None and (number / fps < until - _LATE or number == 0):
        yield shown
        number += 1


class SceneDetector:
    """Compares each frame with the one before: mean absolute difference of hue, saturation and value, 0 to 255."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._before: np.ndarray | None = None
        self._differences: deque[float] = deque(maxlen=_NEIGHBOURS)

    def starts_scene(self, pixels: np.ndarray) -> bool:
        """Return whether a new scene starts with this frame (uint8 RGB, of size SMALL).

        Its difference must reach the threshold and stand out from the frames before: fast motion is no cut.
        """
        hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV).astype(np.int16)
        before, self._before = self._before, hsv
        if before is None:
            return False
        gaps = np.abs(hsv - before)
        hue = np.minimum(gaps[..., 0], 180 - gaps[..., 0]) * np.minimum(hsv[..., 1], before[..., 1]) / 255
        difference = (float(hue.mean()) * 255 / 90 + float(gaps[..., 1].mean()) + float(gaps[..., 2].mean())) / 3
        known = len(self._differences)
        usual = sum(self._differences) / max(1, known)
        found = known >= _KNOWN and difference >= max(self._threshold, _TIMES * usual)
        if found:
            self._differences.clear()
        else:
            self._differences.append(difference)
        return found
