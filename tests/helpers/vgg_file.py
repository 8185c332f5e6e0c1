"""A file of the shapes of torchvision's VGG16, with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torchvision.models import vgg16

from capstan.training.models.autoencoder.lpips import VGG


def write_vgg16(folder: Path) -> Path:
    """Write the convolutions, and a part of the classifier, which is nine tenths of the true file."""
    draw = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in vgg16(weights=None).features.state_dict().items()}
    weights = {
        f"features.{name}": torch.randn(shape, generator=draw) * (2 / max(1, shape[1:].numel())) ** 0.5
        if len(shape) > 1
        else torch.zeros(shape)
        for name, shape in shapes.items()
    }
    torch.save(weights | {"classifier.0.bias": torch.zeros(4096)}, folder / VGG)
    return folder / VGG
