"""CLIP's contrastive loss over the whole step: all pairs of all parts and workers

    features of each part, without gradient ──▶ gathered ──▶ the loss and its gradient by each feature (`contrast`)
    features of each part again, with gradient ──▶ their product with that gradient (`surrogate`) ──▶ weights

Gao et al. 2021 (arXiv:2101.06983, GradCache) process a large batch in parts in this way: the gradient of the whole loss
by the weights is the sum over parts of (gradient by the part's features) · (features by weights). Each worker compares
only its own pairs with all others, as open_clip does with `local_loss`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from capstan.training.distributed.step import Step
from capstan.training.models.captioner.model import contrastive_loss


class Contrast(NamedTuple):
    """The loss of the whole step, and its gradient by this worker's features [N, W] and by the scale [1]."""

    loss: torch.Tensor  # scalar
    image: torch.Tensor
    text: torch.Tensor
    scale: torch.Tensor


def contrast(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, step: Step) -> Contrast:
    """Return CLIP's symmetric cross-entropy over all workers' pairs, with its gradients.

    `image` and `text` are this worker's normalised features of all its parts, fp32 [N, W]. Call it on every worker.
    """
    count = len(image)
    mine = slice(step.rank * count, (step.rank + 1) * count)
    with torch.enable_grad(), torch.autocast(image.device.type, enabled=False):
        images, texts = step.gather(image).float().requires_grad_(), step.gather(text).float().requires_grad_()
        factor = scale.detach().float().requires_grad_()
        share = count / len(images)
        loss = share * contrastive_loss(images[mine], texts[mine], factor, (images, texts), mine.start)
        gradients = torch.autograd.grad(loss, (images, texts, factor))
    of_images, of_texts, of_scale = (step.total(gradient) for gradient in gradients)
    return Contrast(step.total(loss.detach()), of_images[mine], of_texts[mine], of_scale)


def surrogate(
    found: Contrast, image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, step: Step
) -> torch.Tensor:
    """Return a scalar with the value of the whole loss, and a part's contribution to its gradient.

    `found` holds the gradients of the part's rows. The engine averages over parts and workers: features, which occur in
    one part only, are multiplied by their number; the scale, which occurs in all, is not.
    """
    features = (image * found.image).sum() + (text * found.text).sum()
    product = step.shares * features + (scale * found.scale).sum()
    return found.loss + product - product.detach()
