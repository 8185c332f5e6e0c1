"""PixArt's diffusion transformer, with cross-attention to T5's states.

PixArtTransformer2DModel, for PixArtSigmaPipeline.

DiT (Peebles & Xie 2023) with cross-attention and one modulation for all blocks (Chen et al. 2023, PixArt-α), on texts
of up to 300 tokens (Chen et al. 2024, PixArt-Σ).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from capstan.training.models.diffusion.backbone import Backbone, Given, LatentSpec, fit_pipeline
from capstan.training.models.diffusion.text_encoders import Slot


class DiT(Backbone):
    """Text encoders: a frozen T5, or a trained small CLIP with as many tokens as the pipeline's T5."""

    part = "transformer"
    slots = (Slot("text_encoder", "t5", masked=True, lower=True, length=300),)

    def network(self) -> Any:
        from diffusers import PixArtTransformer2DModel

        return PixArtTransformer2DModel

    @property
    def patch(self) -> int:
        return self.number("patch_size", 2)

    def derived_config(self, spec: LatentSpec) -> dict[str, Any]:
        width = self.number("num_attention_heads", 16) * self.number("attention_head_dim", 72)
        return {
            "sample_size": spec.side,
            "in_channels": spec.channels,
            "out_channels": spec.channels,  # without a learnt variance
            "cross_attention_dim": width,
            "caption_channels": spec.widths["text_encoder"],
            "use_additional_conditions": False,  # as in PixArt-Σ
        }

    def initialize(self, net: nn.Module) -> None:
        """Initialise as PixArt does: every block starts as the identity to text, and the network predicts 0."""
        inner: Any = net
        initialize_transformer(net, inner.pos_embed.proj)
        time = inner.adaln_single
        for linear in (time.emb.timestep_embedder.linear_1, time.emb.timestep_embedder.linear_2, time.linear):
            nn.init.normal_(linear.weight, std=0.02)
        for linear in (inner.caption_projection.linear_1, inner.caption_projection.linear_2):
            nn.init.normal_(linear.weight, std=0.02)
        zero(*(block.attn2.to_out[0] for block in inner.transformer_blocks), inner.proj_out)

    def predict(self, net: nn.Module, given: Given) -> torch.Tensor:
        prediction: torch.Tensor = net(
            given.noisy,
            encoder_hidden_states=given.text["text_states"].to(given.noisy.dtype),
            encoder_attention_mask=given.text["text_mask"],
            timestep=given.timesteps,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return prediction

    def pipeline(self, parts: Mapping[str, Any]) -> Any:
        from diffusers import PixArtSigmaPipeline

        return fit_pipeline(PixArtSigmaPipeline, self, parts)


def initialize_transformer(net: nn.Module, patches: nn.Conv2d) -> None:
    """Initialise as DiT's code does (Peebles & Xie 2023): matrices and patches Xavier-uniform, biases 0."""
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(patches.weight.view(patches.weight.shape[0], -1))
    if patches.bias is not None:
        nn.init.zeros_(patches.bias)


def zero(*layers: nn.Linear) -> None:
    """Zero these layers' weights (adaLN-Zero, Peebles & Xie 2023, §3.2)."""
    for layer in layers:
        nn.init.zeros_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
