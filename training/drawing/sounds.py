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
    samples = samples_of(drawn, number)
    with wave.open(buffer := io.BytesIO(), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(drawn.rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return buffer.getvalue()


def spectrograms(drawn: Drawn) -> np.ndarray:
    """Return an image of each drawn sound: uint8 [N, 128, W, 3]."""
    assert drawn.rate is not None, "sounds have a rate"
    return np.stack([spectrogram(samples_of(drawn, number), drawn.rate) for number in range(len(drawn))])


def samples_of(drawn: Drawn, number: int) -> np.ndarray:
    """Return drawn sound `number`, or the sound of a drawn film, as int16 [values, channels]."""
    sound = (drawn.arrays if drawn.sounds is None else drawn.sounds)[number].astype(np.float64)
    made: np.ndarray = np.clip(np.rint(sound * _FULL), -_FULL, _FULL - 1).astype(np.int16)
    return made
