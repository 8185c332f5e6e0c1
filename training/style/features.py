"""Two networks whose features say what an image shows and in which style: VGG16, or a first stage's encoder.

Shapes: images [1, 3, H, W] in −1 … 1; features [1, C, h, w], from fine to coarse.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import nn

from capstan.pipeline.errors import RecipeError
from capstan.training.models.autoencoder.lpips import load_vgg16
from capstan.training.product import find_product, kind_of, quieten

# In torchvision's `features`, the ReLU after conv1_1, conv2_1, conv3_1, conv4_1 and conv5_1; and after conv4_2.
_STYLE: Final = (1, 6, 11, 18, 25)
_CONTENT: Final = 20
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of images in 0 … 1


class Features(NamedTuple):
    """What a network sees in an image: layers whose Gram matrices are its style, and the one that is its content."""

    style: list[torch.Tensor]
    content: torch.Tensor


class Vgg(nn.Module):
    """VGG16 with the layers of Gatys et al. 2016, and their average pooling in place of the maximum."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, features: nn.Sequential) -> None:
        super().__init__()
        layers = (nn.AvgPool2d(2) if isinstance(layer, nn.MaxPool2d) else layer for layer in features)
        self.layers = nn.ModuleList(list(layers)[: _STYLE[-1] + 1])
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1))

    def forward(self, images: torch.Tensor) -> Features:
        x = ((images + 1) / 2 - self.mean) / self.std
        kept = {}
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index in (*_STYLE, _CONTENT):
                kept[index] = x
        return Features([kept[index] for index in _STYLE], kept[_CONTENT])


class Encoder(nn.Module):
    """The encoder of an autoencoder or a VQGAN: the features before and after each of its levels."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: torch.Tensor) -> Features:
        x = self.encoder.conv_in(images)
        style = [x]
        for block in self.encoder.down_blocks:
            x = block(x)
            style.append(x)
        return Features(style, x)


def open_vgg(path: str, field: str) -> Vgg:
    """Open torchvision's VGG16 from its file, or from the folder that also serves `perceptual.network`."""
    return Vgg(load_vgg16(Path(path), field, "name a first stage by --features"))


def open_encoder(run: str, field: str) -> Encoder:
    """Open the encoder of a trained first stage: a run, its product or its URL. Raises RecipeError for other models."""
    from diffusers import AutoencoderKL, VQModel

    quieten()
    product = find_product(run, field)
    classes = {"autoencoder": AutoencoderKL, "vqgan": VQModel}
    if (kind := kind_of(product)) not in classes:
        problem = f"{product} is not a first stage ({kind or 'unknown format'})"
        raise RecipeError(field, problem, "name a run of train.autoencoder or train.vqgan")
    return Encoder(classes[kind].from_pretrained(product, torch_dtype=torch.float32).encoder)
