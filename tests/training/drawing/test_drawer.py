"""What a model drew, of whatever kind, and how it is shown."""

from __future__ import annotations

import numpy as np
import pytest

from capstan.pipeline.errors import CapstanError, RecipeError
from capstan.training.config.monitoring import Evaluate
from capstan.training.drawing.drawer import Drawn, refuse_options
from capstan.training.drawing.grid import sheet
from capstan.training.metrics.metric import check_kinds, make_metrics


def test_a_clip_is_shown_as_a_row_of_its_frames() -> None:
    clips = np.zeros((2, 5, 16, 16, 3), np.uint8)
    clips[:, 2] = 255
    shown = sheet(Drawn("clip", clips, fps=4.0), ["a circle moves", "a square stands still"])
    images = sheet(Drawn("image", clips[:, 0]), ["a circle", "a square"])
    assert shown.width > 5 * 112
    assert shown.height < images.height * 2
    with pytest.raises(CapstanError, match="a sound cannot be shown in an image"):
        sheet(Drawn("sound", np.zeros((1, 100, 1), np.float32), rate=100), ["a note"])


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
