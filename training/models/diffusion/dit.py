"""PixArtTransformer2DModel, drawn by PixArtSigmaPipeline: a diffusion transformer that attends to T5's states.

DiT (Peebles & Xie 2023) with cross-attention and one modulation for all blocks (Chen et al. 2023, PixArt-α), on texts
of up to 300 tokens (Chen et al. 2024, PixArt-Σ).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from capstan.training.models.diffusion.backbone import Backbone, LatentSpec, fit_pipeline
from capstan.training.models.diffusion.text_encoders import Slot


class DiT(Backbone):
    """A T5; or a small CLIP of one's own, given as many tokens as the pipeline gives its T5."""

    part = "transformer"
    slots = (Slot("text_encoder", "t5", masked=True, lower=True, length=300),)

    def network(self) -> Any:
        from diffusers import PixArtTransformer2DModel

        return PixArtTransformer2DModel

    @property
    def patch(self) -> int:
        return int(self.config.get("patch_size", 2))

    def follows(self, ends: LatentSpec) -> dict[str, Any]:
        width = int(self.config.get("num_attention_heads", 16)) * int(self.config.get("attention_head_dim", 72))
        return {
            "sample_size": ends.side,
            "in_channels": ends.channels,
            "out_channels": ends.channels,  # no learnt variance
            "cross_attention_dim": width,
            "caption_channels": ends.widths["text_encoder"],
            "use_additional_conditions": False,  # as PixArt-Σ
        }

    def initialise(self, net: nn.Module) -> None:
        """As PixArt's: every block begins as the identity to text, and the whole predicts 0."""
        tower: Any = net
        initialise_transformer(net, tower.pos_embed.proj)
        time = tower.adaln_single
        for linear in (time.emb.timestep_embedder.linear_1, time.emb.timestep_embedder.linear_2, time.linear):
            nn.init.normal_(linear.weight, std=0.02)
        for linear in (tower.caption_projection.linear_1, tower.caption_projection.linear_2):
            nn.init.normal_(linear.weight, std=0.02)
        zero(*(block.attn2.to_out[0] for block in tower.transformer_blocks), tower.proj_out)

    def predict(
        self,
        net: nn.Module,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        text: Mapping[str, torch.Tensor],
        conditions: torch.Tensor | None,
    ) -> torch.Tensor:
        prediction: torch.Tensor = net(
            noisy,
            encoder_hidden_states=text["text_states"].to(noisy.dtype),
            encoder_attention_mask=text["text_mask"],
            timestep=timesteps,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return prediction

    def pipeline(self, parts: Mapping[str, Any]) -> Any:
        from diffusers import PixArtSigmaPipeline

        return fit_pipeline(PixArtSigmaPipeline, self, parts)


def initialise_transformer(net: nn.Module, patches: nn.Conv2d) -> None:
    """DiT's start (Peebles & Xie 2023, their code): matrices Xavier-uniform, biases 0, patches like a matrix."""
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(patches.weight.view(patches.weight.shape[0], -1))
    if patches.bias is not None:
        nn.init.zeros_(patches.bias)


def zero(*layers: nn.Linear) -> None:
    """Let these layers give 0 at the start (adaLN-Zero, Peebles & Xie 2023, §3.2)."""
    for layer in layers:
        nn.init.zeros_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
