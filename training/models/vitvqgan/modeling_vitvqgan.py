"""ViT-VQGAN in one file: images → codes → images by transformers; `capstan export` writes it next to the weights

    model = AutoModel.from_pretrained(DIR, trust_remote_code=True)
    indices = model.tokens(images)              # images [B, 3, H, W] in −1 … 1 → [B, h, w]
    images = model.images(indices)

It needs torch, timm and transformers, not Capstan. Yu et al. 2022, “Vector-quantized image modeling with improved
VQGAN”, section 3: patches instead of convolutions, latents projected to few channels (factorised codes), and latents
and codes of length 1, so that the nearest code is the one with the largest cosine.

Shapes: images [B, 3, H, W]; latents and codes [B, D, h, w], h = H / patch; codebook [N, D].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class ViTVQConfig(PretrainedConfig):
    """Shape of a ViT-VQGAN. `encoder` and `decoder` are {width, layers, heads, mlp}."""

    model_type = "vitvq"

    def __init__(
        self,
        image_size: int = 256,
        patch_size: int = 8,
        encoder: dict[str, Any] | None = None,
        decoder: dict[str, Any] | None = None,
        num_vq_embeddings: int = 8192,
        latent_channels: int = 32,
        **more: Any,
    ) -> None:
        super().__init__(**more)
        tower = {"width": 768, "layers": 12, "heads": 12, "mlp": 4.0}
        self.image_size, self.patch_size = image_size, patch_size
        self.encoder, self.decoder = tower | (encoder or {}), tower | (decoder or {})
        self.num_vq_embeddings, self.latent_channels = num_vq_embeddings, latent_channels


class Encoded(NamedTuple):
    latents: torch.Tensor


class Decoded(NamedTuple):
    sample: torch.Tensor


class Tower(nn.Module):
    """Positions and transformer blocks: tokens [B, L, W] → [B, L, W]."""

    def __init__(self, tokens: int, width: int, layers: int, heads: int, mlp: float) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.empty(1, tokens, width))
        self.blocks = nn.Sequential(
            *(Block(width, heads, mlp_ratio=mlp, qkv_bias=True) for _ in range(layers)), nn.LayerNorm(width)
        )
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        done: torch.Tensor = self.blocks(tokens + self.positions)
        return done


class ViTVQModel(PreTrainedModel):
    """Encoder, codebook and decoder."""

    config_class = ViTVQConfig
    main_input_name = "images"

    def __init__(self, config: ViTVQConfig) -> None:
        super().__init__(config)
        patch, side = config.patch_size, config.image_size // config.patch_size
        narrow, wide = config.encoder["width"], config.decoder["width"]
        self.patches = nn.Conv2d(3, narrow, patch, stride=patch)
        self.encoder = Tower(side * side, **config.encoder)
        self.to_latents = nn.Linear(narrow, config.latent_channels)
        self.codes = nn.Embedding(config.num_vq_embeddings, config.latent_channels)
        self.from_codes = nn.Linear(config.latent_channels, wide)
        self.decoder = Tower(side * side, **config.decoder)
        # two layers with tanh between them
        self.to_pixels = nn.Sequential(nn.Linear(wide, wide), nn.Tanh(), nn.Linear(wide, 3 * patch * patch))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keep what __init__ set."""

    @property
    def codebook(self) -> torch.Tensor:
        """Return the codes [N, D], of length 1."""
        return F.normalize(self.codes.weight, dim=-1)

    def encode(self, images: torch.Tensor) -> Encoded:
        """Return the latents of images, of length 1, before they are replaced by codes."""
        tokens = self.patches(images)
        side = tokens.shape[-2:]
        latents = self.to_latents(self.encoder(tokens.flatten(2).transpose(1, 2)))
        return Encoded(F.normalize(latents, dim=-1).transpose(1, 2).unflatten(2, side))

    def nearest(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the index of each latent's nearest code: [B, D, h, w] → [B, h, w]."""
        return torch.einsum("bdhw,nd->bhwn", latents, self.codebook.to(latents.dtype)).argmax(-1)

    def decode_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the images of codes [B, D, h, w]."""
        tokens = self.decoder(self.from_codes(codes.flatten(2).transpose(1, 2)))
        pixels = self.to_pixels(tokens).transpose(1, 2).unflatten(2, codes.shape[-2:])
        return F.pixel_shuffle(pixels, self.config.patch_size)

    def decode(self, latents: torch.Tensor) -> Decoded:
        """Replace latents by their nearest codes, and decode them."""
        return Decoded(self.images(self.nearest(latents)))

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """Return the codes' indices of images: [B, 3, H, W] → [B, h, w]."""
        return self.nearest(self.encode(images).latents)

    def images(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the images of codes' indices: [B, h, w] → [B, 3, H, W] in −1 … 1."""
        return self.decode_codes(F.embedding(indices, self.codebook).movedim(-1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the reconstructed images."""
        return self.images(self.tokens(images))
