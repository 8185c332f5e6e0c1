"""The denoiser: noisy latents, timesteps and token ids → a prediction; UNet and text encoder as one trainable module.

Shapes: latents and prediction [B, C, h, w]; timesteps [B]; ids [B, L]; text states [B, L, W].
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.errors import RecipeError
from training.diffusion.settings import TextSettings, UNetSettings


class Denoiser(nn.Module):
    """A UNet, and the text encoder if that is trained too (None: the states come from outside, frozen)."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module | None) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """`text` is ids [B, L] where the text encoder is part of this module, else states [B, L, W]."""
        states = text if self.text_encoder is None else self.text_encoder(text)[0]
        return self.unet(noisy, timesteps, encoder_hidden_states=states.to(noisy.dtype), return_dict=False)[0]


def build_unet(settings: UNetSettings, *, channels: int, side: int, text_width: int) -> Any:
    """A new UNet2DConditionModel for latents [channels, side, side]. Raises RecipeError where its levels do not fit."""
    from diffusers import UNet2DConditionModel

    halvings = len(settings.block_out_channels) - 1
    if side % 2**halvings:
        mend = "use fewer levels, or another picture size"
        raise RecipeError(
            "train.diffusion.unet.block_out_channels", f"cannot halve latents of {side} {halvings}×", mend
        )
    attends = settings.attends
    return UNet2DConditionModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attends)),
        block_out_channels=settings.block_out_channels,
        layers_per_block=settings.layers_per_block,
        cross_attention_dim=text_width,
        attention_head_dim=settings.heads,  # diffusers takes this for the number of heads (diffusers#2011)
        transformer_layers_per_block=settings.transformer_layers,
        norm_num_groups=settings.norm_num_groups,
        dropout=settings.dropout,
    )


def build_text_encoder(settings: TextSettings, tokenizer: Any) -> Any:
    """A new CLIPTextModel for the ids of `tokenizer`."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.width,
            intermediate_size=4 * settings.width,
            projection_dim=settings.width,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            max_position_embeddings=settings.length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def load_tokenizer(folder: Path, length: int | None = None) -> Any:
    """The CLIPTokenizer in `folder`; prompts are cut and padded to `length` tokens (None: what the folder says)."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder, **({} if length is None else {"model_max_length": length}))


def load_text_encoder(path: str, field: str) -> tuple[Any, Any]:
    """(CLIPTextModel, CLIPTokenizer) of a transformers or pipeline folder. Raises RecipeError naming `field`."""
    from transformers import CLIPTextModel

    folder = Path(path)
    if (folder / "product").is_dir():
        folder = folder / "product"
    parts = [folder / name if (folder / name).is_dir() else folder for name in ("text_encoder", "tokenizer")]
    if not (parts[0] / "config.json").is_file():
        raise RecipeError(field, f"no text encoder at {folder}", "name a folder that CLIPTextModel reads")
    try:
        encoder = CLIPTextModel.from_pretrained(parts[0])
        return encoder, load_tokenizer(parts[1], encoder.config.max_position_embeddings)
    except (OSError, ValueError) as error:
        raise RecipeError(field, f"{folder} holds no CLIP text encoder ({error})", "name another folder") from None
