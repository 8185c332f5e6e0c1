"""What train.watch refuses."""

from __future__ import annotations

import pytest

from capstan.pipeline.errors import RecipeError
from capstan.training.config import TrainConfig
from capstan.training.config.monitoring import flat, measures_in


def configure(model: str = "diffusion", **watch):
    section = {"model": model, "run": "r", "steps": 1, "watch": watch}
    return TrainConfig.from_section(section | ({"diffusion": {"autoencoder": "ae"}} if model == "diffusion" else {}))


def test_each_mistake_is_named():
    with pytest.raises(RecipeError, match=r"measure fid needs fid: \{features"):
        configure(evaluate={"measures": ["fid"]})
    with pytest.raises(RecipeError, match=r"'psnr' is not measured; one of background, .*, relation"):
        configure(evaluate={"measures": ["oracle"]}, best={"measure": "psnr"})
    with pytest.raises(RecipeError, match="generates images from prompts, and captioner cannot"):
        configure("captioner", samples={})
    with pytest.raises(RecipeError, match="trackers"):
        configure(trackers=["neptune"])
    with pytest.raises(RecipeError, match="unknown measure 'psnr'"):
        measures_in("oracle,psnr")


def test_less_is_better_for_fid_alone():
    measured = {"measures": ["clip", "fid"], "clip": {"model": "m"}, "fid": {"features": "f"}}
    for name, mode, sign in (("clip", None, 1), ("fid", None, -1), ("clip", "min", -1)):
        assert configure(evaluate=measured, best={"measure": name, "mode": mode}).watch.best.sign == sign


def test_a_run_may_be_watched_in_another_way():
    assert configure().fingerprint() == configure(trackers=[], bands=3).fingerprint()


def test_records_are_flat_for_trackers():
    assert flat({"step": 3, "loss": 1, "blend": {"a": 0.5}, "x": None}) == {"loss": 1.0, "blend/a": 0.5}
