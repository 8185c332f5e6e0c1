"""A clip → one image of it: frames in the order of time, or a sound's spectrogram, and below them its waveform"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import cv2
import numpy as np

from capstan.pipeline.media.codec import decode_flac, decode_frames
from capstan.pipeline.media.spectrogram import waveform

_GAP: Final = 2  # pixels between frames
_WAVE: Final = 0.25  # height of the waveform, of a frame's


def sheet_of_frames(mp4: bytes, frames: int, count: int = 4, columns: int = 2) -> np.ndarray:
    """Return `count` frames of a clip of `frames`, evenly spread, from left to right and top to bottom: RGB uint8."""
    wanted = sorted({round((frames - 1) * number / max(1, count - 1)) for number in range(count)})
    return sheet_of(decode_frames(mp4, wanted), columns)


def sheet_of(shown: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Return frames (RGB uint8) from left to right and top to bottom in one image."""
    height, width = shown[0].shape[:2]
    rows = math.ceil(len(shown) / columns)
    across = min(columns, len(shown))
    sheet = np.full(((height + _GAP) * rows - _GAP, (width + _GAP) * across - _GAP, 3), 255, np.uint8)
    for number, frame in enumerate(shown):
        top, left = number // columns * (height + _GAP), number % columns * (width + _GAP)
        sheet[top : top + height, left : left + width] = frame
    return sheet


def picture_of(
    mp4: bytes | None, flac: bytes | None, frames: int, side: int, still: np.ndarray | None = None
) -> np.ndarray | None:
    """Return what a contact sheet shows of a clip, with at most `side` pixels on the longer side; None: nothing.

    `still` is the spectrogram of a sound alone (RGB uint8); it is as wide as the waveform, so their times agree.
    """
    wave = None
    if flac:
        samples, _ = decode_flac(flac)
        wave = waveform(samples, side, round(side * _WAVE)) if samples.any() else None
    if not mp4:
        return wave if wave is None or still is None else _above(wave, still, side)
    sheet = sheet_of_frames(mp4, frames)
    room = side - (len(wave) + _GAP if wave is not None else 0)
    scale = min(side / sheet.shape[1], room / sheet.shape[0], 1.0)
    size = (max(1, round(sheet.shape[1] * scale)), max(1, round(sheet.shape[0] * scale)))
    sheet = cv2.resize(sheet, size, interpolation=cv2.INTER_AREA)
    if wave is None:
        return sheet
    return _joined(sheet, cv2.resize(wave, (sheet.shape[1], len(wave)), interpolation=cv2.INTER_AREA))


def _above(wave: np.ndarray, still: np.ndarray, side: int) -> np.ndarray:
    return _joined(cv2.resize(still, (wave.shape[1], side - len(wave) - _GAP), interpolation=cv2.INTER_LINEAR), wave)


def _joined(sheet: np.ndarray, wave: np.ndarray) -> np.ndarray:
    """Return two images of the same width, one above the other."""
    return np.concatenate([sheet, np.full((_GAP, sheet.shape[1], 3), 255, np.uint8), wave])
