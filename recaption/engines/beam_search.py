"""Beam search over a cached decoder: for each image the caption that the model finds likeliest as a whole.

A caption's score is its log-probability, its end token's included, divided by its number of tokens to the power of
`length_penalty` (Wu et al. 2016, arXiv:1609.08144, in the form that transformers uses). An image is done when the
best caption that is still being written would, if it ended there, come after `beams` finished ones.

Shapes: P images, K beams an image, B = P · K rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import torch

from capstan.recaption.config import Decoding
from capstan.recaption.engines.coca_decoding import SHRINK, CachedCoca, Tokens, Written, padded

_OUT: Final = -1e9  # score of a beam that is none; finite, so that differences of two of them are numbers


@dataclass
class _Finished:
    """One image's finished captions, the best `beams` of them."""

    beams: int
    penalty: float
    captions: list[tuple[float, Written]] = field(default_factory=list)  # by score, the best first

    def add(self, score: float, tokens: list[int], *, ended: bool) -> None:
        scored = (score / max(1, len(tokens) + ended) ** self.penalty, (tokens, ended))
        self.captions = sorted([*self.captions, scored], key=lambda caption: -caption[0])[: self.beams]

    def is_done(self, best: float, length: int) -> bool:
        """Whether a running caption of score `best` and so many tokens would come after all these."""
        return len(self.captions) == self.beams and self.captions[-1][0] >= best / length**self.penalty


def search(
    cache: CachedCoca, images: Sequence[int], prompt: Sequence[int], limit: int, tokens: Tokens, how: Decoding
) -> list[Written]:
    """For each of these images of `cache`: the tokens after `prompt`, at most `limit`, of the best caption found."""
    beams, batch = how.beams, len(images)
    total = cache.start(len(prompt) + 1 + limit, images, beams)
    device = cache.device
    finished = [_Finished(beams, how.length_penalty) for _ in images]
    done = [number >= batch for number in range(total)]
    held = list(range(total))  # the images that the cache still holds
    scores = torch.full((total, beams), _OUT, device=device)
    scores[:, 0] = 0.0  # all beams start alike: only one of them counts
    written = torch.empty((total * beams, 0), dtype=torch.long, device=device)
    new = torch.tensor([tokens.start, *prompt], device=device).expand(total * beams, -1)
    for length in range(1, limit + 1):
        logits = cache.step(new).float()
        logits[:, tokens.pad] = -torch.inf
        best, parents, chosen = _candidates(scores, logits.log_softmax(-1), beams)
        texts = written.tolist()
        places, values = [], []
        for place, image in enumerate(held):
            mine = finished[image] if not done[image] else None
            going: list[tuple[float, int, int]] = []
            for rank, (score, parent, token) in enumerate(zip(best[place], parents[place], chosen[place], strict=True)):
                row = place * beams + parent
                if token != tokens.end:
                    going.append((score, row, token))
                elif mine is not None and rank < beams and score > _OUT / 2:
                    mine.add(score, texts[row], ended=True)
            going = going[:beams]
            if mine is not None and (mine.is_done(going[0][0], length) or length == limit):
                if length == limit:
                    for score, row, token in going:
                        mine.add(score, [*texts[row], token], ended=False)
                done[image] = True
            places.append([row for _, row, _ in going])
            values.append([(score, token) for score, _, token in going])
        left = sum(not done[image] for image in held)
        if not left:
            break
        order = list(range(len(held)))
        if cache.groups and padded(left) <= SHRINK * len(held):
            order = sorted(range(len(held)), key=lambda place: done[held[place]])[: padded(left)]
        rows = torch.tensor([row for place in order for row in places[place]], device=device)
        cache.keep(rows, torch.tensor(order, device=device) if len(order) < len(held) else None)
        new = torch.tensor([token for place in order for _, token in values[place]], device=device)[:, None]
        written = torch.cat([written[rows], new], 1)
        scores = torch.tensor([[score for score, _ in values[place]] for place in order], device=device)
        held = [held[place] for place in order]
    return [one.captions[0][1] for one in finished]


def _candidates(
    scores: torch.Tensor, log_shares: torch.Tensor, beams: int
) -> tuple[list[list[float]], list[list[int]], list[list[int]]]:
    """The 2K best continuations of each image's beams, the best first: scores, beams that they continue, tokens.

    Twice as many as beams: at most one a beam can be the end, so that as many as beams always go on.
    """
    images, width = len(scores), 2 * beams
    values, tokens = log_shares.view(images, beams, -1).topk(min(width, log_shares.shape[-1]), dim=-1)
    each = values.shape[-1]
    flat = (scores[:, :, None] + values).view(images, -1)
    best, order = flat.sort(dim=-1, descending=True, stable=True)
    best, order = best[:, :width], order[:, :width]
    return best.tolist(), (order // each).tolist(), tokens.reshape(images, -1).gather(1, order).tolist()
