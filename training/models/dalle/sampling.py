"""Prompts → image tokens, one after another, with a key-value cache"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from capstan.training.models.dalle.model import Dalle


@dataclass(frozen=True)
class Choice:
    """How a token is drawn from its logits."""

    guidance: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None


def draw_tokens(
    model: Dalle,
    prompts: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    count: int,
    seeds: Sequence[int],
    how: Choice,
) -> torch.Tensor:
    """Return `count` tokens for each prompt: [B, count]. `prompts` are ids, mask and ids without text, each [B, L].

    Each row draws from its own generator, so that it does not depend on the others.
    """
    from transformers import DynamicCache

    ids, mask, empty = prompts
    guided = how.guidance > 1
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    embedded = model.embed_text(torch.cat([ids, empty]) if guided else ids)
    mask = torch.cat([mask, mask]) if guided else mask
    cache, drawn, warpers = DynamicCache(), [], _warpers(how)
    for _ in range(count):
        made = model.language_model(inputs_embeds=embedded, attention_mask=mask, past_key_values=cache, use_cache=True)
        logits = model.generation_head(made.last_hidden_state[:, -1]).float()
        if guided:
            with_text, without = logits.chunk(2)
            logits = without + how.guidance * (with_text - without)
        for warper in warpers:
            logits = warper(ids, logits)
        # On the CPU, whose generators draw the same on every machine.
        shares = logits.softmax(-1).cpu()
        token = torch.cat(
            [torch.multinomial(row, 1, generator=one) for row, one in zip(shares, generators, strict=True)]
        )
        drawn.append(token)
        following = token.to(ids.device)[:, None]
        embedded = model.embed_tokens(following.repeat(2, 1) if guided else following)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return torch.stack(drawn, dim=1)


def _warpers(how: Choice) -> list[Any]:
    """Return transformers' own, in its order, so that an export draws from the same distribution."""
    from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    made: list[Any] = []
    if how.temperature != 1:
        made.append(TemperatureLogitsWarper(how.temperature))
    if how.top_k is not None:
        made.append(TopKLogitsWarper(how.top_k))
    if how.top_p is not None and how.top_p < 1:
        made.append(TopPLogitsWarper(how.top_p))
    return made
