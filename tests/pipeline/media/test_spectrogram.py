"""Sound as an image: a quiet tone is seen, and silence is dark."""

from __future__ import annotations

import numpy as np
from moving import tone

from capstan.pipeline.media.spectrogram import spectrogram


def test_silence_with_the_noise_of_its_recorder_is_dark() -> None:
    noise = np.random.default_rng(0).integers(-1, 2, (16_000, 1)).astype(np.int16)  # one step of 16 bits, -92 dB
    assert spectrogram(noise, 8000).max() < 80
    assert spectrogram(np.zeros((16_000, 1), np.int16), 8000).max() == 0


def test_the_loudest_tone_is_white_however_quiet_it_is() -> None:
    for share in (1.0, 0.05):
        assert spectrogram((tone(1.0) * share).astype(np.int16), 8000).max() == 255
