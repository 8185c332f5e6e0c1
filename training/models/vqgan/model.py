"""Images → the nearest codes → images: diffusers' VQModel as one trainable module, and its codebook's loss.

Shapes: images [B, 3, H, W] in −1 … 1; latents and codes [B, D, h, w], h = H/f with f = 2^(levels − 1); indices
[B, h, w]; codebook [N, D].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from diffusers import VQModel


class Quantised(NamedTuple):
    """What the model makes of a batch: images, latents, and the codes that stood in for these."""

    images: torch.Tensor
    latents: torch.Tensor
    codes: torch.Tensor  # their gradient reaches the codebook, and not the encoder
    indices: torch.Tensor
    abandoned: torch.Tensor  # scalar: how far codes that no latent chose are from the latents; see `revival_loss`


class Vqgan(nn.Module):
    """VQModel with a forward that gives all that the loss needs.

    Its own quantiser is not called: it weighs the codebook's term, and not the commitment's, with β (a bug that it
    keeps from taming-transformers for old models' sake).
    """

    def __init__(self, vq: VQModel) -> None:
        super().__init__()
        self.vq = vq

    @property
    def codebook(self) -> nn.Parameter:
        return self.vq.quantize.embedding.weight

    def forward(self, images: torch.Tensor) -> Quantised:
        """Encode, take the nearest code for each latent, decode; the gradient passes straight through the choice."""
        latents = self.vq.encode(images).latents
        indices, closest = choices(latents, self.codebook)
        codes = F.embedding(indices, self.codebook).movedim(-1, 1)
        passed = latents + (codes - latents).detach()
        spatial = passed if self.vq.config.norm_type == "spatial" else None
        made = self.vq.decoder(self.vq.post_quant_conv(passed), spatial)
        abandoned = revival_loss(latents, self.codebook, indices, closest)
        return Quantised(made, latents, codes, indices, abandoned)


def choices(latents: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest code for each latent, [B, D, h, w] → [B, h, w], and for each code the nearest latent's place, [N].

    The code is the one that VQModel itself chooses; places count latents as they lie in [B, h, w].
    """
    with torch.no_grad(), torch.autocast(latents.device.type, enabled=False):
        flat = latents.movedim(1, -1).float()
        distances = torch.cdist(flat.reshape(-1, flat.shape[-1]), codebook.float())
        return distances.argmin(1).view(flat.shape[:-1]), distances.argmin(0)


def nearest(latents: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """The index of the nearest code for each latent: [B, D, h, w] → [B, h, w]."""
    return choices(latents, codebook)[0]


def codebook_loss(latents: torch.Tensor, codes: torch.Tensor, commitment: float) -> torch.Tensor:
    """Codes drawn to their latents, and, weighted by β = `commitment`, latents to their codes: a mean over values.

    van den Oord et al. 2017, “Neural discrete representation learning”, eq. 3, the second and third term.
    """
    latents, codes = latents.float(), codes.float()
    return (codes - latents.detach()).square().mean() + commitment * (latents - codes.detach()).square().mean()


def revival_loss(
    latents: torch.Tensor, codebook: torch.Tensor, indices: torch.Tensor, closest: torch.Tensor
) -> torch.Tensor:
    """Codes that no latent of the batch chose, drawn to the latent nearest to them: a mean over the codebook's values.

    Without it a code that is left behind by the latents is never chosen again, and nothing moves it. Zheng & Vedaldi
    2023, “Online clustered codebook”, put such codes on their nearest latents; as a loss it is the same on any number
    of workers, and has no state.
    """
    anchors = latents.detach().movedim(1, -1).reshape(-1, codebook.shape[1])[closest].float()
    left = torch.bincount(indices.flatten(), minlength=len(codebook)) == 0
    return ((codebook.float() - anchors).square() * left[:, None]).mean()


def usage(indices: torch.Tensor, codes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How much of a codebook of so many codes is used: (perplexity, 1 … codes; share of codes that occur, 0 … 1).

    Perplexity is exp of the entropy in nats: so many codes, used equally often, would tell as much.
    """
    counts = torch.bincount(indices.flatten(), minlength=codes).float()
    share = counts / counts.sum()
    return torch.exp(torch.special.entr(share).sum()), (counts > 0).float().mean()
