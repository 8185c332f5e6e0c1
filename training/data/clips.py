"""Clips (MP4) → frames of one number, rate and size, as training sees them

Only the frames that are needed are decoded, from the key frame before the first of them on. An image is a video of one
frame.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Literal

import numpy as np

from capstan.training.data.transforms import cut, fitted
from capstan.training.drawing.drawer import Size
from capstan.training.family import Sample, Samples

Part = Literal["center", "random"]


def chosen(count: int, rate: float, frames: int, fps: float, rng: np.random.Generator | None = None) -> list[int]:
    """Return the numbers of `frames` frames at `fps` of a clip of `count` frames at `rate`: ascending.

    They lie in the clip's middle, or in a random part by `rng`. Raises ValueError for a clip that is too short.

    >>> chosen(8, 8.0, 8, 8.0), chosen(20, 8.0, 4, 4.0)
    ([0, 1, 2, 3, 4, 5, 6, 7], [6, 8, 10, 12])
    """
    step = rate / fps
    spare = (count - 1) - (frames - 1) * step
    if spare < -1e-6:
        needed = f"{frames} frames at {fps:g} per second"
        raise ValueError(f"its clip has {count} frames at {rate:g} per second, which are not {needed}")
    start = spare / 2 if rng is None else rng.random() * spare
    first = int(max(0.0, start) + 1e-6)  # whole frames, so that equal rates skip none
    return [min(count - 1, first + round(number * step)) for number in range(frames)]


def frames_of(
    mp4: bytes, frames: int | Sequence[int], fps: float | None, size: Size, rng: np.random.Generator | None = None
) -> np.ndarray:
    """Return frames of a clip as uint8 RGB [frames, height, width, 3], scaled to cover `size` and cut to its middle.

    Of several numbers of frames it is the largest that the clip has. `fps` None: at the clip's own rate.
    """
    from capstan.pipeline.media.codec import decode_frames

    *longer, shortest = [frames] if isinstance(frames, int) else sorted(frames, reverse=True)

    def wanted(count: int, rate: float) -> list[int]:
        for number in longer:
            with contextlib.suppress(ValueError):
                return chosen(count, rate, number, fps or rate, rng)
        return chosen(count, rate, shortest, fps or rate, rng)

    found = decode_frames(mp4, wanted)
    return np.stack([fitted(frame, size) for frame in found])


def file_frames(
    file: bytes, frames: int | Sequence[int], fps: float | None, size: Size, rng: np.random.Generator | None = None
) -> np.ndarray:
    """Return the frames of a clip, or the one of a JPEG: uint8 [frames or 1, height, width, 3]; see `frames_of`."""
    from capstan.pipeline.dataset.parts import is_part

    return frames_of(file, frames, fps, size, rng) if is_part("mp4", file) else cut(file, size)[None]


def clips_of(
    samples: Sequence[Sample], frames: int, fps: float | None, size: Size, part: Part = "center"
) -> tuple[np.ndarray, np.ndarray]:
    """Return clips as uint8 [B, frames, 3, height, width], and which samples are images (bool [B]).

    The single frame of an image is repeated.
    """
    shown = []
    for sample in samples:
        file, rng = sample.parts.get("mp4", sample.jpeg), sample.rng() if part == "random" else None
        shown.append(file_frames(file, frames, fps, size, rng))
    still = np.array([len(one) == 1 for one in shown])
    clips = np.stack([one if len(one) == frames else one.repeat(frames, 0) for one in shown])
    return np.ascontiguousarray(clips.transpose(0, 1, 4, 2, 3)), still


def clips_of_lengths(
    samples: Sequence[Sample], lengths: Sequence[int], fps: float | None, size: Size, part: Part = "center"
) -> tuple[np.ndarray, np.ndarray]:
    """Return clips as uint8 [B, frames, 3, height, width], and how many frames each has, int64 [B].

    A clip has the largest of `lengths` that it is long enough for, an image one; zeros follow.
    """
    clips = np.zeros((len(samples), max(lengths), 3, size[1], size[0]), np.uint8)
    counts = np.ones(len(samples), np.int64)
    for row, sample in enumerate(samples):
        rng = sample.rng() if part == "random" else None
        shown = file_frames(sample.parts.get("mp4", sample.jpeg), lengths, fps, size, rng)
        counts[row] = len(shown)
        clips[row, : len(shown)] = shown.transpose(0, 3, 1, 2)
    return clips, counts


def first_rate(samples: Samples) -> float | None:
    """Return the frames per second of the first clip among the samples; None if there is none."""
    from capstan.pipeline.media.codec import frame_rate

    for index in range(len(samples)):
        if (mp4 := samples.sample(index).parts.get("mp4")) is not None:
            return frame_rate(mp4)
    return None
