"""The networks of Imagen's stages: UNets on pixels, for diffusers' IFPipeline and IFSuperResolutionPipeline

Text enters twice (Saharia et al. 2022, §2.3): the T5's states are further keys and values of every attention layer, and
their pooled state is added to the time embedding. The pipelines read twice as many channels as an image has, whether
or not the variance is learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from capstan.training.models.diffusion.backbone import Given, LatentSpec
from capstan.training.models.diffusion.text_encoders import Slot
from capstan.training.models.pixels.settings import PixelUNet
from capstan.training.models.pixels.unet import PixelNet

_UNUSED = {"safety_checker": None, "feature_extractor": None, "watermarker": None, "requires_safety_checker": False}
_POOLING_HEAD = 64  # most channels of a head that pools the T5's states


class BaseNet(PixelNet):
    """Text → image."""

    slots: ClassVar[tuple[Slot, ...]] = (Slot("text_encoder", "t5", masked=True, lower=True, length=77),)

    def __init__(self, unet: PixelUNet, *, section: str) -> None:
        super().__init__(unet, doubled=True, section=section)
        self.config |= {
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "resnet_time_scale_shift": "scale_shift",
        }

    @staticmethod
    def block(way: str, attends: bool) -> str:
        kind = {"Down": "Downsample", "Up": "Upsample"}[way]
        return f"SimpleCrossAttn{way}Block2D" if attends else f"Resnet{kind}Block2D"

    @staticmethod
    def heads(unet: PixelUNet) -> Any:
        return unet.head_channels  # of these blocks, it is the channels of a head

    def derived_config(self, spec: LatentSpec) -> dict[str, Any]:
        width = spec.widths["text_encoder"]
        return super().derived_config(spec) | {
            "encoder_hid_dim": width,  # the T5's states are projected to the width of the lowest level
            "encoder_hid_dim_type": "text_proj",
            "cross_attention_dim": self.unet.block_out_channels[-1],
            "addition_embed_type": "text",
            "addition_embed_type_num_heads": _heads(width),
        }

    def pipeline(self, parts: Mapping[str, Any]) -> Any:
        from diffusers import IFPipeline

        return IFPipeline(**parts, **_UNUSED)


class SuperNet(BaseNet):
    """Text and a smaller image, enlarged and noised → image. Its input is both images; it knows the noise's level."""

    def derived_config(self, spec: LatentSpec) -> dict[str, Any]:
        return super().derived_config(spec) | {"in_channels": 2 * spec.channels, "class_embed_type": "timestep"}

    def predict(self, net: nn.Module, given: Given) -> torch.Tensor:
        states = given.text["text_states"].to(given.noisy.dtype)
        prediction: torch.Tensor = net(
            given.noisy, given.timesteps, encoder_hidden_states=states, class_labels=given.conditions, return_dict=False
        )[0]
        return prediction

    def pipeline(self, parts: Mapping[str, Any]) -> Any:
        """Build the pipeline without the T5: it takes the states that the base computed."""
        from diffusers import IFSuperResolutionPipeline

        own = {name: part for name, part in parts.items() if name not in ("text_encoder", "tokenizer")}
        return IFSuperResolutionPipeline(**own, text_encoder=None, tokenizer=None, **_UNUSED)


def _heads(width: int) -> int:
    """Return the fewest heads of at most 64 channels that divide `width`."""
    return next(heads for heads in range(1, width + 1) if width % heads == 0 and width // heads <= _POOLING_HEAD)
