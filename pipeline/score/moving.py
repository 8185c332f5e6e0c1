"""Measures of a clip's video and sound without a model: motion, stillness, bars; loudness, silence, clipping"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import ClassVar, Final

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from capstan.pipeline.score.scorer import Sample, SampleScorer, Values

_SIDE: Final = 64  # pixels of the shorter side at which flow is measured
_PAIRS: Final = 16  # pairs of neighbouring frames, evenly spread
_STILL: Final = 1.0  # mean difference of two frames, of 255: coding alone makes less
_DARK: Final = 24  # luma of a bar, at most
_WINDOW_S: Final = 0.05
_SILENT_DB: Final = -60.0  # of full scale
_QUIETEST_DB: Final = -120.0
_FULL: Final = 32_700  # samples at least this large are at full scale


class VideoMeasures(SampleScorer):
    """Measures of KEY.mp4."""

    name: ClassVar[str] = "video"
    sees_images: ClassVar[bool] = False
    sees_part: ClassVar[str] = "mp4"
    columns: ClassVar[list[pa.Field]] = [
        # Mean length of the optical flow (Farnebäck 2003), in pixels per second where the shorter side has 64 pixels.
        pa.field("video_motion", pa.float32()),
        pa.field("video_static", pa.float32()),  # share of neighbouring frames that are the same
        pa.field("video_letterbox", pa.float32()),  # share of the area that is black at the edges in every frame
    ]

    def score(self, samples: Sequence[Sample]) -> dict[str, Values]:
        rows = [_video(sample.part) for sample in samples]
        return {field.name: list(values) for field, values in zip(self.columns, zip(*rows, strict=True), strict=True)}


class SoundMeasures(SampleScorer):
    """Measures of KEY.flac."""

    name: ClassVar[str] = "sound"
    sees_images: ClassVar[bool] = False
    sees_part: ClassVar[str] = "flac"
    columns: ClassVar[list[pa.Field]] = [
        pa.field("sound_loudness", pa.float32()),  # root mean square in dB of full scale, -120 for silence
        pa.field("sound_silence", pa.float32()),  # share of windows of 50 ms below -60 dB
        pa.field("sound_clipping", pa.float32()),  # share of samples at full scale
    ]

    def score(self, samples: Sequence[Sample]) -> dict[str, Values]:
        rows = [_sound(sample.part) for sample in samples]
        return {field.name: list(values) for field, values in zip(self.columns, zip(*rows, strict=True), strict=True)}


def _video(mp4: bytes | None) -> tuple[float, float, float]:
    from capstan.pipeline.media.codec import clip_frames  # here: the extra `video` may be missing

    assert mp4 is not None
    frames, fps = clip_frames(mp4, _SIDE)
    luma = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    if len(luma) < 2:
        return 0.0, 1.0, letterbox(luma)
    starts = np.unique(np.linspace(0, len(luma) - 2, min(_PAIRS, len(luma) - 1)).round().astype(int))
    moved = float(np.mean([motion(luma[start], luma[start + 1]) for start in starts]))
    gaps = [float(np.abs(a.astype(np.int16) - b).mean()) for a, b in itertools.pairwise(luma)]
    return moved * fps, float(np.mean([gap < _STILL for gap in gaps])), letterbox(luma)


def motion(before: npt.NDArray[np.uint8], after: npt.NDArray[np.uint8]) -> float:
    """Return the mean length of the optical flow between two frames of luma [height, width], in pixels."""
    nothing: np.ndarray = np.zeros((*before.shape, 2), np.float32)
    flow = cv2.calcOpticalFlowFarneback(before, after, nothing, 0.5, 3, 15, 3, 5, 1.2, 0)
    return float(np.linalg.norm(flow, axis=2).mean())


def letterbox(luma: Sequence[npt.NDArray[np.uint8]]) -> float:
    """Return the share of the area outside the smallest rectangle with anything that is not black in some frame."""
    bright = np.max(np.stack(luma), axis=0) > _DARK
    rows, columns = np.flatnonzero(bright.any(axis=1)), np.flatnonzero(bright.any(axis=0))
    if not len(rows):
        return 1.0
    inside = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
    return 1.0 - float(inside) / bright.size


def _sound(flac: bytes | None) -> tuple[float, float, float]:
    from capstan.pipeline.media.codec import decode_flac

    assert flac is not None
    samples, rate = decode_flac(flac)
    if not len(samples):
        return _QUIETEST_DB, 1.0, 0.0
    scaled = samples.astype(np.float64) / 32_768
    window = max(1, round(_WINDOW_S * rate))
    whole = scaled[: max(1, len(scaled) // window) * window]
    windows = whole.reshape(-1, min(window, len(whole)), scaled.shape[1])
    silent = [decibels(part) < _SILENT_DB for part in windows]
    return decibels(scaled), float(np.mean(silent)), float((np.abs(samples.astype(np.int32)) >= _FULL).mean())


def decibels(samples: npt.NDArray[np.float64]) -> float:
    """Return the root mean square of samples (-1 to 1) in dB of full scale, at least -120."""
    power = float(np.square(samples).mean())
    return max(_QUIETEST_DB, 10 * float(np.log10(power))) if power > 0 else _QUIETEST_DB
