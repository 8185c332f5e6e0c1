"""Patch discriminator for training a first stage to sharp images.

Isola et al. 2017 (pix2pix, §3.2.2: patch discriminator), Esser et al. 2021 (taming-transformers, eq. 6–7: the weight
that balances its gradient with the reconstruction's), Lim & Ye 2017 (hinge loss).
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import nn

from capstan.training.distributed.adversary import Adversary
from capstan.training.family import Metrics
from capstan.training.models.autoencoder.config import DiscriminatorSettings

_LARGEST: Final = 1e4  # upper bound of the adaptive weight


class PatchDiscriminator(nn.Sequential):
    """Images [B, 3, H, W] → logits [B, 1, h, w], one per patch, above 0 if the patch looks real."""

    def __init__(self, channels: int, layers: int) -> None:
        wide = [channels * min(2**level, 8) for level in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(3, wide[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level in range(1, layers + 1):
            stride = 2 if level < layers else 1
            conv = nn.Conv2d(wide[level - 1], wide[level], 4, stride=stride, padding=1, bias=False)
            parts += [conv, nn.BatchNorm2d(wide[level]), nn.LeakyReLU(0.2)]
        super().__init__(*parts, nn.Conv2d(wide[-1], 1, 4, stride=1, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)


def discriminator_loss(of_real: torch.Tensor, of_made: torch.Tensor, kind: str) -> torch.Tensor:
    """Return half the sum of the mean losses on real and on generated images, given their logits."""
    if kind == "hinge":
        return 0.5 * (F.relu(1 - of_real).mean() + F.relu(1 + of_made).mean())
    return 0.5 * (F.softplus(-of_real).mean() + F.softplus(of_made).mean())


def adaptive_weight(reconstruction: torch.Tensor, adversarial: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Return λ = ‖∇ reconstruction‖ / (‖∇ adversarial‖ + 10⁻⁴) at the decoder's `last` layer (taming, eq. 7)."""
    (ours,) = torch.autograd.grad(reconstruction, last, retain_graph=True)
    (theirs,) = torch.autograd.grad(adversarial, last, retain_graph=True)
    return (ours.norm() / (theirs.norm() + 1e-4)).clamp(0.0, _LARGEST).detach()


class PatchAdversary(Adversary):
    """The discriminator as the autoencoder's adversary."""

    def __init__(self, settings: DiscriminatorSettings) -> None:
        model = PatchDiscriminator(settings.channels, settings.layers)
        super().__init__(model, start=settings.start, lr=settings.lr, betas=settings.betas)
        self.settings = settings
        self.shown: tuple[torch.Tensor, torch.Tensor] | None = None  # generated and real images, for its own step

    def adversarial_loss(
        self, made: torch.Tensor, real: torch.Tensor, reconstruction: torch.Tensor, last: torch.Tensor
    ) -> tuple[torch.Tensor, Metrics]:
        """Return the weighted adversarial loss of `made` against `real` images [B, 3, H, W], and metrics.

        `reconstruction` is the rest of the loss that depends on them, `last` the weight of the decoder's last layer.
        """
        if not self.active:
            return reconstruction.new_zeros(()), {}
        made, real = made.float(), real.float()
        self.model.requires_grad_(False)  # the gradient goes through it, not into it
        adversarial = -self.model(made).mean()
        self.model.requires_grad_(True)
        weight = torch.full_like(reconstruction, self.settings.weight)
        if self.settings.adaptive:
            weight = weight * self.mean(adaptive_weight(reconstruction, adversarial, last))
        self.shown = made.detach(), real
        return weight * adversarial, {"adversarial": adversarial.detach(), "adversarial_weight": weight}

    def loss(self) -> tuple[torch.Tensor, Metrics]:
        assert self.shown is not None, "loss() needs images from adversarial_loss()"
        (made, real), self.shown = self.shown, None
        of_real, of_made = self.model(real), self.model(made)
        loss = discriminator_loss(of_real, of_made, self.settings.loss)
        accuracy = ((of_real > 0).float().mean() + (of_made < 0).float().mean()) / 2
        return loss, {"discriminator": loss.detach(), "told_apart": accuracy}
