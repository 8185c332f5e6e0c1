"""Networks by name: diffusers class and configuration (`train.diffusion.preset`).

Keys that follow from autoencoder, text encoders and size are not part of a preset.

unet-*   Stable Diffusion 1's shape (Rombach et al. 2022)          sd15 is the original's
sdxl-*   Stable Diffusion XL's (Podell et al. 2023, table 1)       sdxl is the original's
dit-*    DiT's sizes (Peebles & Xie 2023, table 1) in PixArt-Σ's form (Chen et al. 2024)
mmdit-*  depth d, width 64·d (Esser et al. 2024, §5.3); mmdit-l is SD 3's, mmdit-xl SD 3.5 large's
"""

from __future__ import annotations

from typing import Any, Final, Literal, get_args

Preset = Literal[
    "unet-tiny",
    "unet-small",
    "sd15",
    "sdxl-tiny",
    "sdxl-small",
    "sdxl",
    "dit-tiny",
    "dit-s",
    "dit-b",
    "dit-l",
    "dit-xl",
    "mmdit-tiny",
    "mmdit-s",
    "mmdit-b",
    "mmdit-l",
    "mmdit-xl",
]

UNET: Final = "UNet2DConditionModel"
DIT: Final = "PixArtTransformer2DModel"
MMDIT: Final = "SD3Transformer2DModel"


def configuration(name: Preset) -> dict[str, Any]:
    """Return the diffusers configuration of preset `name`, with `_class_name`."""
    return dict(_PRESETS[name])


def _unet(channels: tuple[int, ...], *, layers: int, heads: int) -> dict[str, Any]:
    lower = len(channels) - 1  # the lowest level has no cross-attention
    return {
        "_class_name": UNET,
        "block_out_channels": channels,
        "layers_per_block": layers,
        "down_block_types": ("CrossAttnDownBlock2D",) * lower + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * lower,
        "attention_head_dim": heads,  # diffusers takes this for the number of heads (diffusers#2011)
    }


def _sdxl(channels: tuple[int, ...], *, layers: int, depths: tuple[int, ...], head: int) -> dict[str, Any]:
    """Return an SDXL shape. `depths`: transformer blocks per level (none in the first); `head`: channels per head."""
    attends = ("CrossAttnDownBlock2D",) * (len(channels) - 1)
    return {
        "_class_name": UNET,
        "block_out_channels": channels,
        "layers_per_block": layers,
        "down_block_types": ("DownBlock2D", *attends),
        "up_block_types": (*(name.replace("Down", "Up") for name in attends), "UpBlock2D"),
        "transformer_layers_per_block": depths,
        "attention_head_dim": tuple(width // head for width in channels),  # the number of heads, as above
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
    }


def _dit(depth: int, width: int, heads: int) -> dict[str, Any]:
    return {
        "_class_name": DIT,
        "num_layers": depth,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "patch_size": 2,
    }


def _mmdit(depth: int) -> dict[str, Any]:
    return {
        "_class_name": MMDIT,
        "num_layers": depth,
        "num_attention_heads": depth,
        "attention_head_dim": 64,
        "patch_size": 2,
        "qk_norm": "rms_norm",  # keeps attention logits bounded in bf16 (Esser et al. 2024, §5.3.2)
    }


_PRESETS: Final[dict[str, dict[str, Any]]] = {
    "unet-tiny": _unet((64, 128, 256), layers=1, heads=4),
    "unet-small": _unet((128, 256, 512, 512), layers=2, heads=8),
    "sd15": _unet((320, 640, 1280, 1280), layers=2, heads=8),
    "sdxl-tiny": _sdxl((64, 128, 256), layers=1, depths=(1, 1, 2), head=32),
    "sdxl-small": _sdxl((160, 320, 640), layers=2, depths=(1, 1, 4), head=32),
    "sdxl": _sdxl((320, 640, 1280), layers=2, depths=(1, 2, 10), head=64),
    "dit-tiny": _dit(6, 192, 3),
    "dit-s": _dit(12, 384, 6),
    "dit-b": _dit(12, 768, 12),
    "dit-l": _dit(24, 1024, 16),
    "dit-xl": _dit(28, 1152, 16),
    "mmdit-tiny": _mmdit(4),
    "mmdit-s": _mmdit(12),
    "mmdit-b": _mmdit(18),
    "mmdit-l": _mmdit(24),
    "mmdit-xl": _mmdit(38),
}
assert set(_PRESETS) == set(get_args(Preset))
