"""Drawn sounds → WAV files, and images of them"""

from __future__ import annotations

import io
import wave

import numpy as np

from capstan.pipeline.media.spectrogram import spectrogram
from capstan.training.drawing.drawer import Drawn

_FULL = 32_768  # of 16 bits


def wav_of(drawn: Drawn, number: int) -> bytes:
    """Return drawn sound `number` as a WAV file of 16 bits."""
    assert drawn.rate is not None, "sounds have a rate"
    samples = _int16(drawn.arrays[number])
    with wave.open(buffer := io.BytesIO(), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(drawn.rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return buffer.getvalue()


def spectrograms(drawn: Drawn) -> np.ndarray:
    """Return an image of each drawn sound: uint8 [N, 128, W, 3]."""
    assert drawn.rate is not None, "sounds have a rate"
    return np.stack([spectrogram(_int16(sound), drawn.rate) for sound in drawn.arrays])


def _int16(sound: np.ndarray) -> np.ndarray:
    made: np.ndarray = np.clip(np.rint(sound.astype(np.float64) * _FULL), -_FULL, _FULL - 1).astype(np.int16)
    return made
