"""The DAMSM loss: how well words and regions, and sentences and images, of a batch fit (Xu et al. 2018, section 3.2)

    s_ij  = e_i · v_j, softmax over words i                         eq. 7 and 8
    c_i   = Σ_j α_ij v_j,   α_ij = softmax over regions j of γ1 s_ij       eq. 9
    R(Q, D) = log (Σ_i exp(γ2 cos(c_i, e_i)))^(1/γ2)                eq. 10
    P(D_i | Q_i) = softmax over captions of γ3 R(Q_i, D_i)          eq. 11, and over images for P(Q_i | D_i), eq. 13
    loss  = − Σ log P(D | Q) − Σ log P(Q | D), for words, and with R = cos(image, sentence) for sentences

Shapes: regions [B, R, D], images [B, D], words [B, T, D], mask [B, T] (true where there is a word), sentences [B, D].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from capstan.training.distributed.step import Step
from capstan.training.family import Batch
from capstan.training.models.damsm.config import DamsmSettings

FEATURES = ("regions", "images", "words", "sentences")
_GRADIENT = "gradient of "
_SMALLEST = 1e-12  # of squares and lengths that are divided by: padded words have length 0


class Matching(NamedTuple):
    """Mean losses of a batch, and the share of images whose own caption fits best."""

    words: torch.Tensor
    sentences: torch.Tensor
    accuracy: torch.Tensor

    @property
    def total(self) -> torch.Tensor:
        return self.words + self.sentences


def word_scores(
    regions: torch.Tensor, words: torch.Tensor, mask: torch.Tensor, settings: DamsmSettings
) -> torch.Tensor:
    """Return R(Q, D) of every image with every caption, [images, captions].

    A context is a mean of regions, so its product with the word is a mean of s, and its length comes from the regions'
    products with each other. So no context is made: they would be the largest tensors, [images, captions, T, D].
    """
    scores = torch.einsum("brd,ctd->bctr", regions, words)
    chosen = scores.masked_fill(~mask[None, :, :, None], float("-inf")).softmax(2)
    weights = (settings.gamma_regions * chosen).softmax(3)
    products = (weights * scores).sum(3)
    between = regions @ regions.transpose(1, 2)
    squares = (torch.einsum("bctr,brq->bctq", weights, between) * weights).sum(3)
    lengths = squares.clamp(min=_SMALLEST).sqrt() * words.norm(dim=-1).clamp(min=_SMALLEST)
    cosines = products / lengths
    relevance = (settings.gamma_words * cosines).masked_fill(~mask[None], float("-inf"))
    return relevance.logsumexp(2) / settings.gamma_words


def sentence_scores(images: torch.Tensor, sentences: torch.Tensor) -> torch.Tensor:
    """Return the cosine of every image with every sentence, [images, sentences]."""
    return F.normalize(images, dim=-1) @ F.normalize(sentences, dim=-1).T


def matching(features: Mapping[str, torch.Tensor], mask: torch.Tensor, settings: DamsmSettings) -> Matching:
    """Return the losses of a batch of pairs; `features` has the names of `FEATURES`."""
    of_words = settings.gamma * word_scores(features["regions"], features["words"], mask, settings)
    of_sentences = settings.gamma * sentence_scores(features["images"], features["sentences"])
    own = torch.arange(len(mask), device=mask.device)
    words, sentences = (F.cross_entropy(s, own) + F.cross_entropy(s.T, own) for s in (of_words, of_sentences))
    accuracy = (of_sentences.argmax(1) == own).float().mean()
    return Matching(words, sentences, accuracy)


def share_gradients(
    parts: Sequence[Batch],
    step: Step,
    encode: Callable[[Batch], Mapping[str, torch.Tensor]],
    settings: DamsmSettings,
    weight: float = 1.0,
) -> None:
    """Add to each part the gradient of the whole step's loss by the part's own features; call it on every worker.

    The loss compares all pairs of a step, and a part knows only its own (Gao et al. 2021, GradCache). `encode` returns
    a part's features and its mask, "mask". With one part on one worker there is nothing to share.
    """
    if step.shares == 1:
        return
    with torch.no_grad():
        encoded = [encode(part) for part in parts]
    mine = {name: torch.cat([features[name] for features in encoded]) for name in encoded[0]}
    whole = {name: step.gather(tensor) for name, tensor in mine.items()}
    mask = whole.pop("mask")
    count = len(mine["mask"])
    with torch.enable_grad(), torch.autocast(mask.device.type, enabled=False):
        leaves = {name: tensor.float().requires_grad_() for name, tensor in whole.items()}
        found = matching(leaves, mask, settings)
        gradients = torch.autograd.grad(weight * found.total, list(leaves.values()))
    for name, gradient in zip(leaves, gradients, strict=True):
        rows = gradient[step.rank * count : (step.rank + 1) * count].chunk(len(parts))
        for part, row in zip(parts, rows, strict=True):
            part[_GRADIENT + name] = row * step.shares
    for part in parts:
        size = len(part[_GRADIENT + "words"])
        part["matched"] = torch.stack([value.detach() for value in found]).expand(size, 3)


def matched(
    features: Mapping[str, torch.Tensor], mask: torch.Tensor, batch: Batch, settings: DamsmSettings, weight: float = 1.0
) -> tuple[torch.Tensor, Matching]:
    """Return `weight` times the loss, with its gradient, and the losses: of the step if its gradient is shared."""
    if "matched" not in batch:
        with torch.autocast(mask.device.type, enabled=False):
            found = matching({name: tensor.float() for name, tensor in features.items()}, mask, settings)
        return weight * found.total, Matching(*(value.detach() for value in found))
    product = sum((features[name].float() * batch[_GRADIENT + name]).sum() for name in features)
    assert isinstance(product, torch.Tensor)
    found = Matching(*batch["matched"][0])
    return weight * found.total + product - product.detach(), found
