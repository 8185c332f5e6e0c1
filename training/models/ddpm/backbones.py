"""The networks of the family `ddpm`: diffusers' UNets on pixels, without text and with it"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from capstan.pipeline.errors import RecipeError
from capstan.training.models.ddpm.config import DdpmSettings
from capstan.training.models.diffusion.backbone import LatentSpec
from capstan.training.models.diffusion.text_encoders import Slot
from capstan.training.models.diffusion.unet import UNet


class PixelNet(UNet):
    """UNet2DConditionModel with cross-attention to a CLIP's states, on images instead of latents."""

    def __init__(self, settings: DdpmSettings) -> None:
        unet, self.doubled = settings.unet, settings.variance == "learned"
        super().__init__(
            {
                "down_block_types": tuple(self.block("Down", yes) for yes in unet.attends),
                "up_block_types": tuple(self.block("Up", yes) for yes in reversed(unet.attends)),
                "block_out_channels": unet.block_out_channels,
                "layers_per_block": unet.layers_per_block,
                "attention_head_dim": self.heads(settings),
                "norm_num_groups": unet.norm_num_groups,
                "dropout": unet.dropout,
            }
        )

    @staticmethod
    def block(way: str, attends: bool) -> str:
        """Return diffusers' name of a block."""
        return f"{'CrossAttn' if attends else ''}{way}Block2D"

    @staticmethod
    def heads(settings: DdpmSettings) -> Any:
        """Return the heads of each level, which diffusers calls attention_head_dim (diffusers#2011)."""
        return tuple(channels // settings.unet.head_channels for channels in settings.unet.block_out_channels)

    def derived_config(self, spec: LatentSpec) -> dict[str, Any]:
        return super().derived_config(spec) | {"out_channels": spec.channels * (2 if self.doubled else 1)}

    def check(self, spec: LatentSpec) -> None:
        if spec.side % self.divisor:
            problem = f"images of {spec.side} pixels cannot be halved {self.divisor.bit_length() - 1} times"
            raise RecipeError("train.ddpm.unet.block_out_channels", problem, "use fewer levels, or another size")

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
    def heads(settings: DdpmSettings) -> Any:
        return settings.unet.head_channels  # of this class, it is the channels of a head

    def derived_config(self, spec: LatentSpec) -> dict[str, Any]:
        derived = super().derived_config(spec)
        del derived["cross_attention_dim"]
        return derived

    def predict(
        self,
        net: nn.Module,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        text: Mapping[str, torch.Tensor],
        conditions: torch.Tensor | None,
    ) -> torch.Tensor:
        prediction: torch.Tensor = net(noisy, timesteps, return_dict=False)[0]
        return prediction

    def pipeline(self, parts: Mapping[str, Any]) -> Any:
        from diffusers import DDPMPipeline

        return DDPMPipeline(**parts)
