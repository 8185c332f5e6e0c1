"""diffusers' VQModel as one trainable module, and its codebook losses.

Shapes: images [B, 3, H, W] in −1 … 1; latents and codes [B, D, h, w], h = H/f with f = 2^(levels − 1); indices
[B, h, w]; codebook [N, D].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Quantised(NamedTuple):
    """A batch's reconstructed images, its latents, and the codes that replaced them."""

    images: torch.Tensor
    latents: torch.Tensor
    codes: torch.Tensor  # their gradient reaches the codebook, not the encoder
    indices: torch.Tensor
    abandoned: torch.Tensor  # scalar: distance of unused codes from the latents, see `revival_loss`


class Vqgan(nn.Module):
    """VQModel whose forward returns everything that the loss needs.

    VQModel's own quantiser is not used: it applies β to the codebook term instead of the commitment term (a bug kept
    from taming-transformers for compatibility with old models).
    """

    def __init__(self, vq: Any) -> None:
        super().__init__()
        self.vq = vq

    @property
    def table(self) -> nn.Parameter:
        """Return the trained codes."""
        return self.vq.quantize.embedding.weight

    @property
    def codebook(self) -> torch.Tensor:
        """Return the codes that latents are compared with."""
        return self.table

    def forward(self, images: torch.Tensor) -> Quantised:
        """Encode, replace each latent by its nearest code, decode; the gradient passes straight through the choice."""
        latents = self.vq.encode(images).latents
        codebook = self.codebook
        indices, closest = choices(latents, codebook)
        codes = F.embedding(indices, codebook).movedim(-1, 1)
        made = self.decode(latents + (codes - latents).detach())
        abandoned = revival_loss(latents, codebook, indices, closest)
        return Quantised(made, latents, codes, indices, abandoned)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the images [B, 3, H, W] of codes [B, D, h, w]."""
        spatial = codes if self.vq.config.norm_type == "spatial" else None
        images: torch.Tensor = self.vq.decoder(self.vq.post_quant_conv(codes), spatial)
        return images

    @property
    def last(self) -> torch.Tensor:
        """Return the weight of the decoder's last layer."""
        return self.vq.decoder.conv_out.weight


def choices(latents: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each latent's nearest code, [B, D, h, w] → [B, h, w], and each code's nearest latent, [N].

    Codes are those that VQModel itself chooses. Latents are given by their flat index in [B, h, w].
    """
    with torch.no_grad(), torch.autocast(latents.device.type, enabled=False):
        flat = latents.movedim(1, -1).float()
        distances = torch.cdist(flat.reshape(-1, flat.shape[-1]), codebook.float())
        return distances.argmin(1).view(flat.shape[:-1]), distances.argmin(0)


def nearest(latents: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Return the index of the nearest code for each latent: [B, D, h, w] → [B, h, w]."""
    return choices(latents, codebook)[0]


def codebook_loss(latents: torch.Tensor, codes: torch.Tensor, commitment: float) -> torch.Tensor:
    """Return the mean loss that pulls codes to their latents and, weighted by β = `commitment`, latents to their codes.

    van den Oord et al. 2017, “Neural discrete representation learning”, eq. 3, the second and third term.
    """
    latents, codes = latents.float(), codes.float()
    return (codes - latents.detach()).square().mean() + commitment * (latents - codes.detach()).square().mean()


def revival_loss(
    latents: torch.Tensor, codebook: torch.Tensor, indices: torch.Tensor, closest: torch.Tensor
) -> torch.Tensor:
    """Return the mean loss that pulls codes unused in the batch to their nearest latent.

    Without it a code that falls far behind the latents is never chosen again. Zheng & Vedaldi 2023, “Online clustered
    codebook”, move such codes to their nearest latents; a loss has no state and is the same on any number of workers.
    """
    anchors = latents.detach().movedim(1, -1).reshape(-1, codebook.shape[1])[closest].float()
    unused = torch.bincount(indices.flatten(), minlength=len(codebook)) == 0
    return ((codebook.float() - anchors).square() * unused[:, None]).mean()


def usage(indices: torch.Tensor, codes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the use of a codebook of `codes` codes: (perplexity, 1 … codes; share of codes that occur, 0 … 1).

    Perplexity is exp of the entropy in nats: the number of equally frequent codes with the same entropy.
    """
    counts = torch.bincount(indices.flatten(), minlength=codes).float()
    share = counts / counts.sum()
    return torch.exp(torch.special.entr(share).sum()), (counts > 0).float().mean()
