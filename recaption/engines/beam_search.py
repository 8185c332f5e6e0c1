"""Beam search over a cached decoder: each image's most probable caption

A caption's score is its log-probability, including the end token, divided by its number of tokens to the power of
`length_penalty` (Wu et al. 2016, arXiv:1609.08144, in the form that transformers uses). An image is done once `beams`
finished captions score at least as high as its best unfinished caption would if it ended now.

Shapes: P images, K beams per image, B = P · K rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import torch

from capstan.recaption.config import Decoding
from capstan.recaption.engines.coca_decoding import SHRINK, CachedCoca, Tokens, Written, padded

_OUT: Final = -1e9  # score of an unused beam; finite, so that differences are not NaN


@dataclass
class _Finished:
    """The best `beams` finished captions of one image."""

    beams: int
    penalty: float
    captions: list[tuple[float, Written]] = field(default_factory=list)  # by score, best first

    def add(self, score: float, tokens: list[int], *, ended: bool) -> None:
        scored = (score / max(1, len(tokens) + ended) ** self.penalty, (tokens, ended))
        self.captions = sorted([*self.captions, scored], key=lambda caption: -caption[0])[: self.beams]

    def is_done(self, best: float, length: int) -> bool:
        """Return whether an unfinished caption of score `best` and `length` tokens would rank after all of these."""
        return len(self.captions) == self.beams and self.captions[-1][0] >= best / length**self.penalty


def search(
    cache: CachedCoca, images: Sequence[int], prompt: Sequence[int], limit: int, tokens: Tokens, how: Decoding
) -> list[Written]:
    """Return, for each of these images of `cache`, the tokens of its best caption: at most `limit` after `prompt`."""
    beams, batch = how.beams, len(images)
    total = cache.start(len(prompt) + 1 + limit, images, beams)
    device = cache.device
    finished = [_Finished(beams, how.length_penalty) for _ in images]
    done = [number >= batch for number in range(total)]
    held = list(range(total))  # the images still in the cache
    scores = torch.full((total, beams), _OUT, device=device)
    scores[:, 0] = 0.0  # all beams start equal, so only one of them counts
    written = torch.empty((total * beams, 0), dtype=torch.long, device=device)
    new = torch.tensor([tokens.start, *prompt], device=device).expand(total * beams, -1)
    for length in range(1, limit + 1):
        logits = cache.step(new).float()
        logits[:, tokens.pad] = -torch.inf
        best, parents, chosen = _candidates(scores, logits.log_softmax(-1), beams)
        texts = written.tolist()
        places, values = [], []
        for place, image in enumerate(held):
            own = finished[image] if not done[image] else None
            running: list[tuple[float, int, int]] = []
            for rank, (score, parent, token) in enumerate(zip(best[place], parents[place], chosen[place], strict=True)):
                row = place * beams + parent
                if token != tokens.end:
                    running.append((score, row, token))
                elif own is not None and rank < beams and score > _OUT / 2:
                    own.add(score, texts[row], ended=True)
            running = running[:beams]
            if own is not None and (own.is_done(running[0][0], length) or length == limit):
                if length == limit:
                    for score, row, token in running:
                        own.add(score, [*texts[row], token], ended=False)
                done[image] = True
            places.append([row for _, row, _ in running])
            values.append([(score, token) for score, _, token in running])
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
    """Return the 2K best continuations of each image's beams, best first: scores, parent beams, tokens.

    At most one continuation per beam is the end token, so among 2K at least K continue.
    """
    images, width = len(scores), 2 * beams
    values, tokens = log_shares.view(images, beams, -1).topk(min(width, log_shares.shape[-1]), dim=-1)
    each = values.shape[-1]
    flat = (scores[:, :, None] + values).view(images, -1)
    best, order = flat.sort(dim=-1, descending=True, stable=True)
    best, order = best[:, :width], order[:, :width]
    return best.tolist(), (order // each).tolist(), tokens.reshape(images, -1).gather(1, order).tolist()
