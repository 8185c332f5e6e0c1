"""Clips with their sound → frames, and the piece of sound that belongs to them"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from capstan.training.data.clips import Part, chosen
from capstan.training.data.sounds import Form
from capstan.training.data.transforms import fitted
from capstan.training.drawing.drawer import Size
from capstan.training.family import Sample


def film_of(
    sample: Sample, frames: int, fps: float | None, size: Size, form: Form, part: Part = "center"
) -> tuple[np.ndarray, np.ndarray]:
    """Return a part of a clip as uint8 RGB [frames, height, width, 3], and its sound as int16 [values, channels].

    Both start at the same time; a sound that ends early is followed by silence. `fps` None: at the clip's own rate.
    Raises ValueError for a sample without a clip or a sound, or with too short a clip.
    """
    from capstan.pipeline.media.codec import decode_frames, decode_sound

    if missing := [name for name in ("mp4", "flac") if name not in sample.parts]:
        raise ValueError(f"the sample has no {'clip' if missing[0] == 'mp4' else 'sound'} (.{missing[0]})")
    rng, start_s = sample.rng() if part == "random" else None, 0.0

    def wanted(count: int, rate: float) -> list[int]:
        nonlocal start_s
        numbers = chosen(count, rate, frames, fps or rate, rng)
        start_s = numbers[0] / rate
        return numbers

    shown = np.stack([fitted(frame, size) for frame in decode_frames(sample.parts["mp4"], wanted)])
    start = round(start_s * form.rate)
    heard = decode_sound(sample.parts["flac"], form.rate, form.channels)[start : start + form.values]
    sound = np.zeros((form.values, form.channels), np.int16)
    sound[: len(heard)] = heard
    return shown, sound


def films_of(
    samples: Sequence[Sample], frames: int, fps: float | None, size: Size, form: Form, part: Part = "center"
) -> tuple[np.ndarray, np.ndarray]:
    """Return clips, uint8 [B, frames, height, width, 3], and their sounds, int16 [B, values, channels]."""
    shown, heard = zip(*(film_of(sample, frames, fps, size, form, part) for sample in samples), strict=True)
    return np.stack(shown), np.stack(heard)
