"""MovingScene → frames, and samples: what is seen and what is heard"""

from __future__ import annotations

from typing import Final

import numpy as np

from capstan.pipeline.world.moving.scene import PITCHES, RHYTHMS, Moving, MovingScene
from capstan.pipeline.world.render import render

LEVEL: Final = 0.5  # of full scale
_RAMP_S: Final = 0.008  # of each note's start and end, so that nothing clicks


def frames_of(scene: MovingScene, size: int) -> np.ndarray:
    """Draw a clip: uint8 RGB [frames, size, size, 3]."""
    return np.stack([render(scene.still(number), size) for number in range(scene.frames)])


def samples_of(scene: MovingScene, rate: int) -> np.ndarray:
    """Return the sound of a clip: int16 [samples, 1], as long as its frames.

    Things that are there from the start sound one after the other, evenly spread over the clip, from left to right.
    """
    sound = np.zeros(round(scene.seconds * rate))
    for moving, start in zip(scene.things, starts_of(scene), strict=True):
        for begin, length in notes_of(moving):
            _add(sound, PITCHES[moving.thing.colour], round((start + begin) * rate), round(length * rate), rate)
    return np.rint(sound * LEVEL * 32767).astype(np.int16)[:, None]


def starts_of(scene: MovingScene) -> list[float]:
    """Return when each thing starts to sound, in seconds."""
    if any(moving.enters for moving in scene.things) or len(scene.things) == 1:
        return [moving.enters / scene.fps for moving in scene.things]
    return [scene.seconds * number / len(scene.things) for number in range(len(scene.things))]


def notes_of(moving: Moving) -> list[tuple[float, float]]:
    """Return (start, length) of a thing's notes in seconds, from its entry on."""
    count, length, step = RHYTHMS[moving.thing.shape]
    return [(number * step, length) for number in range(count)]


def _add(sound: np.ndarray, hertz: float, start: int, length: int, rate: int) -> None:
    length = min(length, len(sound) - start)
    if length <= 0:
        return
    time = np.arange(length)
    ramp = max(1, round(_RAMP_S * rate))
    envelope = np.minimum(1, np.minimum(time, length - 1 - time) / ramp)
    sound[start : start + length] += np.sin(2 * np.pi * hertz * time / rate) * envelope
