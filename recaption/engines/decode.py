"""Image tokens of open_clip's CoCa → caption tokens, with a key-value cache.

open_clip 3.3 has no cache: it runs text tower and decoder over the whole caption for every new token. Here each layer
keeps its keys and values, the decoder's cross-attention those of the image (once for all slots), and a step costs one
token. The tokens are those of open_clip's own forward.

Shapes: B captions, T tokens so far, I image tokens, W width, H heads, D width of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from recaption.config import Decoding

# Captions that have ended leave the batch once so few are left: each step then costs what is still being written, and
# moving the cache costs little beside it.
SHRINK: Final = 0.75


@dataclass(frozen=True)
class Tokens:
    """What the decoder needs to know of a tokenizer."""

    start: int
    end: int
    pad: int  # masked in training, so the model has never learnt where it stands: never chosen


class Attention:
    """One `nn.MultiheadAttention` with the keys and values of what it has seen."""

    def __init__(self, module: nn.MultiheadAttention) -> None:
        self.module, self.heads = module, module.num_heads
        self.keys = self.values = torch.empty(0)  # [B, H, T or I, D]

    def project(self, x: torch.Tensor, first: int, last: int) -> tuple[torch.Tensor, ...]:
        """Queries (0), keys (1) and values (2) numbered first..last of x [B, T, W], each [B, H, T, D]."""
        width = x.shape[-1]
        rows = slice(first * width, (last + 1) * width)
        weight, bias = self.module.in_proj_weight[rows], self.module.in_proj_bias
        projected = F.linear(x, weight, None if bias is None else bias[rows])
        parts = projected.unflatten(-1, (last - first + 1, self.heads, -1))  # [B, T, parts, H, D]
        return parts.permute(2, 0, 3, 1, 4).unbind(0)

    def start(self, batch: int, length: int, like: torch.Tensor) -> None:
        """Room for `length` tokens of self-attention."""
        shape = (batch, self.heads, length, like.shape[-1] // self.heads)
        self.keys, self.values = like.new_empty(shape), like.new_empty(shape)

    def remember(self, x: torch.Tensor) -> None:
        """Keys and values of image tokens x [B, I, W], for cross-attention."""
        self.keys, self.values = self.project(x, 1, 2)

    def keep(self, rows: torch.Tensor) -> None:
        self.keys, self.values = self.keys[rows], self.values[rows]

    def to_itself(self, x: torch.Tensor, seen: int) -> torch.Tensor:
        """Causal self-attention of the new tokens x [B, T, W] that follow `seen` cached ones."""
        query, key, value = self.project(x, 0, 2)
        assert seen == 0 or x.shape[1] == 1
        stop = seen + x.shape[1]
        self.keys[:, :, seen:stop], self.values[:, :, seen:stop] = key, value
        # Only a prompt brings several tokens at once, and it comes first: then there is nothing but itself to mask.
        return self._attend(query, self.keys[:, :, :stop], self.values[:, :, :stop], causal=x.shape[1] > 1)

    def to_image(self, x: torch.Tensor) -> torch.Tensor:
        return self._attend(self.project(x, 0, 0)[0], self.keys, self.values, causal=False)

    def _attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, causal: bool) -> torch.Tensor:
        mixed = F.scaled_dot_product_attention(query, keys, values, is_causal=causal)
        return self.module.out_proj(mixed.transpose(1, 2).flatten(2))


class CachedCoca:
    """CoCa's text tower and decoder, one token at a time, for one batch of images."""

    def __init__(self, model: Any) -> None:
        self.text, self.decoder = model.text, model.text_decoder
        self.tower = [(block, Attention(block.attn)) for block in self.text.transformer.resblocks]
        self.layers = [
            (block, Attention(block.attn), cross, Attention(cross.attn))
            for block, cross in zip(self.decoder.resblocks, self.decoder.cross_attn, strict=True)
        ]
        self.seen = 0

    def look(self, image_tokens: torch.Tensor) -> None:
        """Take in a batch of images [B, I, W]; serves any number of `start`s."""
        self._image = []
        for _, _, cross, attention in self.layers:
            attention.remember(cross.ln_1_kv(image_tokens))
            self._image.append((attention.keys, attention.values))
        self._like, self.device = image_tokens, image_tokens.device

    def start(self, length: int) -> None:
        """Forget all text; room for `length` tokens."""
        self.seen, batch = 0, len(self._like)
        own = [a for _, a in self.tower] + [a for _, a, _, _ in self.layers]
        for attention in own:
            attention.start(batch, length, self._like)
        for (_, _, _, attention), (keys, values) in zip(self.layers, self._image, strict=True):
            attention.keys, attention.values = keys, values

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these captions only."""
        for _, attention in self.tower:
            attention.keep(rows)
        for _, own, _, cross in self.layers:
            own.keep(rows)
            cross.keep(rows)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] of the token after `tokens` [B, T], which follow those given before."""
        stop = self.seen + tokens.shape[1]
        dtype = self.text.transformer.get_cast_dtype()
        x = self.text.token_embedding(tokens).to(dtype) + self.text.positional_embedding[self.seen : stop].to(dtype)
        for block, attention in self.tower:
            x = x + block.ls_1(attention.to_itself(block.ln_1(x), self.seen))
            x = x + block.ls_2(block.mlp(block.ln_2(x)))
        for block, attention, cross, to_image in self.layers:
            x = x + block.ls_1(attention.to_itself(block.ln_1(x), self.seen))
            x = x + block.ls_2(block.mlp(block.ln_2(x)))
            x = x + cross.ls_1(to_image.to_image(cross.ln_1(x)))
            x = x + cross.ls_2(cross.mlp(cross.ln_2(x)))
        self.seen = stop
        return self.decoder.ln_final(x[:, -1]) @ self.decoder.text_projection


