"""An image model → UNetSpatioTemporalConditionModel, which at first denoises each frame as the image model does

Weights go over by name: a ResNet block becomes the spatial half of a block that also convolves over frames, an
attention block gets one over frames next to it. The new halves start as the identity (Blattmann et al. 2023, Align your
Latents, section 3.1), and the input's new channels, the image that is continued, with weights of zero.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from capstan.pipeline.errors import RecipeError, first_line
from capstan.training.models.image_run import find_image_run
from capstan.training.models.svd.config import SvdSettings

FIELD: Final = "train.svd.after"
_GROUPS: Final = 32  # of the network's normalisation, whatever its width
_CONDITIONS: Final = 3  # frames per second, motion bucket, noise level
_BLOCKS: Final = {"CrossAttnDownBlock2D": "CrossAttnDownBlock", "DownBlock2D": "DownBlock"}
_BLOCKS_UP: Final = {"CrossAttnUpBlock2D": "CrossAttnUpBlock", "UpBlock2D": "UpBlock"}
# What ends a branch of the new halves: with zeros there, the branch adds nothing.
_LAST: Final = re.compile(
    r"temporal_res_block\.conv2|time_pos_embed\.linear_2"
    r"|temporal_transformer_blocks\.\d+\.(ff_in\.net\.2|ff\.net\.2|attn[12]\.to_out\.0)"
)


def image_product(settings: SvdSettings) -> Path:
    """Return the folder of the image run's pipeline. Raises RecipeError if it is of another kind."""
    return find_image_run(settings.after, FIELD, "Stable Video Diffusion starts from")


def video_unet(settings: SvdSettings, side: int) -> tuple[Any, int]:
    """Return diffusers' UNetSpatioTemporalConditionModel with the image run's weights, and how many they are.

    For latents of `side`. Raises RecipeError for an image run that does not fit.
    """
    from diffusers import UNet2DConditionModel, UNetSpatioTemporalConditionModel

    image = UNet2DConditionModel.from_pretrained(image_product(settings) / "unet")
    shape = image.config
    _check(shape, side)
    try:
        net = UNetSpatioTemporalConditionModel(
            sample_size=side,
            in_channels=2 * shape.in_channels,
            out_channels=shape.out_channels,
            down_block_types=tuple(f"{_BLOCKS[name]}SpatioTemporal" for name in shape.down_block_types),
            up_block_types=tuple(f"{_BLOCKS_UP[name]}SpatioTemporal" for name in shape.up_block_types),
            block_out_channels=tuple(shape.block_out_channels),
            addition_time_embed_dim=settings.condition_width,
            projection_class_embeddings_input_dim=_CONDITIONS * settings.condition_width,
            layers_per_block=shape.layers_per_block,
            cross_attention_dim=shape.cross_attention_dim,
            transformer_layers_per_block=shape.transformer_layers_per_block,
            num_attention_heads=heads_of(shape),
            num_frames=settings.frames,
        )
    except (KeyError, ValueError, RuntimeError) as error:  # networks of other tools, with blocks that do not exist here
        problem = f"has a UNet of another form ({first_line(error)})"
        raise RecipeError(FIELD, problem, "use a run with train.diffusion.unet") from None
    _start_as_identity(net)
    return net, take_weights(net, image.state_dict())


def heads_of(shape: Any) -> Any:
    """Return the number of attention heads of each level; diffusers' key for it is misnamed (diffusers#2011)."""
    heads = shape.num_attention_heads or shape.attention_head_dim
    return heads if isinstance(heads, int) else tuple(heads)


def take_weights(net: nn.Module, image: Mapping[str, torch.Tensor]) -> int:
    """Copy an image model's weights into `net` where they belong; return how many values were copied."""
    own, count = net.state_dict(), 0
    with torch.no_grad():
        for name, weight in image.items():
            place = re.sub(r"(resnets\.\d+)\.", r"\1.spatial_res_block.", name)
            target = own.get(place)
            if target is None:
                continue
            if place == "conv_in.weight":
                target.zero_()
                target = target[:, : weight.shape[1]]
            if target.numel() == weight.numel():  # a 1×1 convolution there is a linear layer here
                target.copy_(weight.reshape(target.shape))
                count += weight.numel()
    return count


def _check(shape: Any, side: int) -> None:
    """Raise RecipeError if the image run's network has no counterpart, or latents of `side` are too small for it."""
    halvings = len(shape.block_out_channels) - 1
    if side % 2**halvings:
        problem = f"latents of side {side} cannot be halved {halvings} times"
        raise RecipeError("train.svd.size", problem, "use another size")
    if shape.norm_num_groups != _GROUPS:
        problem = f"normalises in {shape.norm_num_groups} groups, and UNetSpatioTemporalConditionModel in {_GROUPS}"
        hint = f"use an image run with train.diffusion.unet.norm_num_groups: {_GROUPS}"
        raise RecipeError(FIELD, problem, hint)
    if (least := min(shape.block_out_channels)) <= _GROUPS:
        problem = (
            f"has a level of {least} channels, each a group of its own, which hides noise level, frame rate and motion"
        )
        raise RecipeError(FIELD, problem, f"use {2 * _GROUPS} or more in train.diffusion.unet.block_out_channels")


def _start_as_identity(net: nn.Module) -> None:
    for name, module in net.named_modules():
        if _LAST.search(name) and isinstance(module, nn.Linear | nn.Conv3d):
            nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class Continuer(nn.Module):
    """The network, and the image encoder if it is trained too, under their names in the pipeline."""

    def __init__(self, unet: Any, image_encoder: Any | None) -> None:
        super().__init__()
        self.unet = unet
        self.register_module("image_encoder", image_encoder)

    def forward(
        self,
        noisy: torch.Tensor,
        levels: torch.Tensor,
        image: torch.Tensor,
        given: torch.Tensor,
        numbers: torch.Tensor,
        dropped: torch.Tensor,
    ) -> torch.Tensor:
        """Return F [B, frames, C, h, w] for noisy latents of this shape at c_noise = `levels` [B].

        `image` [B, C, h, w] are the latents of the image, as the autoencoder has them; `given` is the image for the
        image encoder [B, 3, 224, 224] if that is part of this module, else its embedding [B, D]; `numbers` [B, 3] are
        frames per second − 1, motion bucket and noise level. Of the `dropped` samples [B] the network sees zeros in
        place of both latents and embedding, as the pipeline does for guidance.
        """
        encoder: Any = self.image_encoder
        embedding = given if encoder is None else encoder(given.to(noisy.dtype)).image_embeds
        kept = ~dropped
        embedding = embedding.to(noisy.dtype) * kept[:, None]
        image = image.to(noisy.dtype) * kept[:, None, None, None]
        whole = torch.cat([noisy, image[:, None].expand(-1, noisy.shape[1], -1, -1, -1)], dim=2)
        states, numbers = embedding[:, None], numbers.to(noisy.dtype)
        made: torch.Tensor = self.unet(
            whole, levels.to(noisy.dtype), encoder_hidden_states=states, added_time_ids=numbers, return_dict=False
        )[0]
        return made

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass: less memory, about a third more time."""
        self.unet.enable_gradient_checkpointing()
