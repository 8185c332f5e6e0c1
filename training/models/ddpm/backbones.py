"""The networks of the family `ddpm`: diffusers' UNets on pixels, without text and with it"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from capstan.training.models.diffusion.backbone import Given, LatentSpec
from capstan.training.models.diffusion.text_encoders import Slot
from capstan.training.models.pixels.settings import PixelUNet
from capstan.training.models.pixels.unet import PixelNet


class TextNet(PixelNet):
    """UNet2DConditionModel with cross-attention to a CLIP's states."""

    def pipeline(self, parts: Mapping[str, Any]) -> Any:
        from capstan.training.models.ddpm.pipeline import TextToPixelsPipeline

        return TextToPixelsPipeline(**parts)


class UnconditionalNet(PixelNet):
    """UNet2DModel with self-attention (Ho et al. 2020, appendix B)."""

    slots: ClassVar[tuple[Slot, ...]] = ()

    def network(self) -> Any:
        from diffusers import UNet2DModel

        return UNet2DModel

    @staticmethod
    def block(way: str, attends: bool) -> str:
        return f"{'Attn' if attends else ''}{way}Block2D"

    @staticmethod
    def heads(unet: PixelUNet) -> Any:
        return unet.head_channels  # of this class, it is the channels of a head

    def derived_config(self, spec: LatentSpec) -> dict[str, Any]:
        derived = super().derived_config(spec)
        del derived["cross_attention_dim"]
        return derived

    def predict(self, net: nn.Module, given: Given) -> torch.Tensor:
        prediction: torch.Tensor = net(given.noisy, given.timesteps, return_dict=False)[0]
        return prediction

    def pipeline(self, parts: Mapping[str, Any]) -> Any:
        from diffusers import DDPMPipeline

        return DDPMPipeline(**parts)
