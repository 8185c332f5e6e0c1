"""LPIPS: perceptual distance of two images by VGG16.

Zhang et al. 2018, “The unreasonable effectiveness of deep features as a perceptual metric”, eq. 1: the features after
each of VGG16's five blocks, normalised over the channels; their squared difference is weighted channel by channel.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Final

import torch
from torch import nn

from capstan.pipeline.errors import RecipeError
from capstan.training.models.autoencoder.config import PerceptualSettings

VGG: Final = "vgg16-397923af.pth"  # torchvision's VGG16 (IMAGENET1K_V1), under its published name
HEADS: Final = "vgg.pth"  # the linear heads, lpips/weights/v0.1/vgg.pth of the package lpips
_ENDS: Final = (4, 9, 16, 23, 30)  # in VGG16's `features`, the index after the last ReLU of each block
_CHANNELS: Final = (64, 128, 256, 512, 512)  # after each block
_UNSET: Final = "set perceptual: null"


class Lpips(nn.Module):
    """LPIPS over VGG16, from its features and linear heads."""

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, features: nn.Sequential, heads: list[torch.Tensor]) -> None:
        super().__init__()
        self.features = features
        self.heads = nn.ParameterList(heads)  # each [channels], ≥ 0 as published
        # ImageNet's mean and deviation for images in −1 … 1, as in the training of the heads.
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return the distance [B] of each pair of images [B, 3, H, W] in −1 … 1."""
        distance, begin = a.new_zeros(len(a)), 0
        a, b = ((x - self.shift) / self.scale for x in (a, b))  # separately: the true image needs no backward pass
        for end, head in zip(_ENDS, self.heads, strict=True):
            a, b = (self.features[begin:end](x) for x in (a, b))
            difference = (_unit(a) - _unit(b)).square() * head.view(1, -1, 1, 1)
            distance, begin = distance + difference.sum(1).mean((1, 2)), end
        return distance


def _unit(features: torch.Tensor) -> torch.Tensor:
    """Normalise features [B, C, h, w] over the channels; all-zero ones stay 0, with a finite gradient."""
    features = features.float()
    return features * torch.rsqrt(features.square().sum(1, keepdim=True) + 1e-10)


def load_lpips(settings: PerceptualSettings, field: str) -> Lpips:
    """Load the network from `settings.network`. Raises RecipeError naming `field` and the missing file."""
    folder, field = Path(settings.network), f"{field}.network"
    features = load_vgg16(folder, field, _UNSET)
    heads = _read(
        folder / HEADS, "LPIPS' heads for VGG16, lpips/weights/v0.1/vgg.pth of the package lpips", field, _UNSET
    )
    try:
        weights_by_block = [
            heads[f"lin{number}.model.1.weight"].float().view(width).clone() for number, width in enumerate(_CHANNELS)
        ]
    except (KeyError, RuntimeError) as error:
        raise RecipeError(field, f"{folder / HEADS} has no heads for VGG16 ({error})", "download LPIPS' file") from None
    return Lpips(features, weights_by_block)


def load_vgg16(path: Path, field: str, otherwise: str) -> nn.Sequential:
    """Load the convolutions of torchvision's VGG16 from its file, or from the folder that holds it.

    Raises RecipeError naming `field`; its hint ends with `otherwise`, which needs no such file.
    """
    from torchvision.models import vgg16

    file = path if path.is_file() else path / VGG
    with torch.device("meta"):  # never allocates the classifier, nine tenths of the weights
        features: nn.Sequential = vgg16(weights=None).features[: _ENDS[-1]]
    # An in-place ReLU would overwrite the features that are compared.
    for layer in features.modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = False
    weights = _read(file, "torchvision's VGG16", field, otherwise)
    own = {name.removeprefix("features."): tensor for name, tensor in weights.items() if name.startswith("features.")}
    try:
        features.load_state_dict(own, assign=True)
    except RuntimeError as error:
        raise RecipeError(field, f"{file} is not a VGG16 ({error})", "download torchvision's file") from None
    return features


def _read(path: Path, description: str, field: str, otherwise: str) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise RecipeError(field, f"no {path}", f"copy {path.name} there ({description}), or {otherwise}")
    try:
        weights: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise RecipeError(field, f"{path} cannot be read ({error})", f"download {path.name} again") from None
    return weights