def decode(
    cache: CachedCoca, prompt: Sequence[int], limit: int, tokens: Tokens, how: Decoding, seeds: Sequence[int]
) -> list[tuple[list[int], bool]]:
    """For each image of `cache`: the tokens after `prompt`, at most `limit`, and whether the end token closed them.

    `seeds` holds one seed an image, used where tokens are drawn: what is drawn for an image depends on no other.
    """
    cache.start(len(prompt) + 1 + limit)
    device, batch = cache.device, len(seeds)
    chances = _chances(seeds, limit).to(device) if how.method == "top_p" else None
    written = torch.full((batch, limit), tokens.end, device=device)
    ended = torch.zeros(batch, dtype=torch.bool, device=device)
    rows = torch.arange(batch, device=device)  # the captions that the cache still holds
    new = torch.tensor([tokens.start, *prompt], device=device).expand(batch, -1)
    for position in range(limit):
        logits = cache.step(new).float()
        logits[:, tokens.pad] = -torch.inf
        chosen = logits.argmax(-1) if chances is None else draw(logits, chances[rows, position], how)
        chosen = chosen.where(~ended[rows], tokens.end)
        written[rows, position] = chosen
        ended[rows] = chosen == tokens.end
        going = chosen != tokens.end
        left = int(going.sum())
        if not left:
            break
        if left <= SHRINK * len(rows):
            cache.keep(going)
            rows, chosen = rows[going], chosen[going]
        new = chosen[:, None]
    texts = [row[: row.index(tokens.end)] if tokens.end in row else row for row in written.tolist()]
    return list(zip(texts, ended.tolist(), strict=True))


def draw(logits: torch.Tensor, chance: torch.Tensor, how: Decoding) -> torch.Tensor:
    """Nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751) from [B, V] logits, by inverting the distribution.

    `chance` [B] in [0, 1) decides; of the most likely tokens as many take part as it takes to hold `top_p`.
    """
    shares, order = (logits / how.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    shares = shares.double()
    before = shares.cumsum(-1) - shares
    shares = shares.masked_fill(before >= how.top_p, 0.0)
    reached = shares.cumsum(-1)
    picked = (reached <= chance[:, None] * reached[:, -1:]).sum(-1, keepdim=True)
    picked = picked.clamp(max=(shares > 0).sum(-1, keepdim=True) - 1)
    return order.gather(-1, picked)[:, 0]


def _chances(seeds: Sequence[int], limit: int) -> torch.Tensor:
    """One row of uniform numbers a seed [B, limit]."""
    return torch.from_numpy(np.stack([np.random.default_rng(seed).random(limit) for seed in seeds]))
