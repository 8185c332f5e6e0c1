"""Content and style image → an image with the content of one and the style of the other (Gatys et al. 2016).

    content(x)  = ‖F(x) − F(c)‖² / ‖F(c)‖²                               features F of one layer
    style(x)    = mean over layers of ‖G(x) − G(s)‖² / ‖G(s)‖²           Gram matrices G = F Fᵀ / positions
    x           = argmin  content_weight · content(x) + style_weight · style(x), by L-BFGS from the start image

Both distances are relative, so that one weight serves any network; the paper divides by sizes alone. Pixels are free
while they are optimised, but for a penalty outside −1 … 1, where no file can store them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import torch
from torch import nn

from capstan.training.style.features import Features

_HISTORY: Final = 20  # gradients that L-BFGS keeps
_EVALUATIONS: Final = 3  # of the losses per step at most, by the line search on average
_RANGE: Final = 10.0  # weight of the mean squared excess over −1 … 1

Network = Callable[[torch.Tensor], Features]


class Weights(NamedTuple):
    """What pulls at the pixels."""

    content: float
    style: float


class Stage(NamedTuple):
    """The image [3, H, W] in −1 … 1 after a number of steps, and its distances as a file would show it."""

    steps: int
    image: torch.Tensor
    content: float
    style: float


def transfer(
    network: nn.Module,
    content: torch.Tensor,
    style: torch.Tensor,
    start: torch.Tensor,
    weights: Weights,
    steps: Sequence[int],
) -> list[Stage]:
    """Optimise `start` [1, 3, H, W] and return a stage for each of the ascending numbers of `steps`."""
    network.eval().requires_grad_(False)
    with torch.no_grad():
        goal = Goal(network, content, style)
    # L-BFGS flattens by `view`, which strided (channels-last) gradients refuse.
    image = start.clone(memory_format=torch.contiguous_format).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [image],
        history_size=_HISTORY,
        tolerance_grad=0,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )
    group = optimizer.param_groups[0]

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        far = goal.distances(image)
        excess = (image - image.clamp(-1, 1)).square().mean()
        loss = weights.content * far[0] + weights.style * far[1] + _RANGE * excess
        loss.backward()
        return loss

    stages, done = [], 0
    for count in steps:
        group["max_iter"], group["max_eval"] = count - done, _EVALUATIONS * (count - done)
        if count > done:
            optimizer.step(closure)
        done = count
        stages.append(goal.stage(count, image))
    return stages


class Goal:
    """The content of one image and the style of another, and how far an image is from both."""

    def __init__(self, network: Network, content: torch.Tensor, style: torch.Tensor) -> None:
        self.network = network
        self.content = network(content).content
        self.grams = [gram(features) for features in network(style).style]

    def distances(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the distances from content and style; 0 is equal."""
        seen = self.network(image)
        style = [relative(gram(found), wanted) for found, wanted in zip(seen.style, self.grams, strict=True)]
        return relative(seen.content, self.content), torch.stack(style).mean()

    def stage(self, steps: int, image: torch.Tensor) -> Stage:
        """Return the image as it would be stored, rounded to 8 bits, and its distances."""
        with torch.no_grad():
            stored = ((image.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
            content, style = self.distances(stored)
        return Stage(steps, stored[0].clone(), float(content), float(style))


def gram(features: torch.Tensor) -> torch.Tensor:
    """Return the Gram matrix [C, C] of features [1, C, h, w], divided by the number of positions."""
    flat = features[0].flatten(1)
    return flat @ flat.T / flat.shape[1]


def relative(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return ‖found − wanted‖² / ‖wanted‖²."""
    return (found - wanted).square().sum() / wanted.square().sum().clamp(min=1e-12)
