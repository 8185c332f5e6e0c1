"""FLAC bytes → pieces of sound of one length → tensors

A sound is brought to the model's rate and number of channels. One that is longer than a piece is cut, one that is
shorter is followed by silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from capstan.pipeline.errors import RecipeError
from capstan.training.family import Sample, Samples

Part = Literal["start", "random"]
_FULL = 32_768  # of 16 bits


@dataclass(frozen=True)
class Form:
    """The form of a model's sounds: values per second, channels, and values in a piece."""

    rate: int
    channels: int
    values: int

    @property
    def seconds(self) -> float:
        return self.values / self.rate


@dataclass(frozen=True)
class Piece:
    """A piece of a sound: int16 [values, channels], where it starts, and how long the whole sound is, in seconds."""

    samples: np.ndarray
    start_s: float
    total_s: float


def piece_of(flac: bytes, form: Form, rng: np.random.Generator | None = None) -> Piece:
    """Return a piece of a sound in the model's form: its start, or a random part by `rng`."""
    from capstan.pipeline.media.codec import decode_sound

    samples = decode_sound(flac, form.rate, form.channels)
    start = 0
    if rng is not None and len(samples) > form.values:
        start = int(rng.integers(len(samples) - form.values + 1))
    made = np.zeros((form.values, form.channels), np.int16)
    cut = samples[start : start + form.values]
    made[: len(cut)] = cut
    return Piece(made, start / form.rate, len(samples) / form.rate)


def pieces_of(samples: Sequence[Sample], form: Form, part: Part = "start") -> list[Piece]:
    """Return a piece of each sample's sound. Raises ValueError for a sample without one."""
    if any("flac" not in sample.parts for sample in samples):
        raise ValueError("the sample has no sound (.flac)")
    return [piece_of(one.parts["flac"], form, one.rng() if part == "random" else None) for one in samples]


def batch_of(pieces: Sequence[Piece]) -> torch.Tensor:
    """Return pieces as int16 [B, channels, values]."""
    return torch.from_numpy(np.stack([piece.samples.T for piece in pieces]))


def to_wave(samples: torch.Tensor) -> torch.Tensor:
    """Convert int16 to float32 −1 … 1."""
    return samples.float() / _FULL


def to_samples(wave: np.ndarray) -> np.ndarray:
    """Convert float −1 … 1 to int16; louder values are clipped."""
    made: np.ndarray = np.clip(np.rint(wave.astype(np.float64) * _FULL), -_FULL, _FULL - 1).astype(np.int16)
    return made


def form_of(samples: Samples | None, settings: Any, multiple: int, field: str) -> Form:
    """Return the form to train in: the settings' `rate`, `channels` and `seconds`, or those of the first sound.

    The length is rounded down to whole latents of `multiple` values. Raises RecipeError naming `field` if a piece is
    shorter than one.
    """
    from capstan.pipeline.media.codec import decode_flac

    rate, channels, seconds = settings.rate, settings.channels, settings.seconds
    if None in (rate, channels, seconds):
        assert samples is not None, "the settings leave something to the first sound"
        first = samples.sample(0)
        if "flac" not in first.parts:
            hint = f"set {field}.rate, {field}.channels and {field}.seconds"
            raise RecipeError(field, f"the first sample ({first.key}) has no sound to take its form from", hint)
        found, its_rate = decode_flac(first.parts["flac"])
        rate, channels = rate or its_rate, channels or found.shape[1]
        seconds = seconds or len(found) / its_rate
    values = int(seconds * rate + 1e-6) // multiple * multiple
    if not values:
        problem = f"{seconds:g} s at {rate} values per second are less than a latent of {multiple} values"
        raise RecipeError(f"{field}.seconds", problem, f"set {-(-multiple // rate)} or more")
    return Form(rate, channels, values)
