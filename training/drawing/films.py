"""Drawn films → images of them: the frames in a row, and below them the spectrogram of the sound"""

from __future__ import annotations

import numpy as np

from capstan.training.drawing.drawer import Drawn
from capstan.training.drawing.sounds import spectrograms

_SIDE = 96  # pixels: smaller frames are enlarged by a whole factor
_HEIGHT = 96  # pixels of a spectrogram


def pictures(drawn: Drawn) -> np.ndarray:
    """Return an image of each drawn film: uint8 [N, H, W, 3]; frames and sound share the axis of time."""
    import cv2

    factor = max(1, _SIDE // min(drawn.arrays.shape[2:4]))
    frames = drawn.arrays.repeat(factor, axis=2).repeat(factor, axis=3)
    strips = np.concatenate(list(frames.swapaxes(0, 1)), axis=2)
    size = strips.shape[2], _HEIGHT
    heard = [cv2.resize(one, size, interpolation=cv2.INTER_AREA) for one in spectrograms(drawn)]
    return np.concatenate([strips, np.stack(heard)], axis=1)
