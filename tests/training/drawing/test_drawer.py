"""What a model drew, of whatever kind, and how it is shown."""

from __future__ import annotations

import io
import wave

import numpy as np
import pytest

from capstan.pipeline.errors import RecipeError
from capstan.training.config.monitoring import Evaluate
from capstan.training.drawing.drawer import Drawn, refuse_options
from capstan.training.drawing.grid import sheet
from capstan.training.drawing.sounds import spectrograms, wav_of
from capstan.training.metrics.metric import check_kinds, make_metrics


def test_a_clip_is_shown_as_a_row_of_its_frames() -> None:
    clips = np.zeros((2, 5, 16, 16, 3), np.uint8)
    clips[:, 2] = 255
    shown = sheet(Drawn("clip", clips, fps=4.0), ["a circle moves", "a square stands still"])
    images = sheet(Drawn("image", clips[:, 0]), ["a circle", "a square"])
    assert shown.width > 5 * 112
    assert shown.height < images.height * 2


def test_a_sound_is_shown_as_its_spectrogram_and_heard_as_wav() -> None:
    wave_ = np.sin(2 * np.pi * 440 * np.arange(8000) / 4000)[None, :, None].astype(np.float32)
    drawn = Drawn("sound", 1.5 * wave_, rate=4000)
    shown = np.asarray(sheet(drawn, ["a note"]).convert("L"))
    assert shown.shape[0] > 224
    bright = (spectrograms(drawn)[0, :, :, 0] > 200).any(axis=1)
    assert 2 <= bright.sum() < 64
    with wave.open(io.BytesIO(wav_of(drawn, 0))) as file:
        assert (file.getframerate(), file.getnchannels(), file.getnframes()) == (4000, 1, 8000)
        samples = np.frombuffer(file.readframes(8000), "<i2")
    assert samples.max() == 32_767, "louder values are clipped"
    assert np.abs(samples[:2] / 32_768 - 1.5 * wave_[0, :2, 0]).max() < 1e-4


def test_a_metric_judges_only_the_kinds_that_it_knows() -> None:
    metrics = make_metrics(Evaluate(measures=["oracle"]), "train.watch.evaluate")
    check_kinds(metrics, "image", "--measures")
    with pytest.raises(
        RecipeError, match=r"^--measures: oracle judges images and scenes, and this model draws sounds\. Fix: remove"
    ):
        check_kinds(metrics, "sound", "--measures")


def test_an_option_that_a_model_does_not_have_is_named() -> None:
    refuse_options({"steps": None, "guidance": None})
    with pytest.raises(RecipeError, match=r"^--guidance: this model has no such setting\. Fix: remove it"):
        refuse_options({"steps": None, "guidance": 3.0})
