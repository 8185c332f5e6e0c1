"""AttnGAN's discriminators: is an image real, and is it the image of this sentence? One for each size

    loss = ½ unconditional + ½ conditional (Xu et al. 2018, eq. 4 and 5), + γ/2 ‖∇ at real images‖² (Mescheder et al.
    2018, eq. 9, R1)

A real image with another sample's sentence counts as wrong, too (Reed et al. 2016, algorithm 1).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from capstan.training.distributed.adversary import Adversary
from capstan.training.family import Metrics
from capstan.training.models.attngan.config import JudgeSettings
from capstan.training.models.autoencoder.discriminator import discriminator_loss

_SIDE = 4  # pixels of the features that are judged


class Judged(NamedTuple):
    """Logits [B] of images: above 0 if they look real, and real with the sentence."""

    alone: torch.Tensor
    with_sentence: torch.Tensor


class Discriminator(nn.Module):
    """Images [B, 3, side, side] and sentences [B, D] → logits. GroupNorm, so that no image depends on its batch."""

    def __init__(self, side: int, channels: int, sentence: int) -> None:
        super().__init__()
        levels = max(1, (side // _SIDE).bit_length() - 1)
        wide = [channels * min(2**level, 8) for level in range(levels)]
        layers: list[nn.Module] = [nn.Conv2d(3, wide[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for before, after in itertools.pairwise(wide):
            layers += [*_normalised(nn.Conv2d(before, after, 4, stride=2, padding=1, bias=False))]
        self.features = nn.Sequential(*layers, *_normalised(nn.Conv2d(wide[-1], wide[-1], 3, padding=1, bias=False)))
        self.joint = nn.Sequential(*_normalised(nn.Conv2d(wide[-1] + sentence, wide[-1], 3, padding=1, bias=False)))
        last = side >> levels
        self.alone, self.with_sentence = (nn.Conv2d(wide[-1], 1, last) for _ in range(2))

    def forward(self, images: torch.Tensor, sentences: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return the logits [B] of images alone, and with each of `sentences` (each [B, D])."""
        h = self.features(images)
        logits = [self.alone(h)]
        for sentence in sentences:
            spread = sentence[:, :, None, None].expand(-1, -1, *h.shape[2:])
            logits.append(self.with_sentence(self.joint(torch.cat([h, spread], 1))))
        return tuple(value.flatten(1).mean(1) for value in logits)


def _normalised(conv: nn.Conv2d) -> tuple[nn.Module, ...]:
    groups = next(count for count in (8, 4, 2, 1) if conv.out_channels % count == 0)
    return conv, nn.GroupNorm(groups, conv.out_channels), nn.LeakyReLU(0.2)


class Shown(NamedTuple):
    """What the discriminators learn from: images from small to large, their sentences, and those of other samples."""

    made: list[torch.Tensor]
    real: list[torch.Tensor]
    sentences: torch.Tensor
    others: torch.Tensor


class JudgeAdversary(Adversary):
    """The discriminators as the generators' adversary."""

    def __init__(self, settings: JudgeSettings, sides: Sequence[int], sentence: int) -> None:
        model = nn.ModuleList(Discriminator(side, settings.channels, sentence) for side in sides)
        super().__init__(model, lr=settings.lr, betas=settings.betas)
        self.settings, self.number = settings, 0
        self.shown: Shown | None = None

    def set_step(self, step: int, lr: float) -> None:
        super().set_step(step, lr)
        self.number = step

    def adversarial_loss(self, shown: Shown) -> tuple[torch.Tensor, Metrics]:
        """Return the generators' adversarial loss, the sum over sizes, and metrics; keep what was shown for `loss`."""
        self.shown = shown._replace(made=[image.detach() for image in shown.made])
        self.model.requires_grad_(False)  # the gradient goes through them, not into them
        terms = []
        for judge, made in zip(self._judges(), shown.made, strict=True):
            for logits in judge(made.float(), [shown.sentences]):
                terms.append((-logits if self.settings.loss == "hinge" else F.softplus(-logits)).mean() / 2)
        self.model.requires_grad_(True)
        total = torch.stack(terms).sum()
        return total, {"adversarial": total.detach()}

    def loss(self) -> tuple[torch.Tensor, Metrics]:
        assert self.shown is not None, "loss() needs images from adversarial_loss()"
        shown, self.shown = self.shown, None
        punish = self.settings.penalty > 0 and self.number % self.settings.penalty_every == 0
        losses, told_apart, penalties = [], [], []
        for judge, made, real in zip(self._judges(), shown.made, shown.real, strict=True):
            real = real.float().requires_grad_(punish)
            of_real, with_own, with_other = judge(real, [shown.sentences, shown.others])
            of_made, made_with = judge(made.float(), [shown.sentences])
            alone = discriminator_loss(of_real, of_made, self.settings.loss)
            together = discriminator_loss(with_own, torch.cat([made_with, with_other]), self.settings.loss)
            losses.append(alone + together)
            told_apart.append(((of_real > 0).float().mean() + (of_made < 0).float().mean()) / 2)
            if punish:
                penalties.append(squared_gradient(of_real + with_own, real))
        total = torch.stack(losses).sum()
        metrics: dict[str, torch.Tensor] = {
            "discriminator": total.detach(),
            "told_apart": torch.stack(told_apart).mean(),
        }
        if penalties:
            penalty = torch.stack(penalties).sum()
            metrics["penalty"] = penalty.detach()
            total = total + self.settings.penalty / 2 * self.settings.penalty_every * penalty
        return total, metrics

    def _judges(self) -> list[Discriminator]:
        return [judge for judge in self.model.children() if isinstance(judge, Discriminator)]


def squared_gradient(logits: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Return the mean over samples of ‖∇ logits at images‖², with a gradient of its own."""
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean()
