"""The network of the family `cogvideox`: a T5 and a transformer over patches of space and time

Every patch of latents, of one latent in time, is a token, and so is every token of the text: all attend to all, in
every block (Peebles & Xie 2023, DiT; Yang et al. 2024, section 2.2). Clips of other lengths and sizes are sequences of
other lengths, with sine and cosine positions along each axis; an image is the shortest of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from capstan.training.models.cogvideox.config import TransformerSettings
from capstan.training.models.video_autoencoder.model import by_length


def build_transformer(
    settings: TransformerSettings, *, channels: int, side: int, frames: int, ratio: int, text: tuple[int, int]
) -> Any:
    """Return a new CogVideoXTransformer3DModel for latents of `side` of clips of `frames` frames.

    `ratio` frames are one latent; `text` is the width of the text's states, and their number.
    """
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(
        num_attention_heads=settings.heads,
        attention_head_dim=settings.head_width,
        in_channels=channels,
        out_channels=channels,
        time_embed_dim=settings.time_width,
        text_embed_dim=text[0],
        max_text_seq_length=text[1],
        num_layers=settings.layers,
        sample_width=side,
        sample_height=side,
        sample_frames=frames,
        patch_size=settings.patch,
        temporal_compression_ratio=ratio,
        spatial_interpolation_scale=1.0,
    )


class Denoiser(nn.Module):
    """The trainable module. Without a text encoder of its own, `forward` takes a frozen one's states."""

    def __init__(self, transformer: Any, text_encoder: Any | None) -> None:
        super().__init__()
        self.transformer = transformer
        self.register_module("text_encoder", text_encoder)

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, text: Mapping[str, torch.Tensor], counts: torch.Tensor
    ) -> torch.Tensor:
        """Return the prediction [B, frames, C, h, w] for noisy latents of this shape at timesteps [B].

        `text` has `ids` or `states`, without a mask, as the pipeline reads texts. Of each sample only the first
        `counts` frames [B] are seen; those of one length are denoised together, and zeros follow.
        """
        states = text.get("states")
        if states is None:
            encoder: Any = self.text_encoder
            states = encoder(text["ids"])[0]
        states, made = states.to(noisy.dtype), torch.zeros_like(noisy)
        for frames, rows in by_length(counts):
            part = self.transformer(noisy[rows, :frames], states[rows], timesteps[rows], return_dict=False)[0]
            made[rows, :frames] = part.to(made.dtype)
        return made

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass: less memory, about a third more time."""
        self.transformer.enable_gradient_checkpointing()
