"""UNet2DConditionModel for StableDiffusionPipeline and StableDiffusionXLPipeline.

Rombach et al. 2022 (latent diffusion): cross-attention to a text encoder's states. Podell et al. 2023 (SDXL):
cross-attention to the concatenated states of two encoders; the time embedding also gets the second's pooled state and
the image's original size and crop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from capstan.pipeline.errors import RecipeError
from capstan.training.models.diffusion.backbone import Backbone, Given, LatentSpec, fit_pipeline
from capstan.training.models.diffusion.config import UNetSettings
from capstan.training.models.diffusion.text_encoders import Slot, TextEncoder, TextEncoders


def configuration(settings: UNetSettings) -> dict[str, Any]:
    """Return the diffusers configuration that `train.diffusion.unet` describes."""
    attends = settings.attends
    return {
        "down_block_types": tuple("CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attends),
        "up_block_types": tuple("CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attends)),
        "block_out_channels": settings.block_out_channels,
        "layers_per_block": settings.layers_per_block,
        "attention_head_dim": settings.heads,  # diffusers takes this for the number of heads (diffusers#2011)
        "transformer_layers_per_block": settings.transformer_layers,
        "norm_num_groups": settings.norm_num_groups,
        "dropout": settings.dropout,
    }


class UNet(Backbone):
    """Stable Diffusion's UNet: cross-attention to the last states of one CLIP."""

    part = "unet"
    slots: ClassVar[tuple[Slot, ...]] = (Slot("text_encoder"),)

    def network(self) -> Any:
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel

    def derived_config(self, spec: LatentSpec) -> dict[str, Any]:
        return {
            "sample_size": spec.side,
            "in_channels": spec.channels,
            "out_channels": spec.channels,
            "cross_attention_dim": sum(spec.widths.values()),
        }

    @property
    def divisor(self) -> int:
        widths = self.config.get("block_out_channels", range(4))
        if isinstance(widths, int | float | str | None) or not len(widths):
            problem = f"{widths!r} is not a list of whole numbers"
            raise RecipeError(f"{self.field}.block_out_channels", problem, "set e.g. [128, 256, 512]")
        return int(2 ** (len(widths) - 1))

    def check(self, spec: LatentSpec) -> None:
        if spec.side % self.divisor:
            problem = f"latents of side {spec.side} cannot be halved {self.divisor.bit_length() - 1} times"
            hint = "use fewer levels, or another image size"
            raise RecipeError("train.diffusion.unet.block_out_channels", problem, hint)

    def predict(self, net: nn.Module, given: Given) -> torch.Tensor:
        states = given.text["text_states"].to(given.noisy.dtype)
        prediction: torch.Tensor = net(given.noisy, given.timesteps, encoder_hidden_states=states, return_dict=False)[0]
        return prediction

    def pipeline(self, parts: Mapping[str, Any]) -> Any:
        from diffusers import StableDiffusionPipeline

        none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return fit_pipeline(StableDiffusionPipeline, self, parts, **none)


def chunked_encoders(pipeline: Any, chunks: int) -> TextEncoders:
    """Return the text encoders of a StableDiffusionPipeline or StableDiffusionXLPipeline, reading texts in chunks."""
    slots = XlUNet.slots if hasattr(pipeline, "text_encoder_2") else UNet.slots
    there = [slot for slot in slots if getattr(pipeline, slot.name) is not None]
    parts = [TextEncoder(s, getattr(pipeline, s.name), getattr(pipeline, s.tokenizer), chunks) for s in there]
    return TextEncoders(parts, own=False)


class XlUNet(UNet):
    """SDXL's UNet: two CLIPs or only the second; penultimate states, and the second's projected state."""

    slots = (
        Slot("text_encoder", layer="penultimate", required=False),
        Slot("text_encoder_2", layer="penultimate", projected=True),
    )
    conditioned = True

    def derived_config(self, spec: LatentSpec) -> dict[str, Any]:
        sizes = 6 * self.number("addition_time_embed_dim", 256)
        pooled = sum(spec.pooled.values())
        return super().derived_config(spec) | {"projection_class_embeddings_input_dim": pooled + sizes}

    def predict(self, net: nn.Module, given: Given) -> torch.Tensor:
        noisy, timesteps, text, conditions = given
        assert conditions is not None, "SDXL needs the image's original size and crop"
        states = torch.cat([text[slot.states] for slot in self.slots if slot.states in text], dim=-1).to(noisy.dtype)
        # text_embeds [B, P]; time_ids [B, 6]: original height and width, crop's top and left, height and width
        added = {"text_embeds": text["text_pooled_2"].to(noisy.dtype), "time_ids": conditions.to(noisy.dtype)}
        prediction: torch.Tensor = net(
            noisy, timesteps, encoder_hidden_states=states, added_cond_kwargs=added, return_dict=False
        )[0]
        return prediction

    def pipeline(self, parts: Mapping[str, Any]) -> Any:
        from diffusers import StableDiffusionXLPipeline

        # Here an empty prompt is encoded like any other, as in training.
        return fit_pipeline(StableDiffusionXLPipeline, self, parts, force_zeros_for_empty_prompt=False)
