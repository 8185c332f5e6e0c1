"""GPUs, counted without torch, and what is refused where there are too few."""

from __future__ import annotations

import pytest

from capstan.pipeline import gpus
from capstan.pipeline.config import Resources
from capstan.pipeline.errors import RecipeError


@pytest.mark.parametrize(
    ("visible", "count"), [("0", 1), ("0,1,2", 3), ("", 0), ("-1", 0), ("0,-1,1", 1), ("MIG-4ad,GPU-8f", 2)]
)
def test_cuda_visible_devices(visible: str, count: int) -> None:
    assert gpus.visible_of(visible) == count


def test_torch_counts_the_same() -> None:
    import torch

    assert gpus.count_gpus() in (None, torch.cuda.device_count())


def test_gpus_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(RecipeError, match=r"^resources.gpus: is 2, but this machine has no GPU. Fix: remove it"):
        gpus.check_gpus(Resources(gpus=2))
    with pytest.raises(RecipeError, match=r"^train.precision: fp16 needs a GPU, and this machine has no GPU"):
        gpus.check_precision("fp16", "train.precision", Resources())
    with pytest.raises(RecipeError, match=r"and resources.gpus is 0"):
        gpus.check_precision("fp16", "train.precision", Resources(gpus=0))
    gpus.check_gpus(Resources(gpus=0))
    gpus.check_precision("bf16", "train.precision", Resources())


def test_of_a_cluster_nothing_is_known_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    gpus.check_gpus(Resources(gpus=64))
    gpus.check_precision("fp16", "train.precision", Resources())
