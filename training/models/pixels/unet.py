"""UNets on pixels, with cross-attention to a text encoder's states"""

from __future__ import annotations

from typing import Any

from capstan.pipeline.errors import RecipeError
from capstan.training.models.diffusion.backbone import LatentSpec
from capstan.training.models.diffusion.unet import UNet
from capstan.training.models.pixels.settings import PixelUNet


class PixelNet(UNet):
    """UNet2DConditionModel on images instead of latents; `doubled`: with further channels for the variance.

    `section` is that of the recipe, for errors.
    """

    def __init__(self, unet: PixelUNet, *, doubled: bool, section: str) -> None:
        self.unet, self.doubled = unet, doubled
        super().__init__(
            {
                "down_block_types": tuple(self.block("Down", yes) for yes in unet.attends),
                "up_block_types": tuple(self.block("Up", yes) for yes in reversed(unet.attends)),
                "block_out_channels": unet.block_out_channels,
                "layers_per_block": unet.layers_per_block,
                "attention_head_dim": self.heads(unet),
                "norm_num_groups": unet.norm_num_groups,
                "dropout": unet.dropout,
            }
        )
        self.field = f"train.{section}.unet"  # type: ignore[misc]

    @staticmethod
    def block(way: str, attends: bool) -> str:
        """Return diffusers' name of a block."""
        return f"{'CrossAttn' if attends else ''}{way}Block2D"

    @staticmethod
    def heads(unet: PixelUNet) -> Any:
        """Return the heads of each level, which diffusers calls attention_head_dim (diffusers#2011)."""
        return tuple(channels // unet.head_channels for channels in unet.block_out_channels)

    def derived_config(self, spec: LatentSpec) -> dict[str, Any]:
        return super().derived_config(spec) | {"out_channels": spec.channels * (2 if self.doubled else 1)}

    def check(self, spec: LatentSpec) -> None:
        if spec.side % self.divisor:
            problem = f"images of {spec.side} pixels cannot be halved {self.divisor.bit_length() - 1} times"
            raise RecipeError(f"{self.field}.block_out_channels", problem, "use fewer levels, or another size")
