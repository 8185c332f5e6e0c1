"""Sound → images of it: a spectrogram, which stands for a clip of sound where an image is wanted, and a waveform"""

from __future__ import annotations

from typing import Final

import numpy as np

HEIGHT: Final = 128  # pixels, one per band
_COLUMNS_PER_S: Final = 32
_MOST_COLUMNS: Final = 1024
_WINDOW_S: Final = 0.064
_RANGE_DB: Final = 80.0  # below the loudest
_QUIET_DB: Final = -40.0  # of full scale: what is not as loud anywhere stays dark, so silence is black


def spectrogram(samples: np.ndarray, rate: int) -> np.ndarray:
    """Return the spectrogram of samples (int16 [samples, channels]) as RGB (uint8 [128, W, 3]).

    Low tones are at the bottom, bands are spaced logarithmically from 40 Hz to half the rate, brightness is in dB: from
    80 below the loudest tone (black) to it (white). A loudest tone below -40 dB of full scale is not white.
    """
    mono = samples.astype(np.float32).mean(axis=1) / 32768
    window = 1 << max(6, round(np.log2(_WINDOW_S * rate)))
    columns = int(np.clip(round(len(mono) / rate * _COLUMNS_PER_S), 64, _MOST_COLUMNS))
    padded = np.pad(mono, (window // 2, window))
    starts = (np.arange(columns) * len(mono) // columns).astype(int)
    frames = np.stack([padded[start : start + window] for start in starts]) * np.hanning(window).astype(np.float32)
    power = np.abs(np.fft.rfft(frames, axis=1) * (4 / window)) ** 2  # a tone at full scale: 0 dB
    edges = np.geomspace(40, rate / 2, HEIGHT + 1) / (rate / 2) * (power.shape[1] - 1)
    low = np.minimum(np.floor(edges[:-1]).astype(int), power.shape[1] - 2)
    high = np.maximum(np.ceil(edges[1:]).astype(int), low + 1)
    sums = np.concatenate([np.zeros((columns, 1)), np.cumsum(power, axis=1)], axis=1)
    bands = (sums[:, high] - sums[:, low]) / (high - low)
    level = 10 * np.log10(np.maximum(bands, 1e-16))
    loudest = max(float(level.max()), _QUIET_DB)
    grey = np.clip((level - loudest) / _RANGE_DB + 1, 0, 1)
    picture = np.rint(grey.T[::-1] * 255).astype(np.uint8)
    return np.repeat(picture[:, :, None], 3, axis=2)


def waveform(samples: np.ndarray, width: int, height: int) -> np.ndarray:
    """Return the waveform of samples (int16 [samples, channels]) as RGB (uint8 [height, width, 3]), dark on white."""
    picture = np.full((height, width, 3), 255, np.uint8)
    if not len(samples):
        return picture
    mono = samples.astype(np.float32).mean(axis=1) / 32768
    edges = np.arange(width + 1) * len(mono) // width
    for column in range(width):
        part = mono[edges[column] : max(edges[column] + 1, edges[column + 1])]
        top, bottom = (round(float((1 - value) / 2 * (height - 1))) for value in (part.max(), part.min()))
        picture[top : bottom + 1, column] = (40, 80, 140)
    return picture
