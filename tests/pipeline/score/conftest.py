"""Models with random weights, and images of noise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
from small_clip import write_clip


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("models") / "clip", seed=0)


@pytest.fixture(scope="session")
def other_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("models") / "clip", seed=1)


@pytest.fixture(scope="session")
def linear_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As LAION's sa_0_4_*_linear.pth: the state dict of one linear layer."""
    import torch

    torch.manual_seed(2)
    file = tmp_path_factory.mktemp("heads") / "linear.pth"
    torch.save(torch.nn.Linear(16, 1).state_dict(), file)
    return file


@pytest.fixture(scope="session")
def noise() -> Callable[..., np.ndarray]:
    """noise(seed) returns a unique image: uint8 [96, 96, 3]."""

    def make(seed: int, size: int = 96) -> np.ndarray:
        small = np.random.default_rng(seed).integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8)
        return cv2.resize(small, (size, size), interpolation=cv2.INTER_CUBIC)

    return make


@pytest.fixture(scope="session")
def as_jpeg() -> Callable[..., bytes]:
    return lambda rgb, quality=95: simplejpeg.encode_jpeg(np.ascontiguousarray(rgb), quality)
