"""Stable Diffusion 3's transformer: joint attention over text and image.

SD3Transformer2DModel, for StableDiffusion3Pipeline.

MMDiT (Esser et al. 2024, SD3, fig. 2): two CLIPs' states, concatenated and zero-padded to T5's width, followed by T5's
states; the CLIPs' concatenated pooled states are added to the time embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from capstan.pipeline.errors import RecipeError
from capstan.training.models.diffusion.backbone import Backbone, Given, LatentSpec, fit_pipeline
from capstan.training.models.diffusion.dit import initialize_transformer, zero
from capstan.training.models.diffusion.text_encoders import Slot

_T5_TOKENS = 256  # without a T5 the pipeline uses as many zero states


class MMDiT(Backbone):
    """Text encoders: two frozen CLIPs with projections and optionally a T5, or two trained small CLIPs."""

    part = "transformer"
    slots = (
        Slot("text_encoder", layer="penultimate", projected=True),
        Slot("text_encoder_2", layer="penultimate", projected=True),
        Slot("text_encoder_3", "t5", length=_T5_TOKENS, required=False),
    )
    shifts = True
    exact_times = True

    def network(self) -> Any:
        from diffusers import SD3Transformer2DModel

        return SD3Transformer2DModel

    @property
    def patch(self) -> int:
        return self.number("patch_size", 2)

    def derived_config(self, spec: LatentSpec) -> dict[str, Any]:
        width = self.number("num_attention_heads", 18) * self.number("attention_head_dim", 64)
        made = {
            "sample_size": spec.side,
            "in_channels": spec.channels,
            "out_channels": spec.channels,
            "caption_projection_dim": width,
            "pooled_projection_dim": sum(spec.pooled.values()),
            "joint_attention_dim": spec.widths.get("text_encoder_3", _clips(spec)),
        }
        if self.config.get("pos_embed_max_size") is None:
            # Allows other shapes, up to 4:1, and all buckets.
            made["pos_embed_max_size"] = max(2 * spec.side, spec.longest) // self.patch
        return made

    def check(self, spec: LatentSpec) -> None:
        needed = max(spec.side, spec.longest) // self.patch
        given = self.config.get("pos_embed_max_size") is not None
        if given and (most := self.number("pos_embed_max_size", needed)) < needed:
            problem = f"is {most}, but the longest side of the training images has {needed} patches"
            raise RecipeError("train.diffusion.config.pos_embed_max_size", problem, "remove it, or raise it")
        t5 = spec.widths.get("text_encoder_3")
        if t5 is not None and _clips(spec) > t5:
            problem = f"T5's width {t5} is less than that of both CLIPs ({_clips(spec)}), which are padded to it"
            raise RecipeError("train.diffusion.text.pretrained", problem, "use a wider T5, or none")

    def initialize(self, net: nn.Module) -> None:
        """Initialise as DiT does: every block starts as the identity (adaLN-Zero), and the network predicts 0."""
        inner: Any = net
        initialize_transformer(net, inner.pos_embed.proj)
        time = inner.time_text_embed
        for embedder in (time.timestep_embedder, time.text_embedder):
            for linear in (embedder.linear_1, embedder.linear_2):
                nn.init.normal_(linear.weight, std=0.02)
        for block in inner.transformer_blocks:
            zero(block.norm1.linear, block.norm1_context.linear)
        zero(inner.norm_out.linear, inner.proj_out)

    def predict(self, net: nn.Module, given: Given) -> torch.Tensor:
        noisy, timesteps, text, _ = given
        clip = torch.cat([text["text_states"], text["text_states_2"]], dim=-1).to(noisy.dtype)
        t5 = text.get("text_states_3")
        if t5 is None:
            t5 = clip.new_zeros(len(clip), _T5_TOKENS, clip.shape[-1])
        states = torch.cat([F.pad(clip, (0, t5.shape[-1] - clip.shape[-1])), t5.to(noisy.dtype)], dim=1)
        prediction: torch.Tensor = net(
            hidden_states=noisy,
            timestep=timesteps,
            encoder_hidden_states=states,
            pooled_projections=torch.cat([text["text_pooled"], text["text_pooled_2"]], dim=-1).to(noisy.dtype),
            return_dict=False,
        )[0]
        return prediction

    def pipeline(self, parts: Mapping[str, Any]) -> Any:
        from diffusers import StableDiffusion3Pipeline

        vae = parts["vae"]
        if vae.config.shift_factor is None:  # the pipeline adds it unconditionally
            vae.register_to_config(shift_factor=0.0)
        if "text_encoder_3" not in parts:
            encoder, tokenizer = _zero_t5(int(parts[self.part].config.joint_attention_dim))
            parts = {**parts, "text_encoder_3": encoder, "tokenizer_3": tokenizer}
        return fit_pipeline(StableDiffusion3Pipeline, self, parts)


def _zero_t5(width: int) -> tuple[Any, Any]:
    """Return a T5 without layers whose states are 0, as in the pipeline without a T5.

    `DiffusionPipeline.from_pretrained` opens this pipeline without a T5 only if the caller passes None for it.
    """
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    tokenizer = T5Tokenizer(extra_ids=0)
    shape = {"d_model": width, "d_kv": 1, "d_ff": 1, "num_layers": 0, "num_heads": 1}
    encoder = T5EncoderModel(T5Config(vocab_size=len(tokenizer), **shape))
    nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder, tokenizer


def _clips(spec: LatentSpec) -> int:
    return spec.widths["text_encoder"] + spec.widths["text_encoder_2"]
