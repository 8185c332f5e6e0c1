"""CoCa decoding with a key-value cache: image tokens → caption tokens

open_clip 3.3 has no cache: for every new token it runs text tower and decoder over the whole caption and projects the
image again. Here each layer caches its keys and values, and cross-attention those of the image (once for all slots and
beams), so a step costs one token. The tokens equal those of open_clip's own forward pass.

Float sums depend on their order, which BLAS libraries choose by shape. A caption must depend on its own image only, so
matrix products have shapes for which a row's sum does not depend on the other rows or the number of threads. On the
CPU these are whole groups of `GROUP` rows: torch 2.15 with MKL was measured to distribute rows to threads in groups of
eight, and to sum 1 to 3 rows in another order than more. Elsewhere the number of rows is constant.

Shapes: P images, B rows (captions, or beams of captions), T tokens so far, I image tokens, W width, H heads, D width
of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from capstan.recaption.config import Decoding

GROUP: Final = 8

# Finished captions are dropped from the batch once the running ones are at most this share of it. Copying the cache is
# cheap compared with the steps saved.
SHRINK: Final = 0.75


@dataclass(frozen=True)
class Tokens:
    """The special tokens of a tokenizer."""

    start: int
    end: int
    pad: int  # masked in training, so the model has not learnt it: never chosen


Written = tuple[list[int], bool]  # a caption's tokens after its prompt, and whether the end token followed


def padded(rows: int) -> int:
    """Round `rows` up to whole groups."""
    return -(-rows // GROUP) * GROUP


class Attention:
    """One `nn.MultiheadAttention` with cached keys and values."""

    def __init__(self, module: nn.MultiheadAttention) -> None:
        self.module, self.heads = module, module.num_heads
        self.scale = (module.embed_dim // module.num_heads) ** -0.5
        self.keys = self.values = torch.empty(0)  # [B, H, T, D], or [P, H, I, D]

    def project(self, x: torch.Tensor, first: int, last: int) -> tuple[torch.Tensor, ...]:
        """Project x [B, T, W] to those of queries (0), keys (1), values (2) in first..last, each [B, H, T, D]."""
        width = x.shape[-1]
        rows = slice(first * width, (last + 1) * width)
        weight, bias = self.module.in_proj_weight[rows], self.module.in_proj_bias
        projected = F.linear(x, weight, None if bias is None else bias[rows])
        parts = projected.unflatten(-1, (last - first + 1, self.heads, -1))  # [B, T, parts, H, D]
        return parts.permute(2, 0, 3, 1, 4).unbind(0)

    def start(self, batch: int, length: int, like: torch.Tensor) -> None:
        """Allocate `length` tokens for self-attention."""
        shape = (batch, self.heads, length, like.shape[-1] // self.heads)
        self.keys, self.values = like.new_empty(shape), like.new_empty(shape)

    def cache_image(self, x: torch.Tensor) -> None:
        """Cache keys and values of image tokens x [P, I, W] for cross-attention."""
        keys, values = self.project(x, 1, 2)
        self.keys, self.values = keys.contiguous(), values.contiguous()  # read at every step

    def keep(self, rows: torch.Tensor, seen: int | None = None) -> None:
        """Keep only these rows, and their first `seen` tokens (None: all)."""
        kept = self.keys.shape[2] if seen is None else seen
        if len(rows) < len(self.keys):
            self.keys, self.values = self.keys[rows], self.values[rows]
        else:  # beams changed places: copy in place
            self.keys[:, :, :kept] = self.keys[rows, :, :kept]
            self.values[:, :, :kept] = self.values[rows, :, :kept]

    def self_attention(self, x: torch.Tensor, seen: int, mask: torch.Tensor | None) -> torch.Tensor:
        """Return the self-attention of the new tokens x [B, T, W], which follow `seen` cached ones."""
        query, key, value = self.project(x, 0, 2)
        stop = seen + x.shape[1]
        self.keys[:, :, seen:stop], self.values[:, :, seen:stop] = key, value
        return self._attend(query, self.keys[:, :, :stop], self.values[:, :, :stop], mask)

    def cross_attention(self, x: torch.Tensor) -> torch.Tensor:
        """Return the cross-attention of x [B, T, W]. An image's beams are adjacent rows and are handled as one."""
        joined = x.reshape(len(self.keys), -1, x.shape[-1])  # [P, beams · T, W]
        return self._attend(self.project(joined, 0, 0)[0], self.keys, self.values, None).view_as(x)

    def _attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        # Not scaled_dot_product_attention: for a single query its sums depend on the number of threads.
        scores = (query * self.scale) @ keys.transpose(-1, -2)
        if mask is not None:
            scores = scores + mask
        mixed = scores.softmax(-1) @ values
        return self.module.out_proj(mixed.transpose(1, 2).flatten(2))


class CachedCoca:
    """CoCa's text tower and decoder with caches, for one batch of images."""

    def __init__(self, model: Any) -> None:
        self.text, self.decoder = model.text, model.text_decoder
        self.tower = [(block, Attention(block.attn)) for block in self.text.transformer.resblocks]
        self.layers = [
            (block, Attention(block.attn), cross, Attention(cross.attn))
            for block, cross in zip(self.decoder.resblocks, self.decoder.cross_attn, strict=True)
        ]
        self.seen = 0

    def set_images(self, image_tokens: torch.Tensor) -> None:
        """Cache a batch of image tokens [P, I, W], for any number of `start` calls."""
        self._image = []
        for _, _, cross, attention in self.layers:
            attention.cache_image(cross.ln_1_kv(image_tokens))
            self._image.append((attention.keys, attention.values))
        self._like, self.device = image_tokens, image_tokens.device
        self.groups = self.device.type == "cpu"  # elsewhere a batch keeps its shape

    def start(self, length: int, images: Sequence[int], beams: int = 1) -> int:
        """Clear all text and allocate `length` tokens for captions of these images, `beams` rows each.

        Returns the number of images in the cache: first the given ones, then repetitions that fill the shape.
        """
        total = padded(len(images)) if self.groups else len(self._like)
        chosen = torch.tensor([*images, *[images[-1]] * (total - len(images))], device=self.device)
        whole = total == len(self._like) and list(images) == list(range(len(images)))
        self.seen = 0
        for attention in [a for _, a in self.tower] + [a for _, a, _, _ in self.layers]:
            attention.start(total * beams, length, self._like)
        for (_, _, _, attention), (keys, values) in zip(self.layers, self._image, strict=True):
            attention.keys, attention.values = (keys, values) if whole else (keys[chosen], values[chosen])
        return total

    def keep(self, rows: torch.Tensor, images: torch.Tensor | None = None) -> None:
        """Keep only these rows, and these images (None: all)."""
        for _, attention in self.tower:
            attention.keep(rows, self.seen)
        for _, own, _, cross in self.layers:
            own.keep(rows, self.seen)
            if images is not None:
                cross.keep(images)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits [B, V] of the token after `tokens` [B, T], which follow those of earlier calls."""
        count, stop = tokens.shape[1], self.seen + tokens.shape[1]
        dtype = self.text.transformer.get_cast_dtype()
        x = self.text.token_embedding(tokens).to(dtype) + self.text.positional_embedding[self.seen : stop].to(dtype)
        causal = None
        if count > 1:
            causal = torch.full((count, stop), -torch.inf, dtype=dtype, device=x.device).triu(self.seen + 1)
        for block, attention in self.tower:
            x = x + block.ls_1(attention.self_attention(block.ln_1(x), self.seen, causal))
            x = x + block.ls_2(block.mlp(block.ln_2(x)))
        for block, attention, cross, image_attention in self.layers:
            x = x + block.ls_1(attention.self_attention(block.ln_1(x), self.seen, causal))
            x = x + block.ls_2(block.mlp(block.ln_2(x)))
            x = x + cross.ls_1(image_attention.cross_attention(cross.ln_1(x)))
            x = x + cross.ls_2(cross.mlp(cross.ln_2(x)))
        self.seen = stop
        return self.decoder.ln_final(x[:, -1]) @ self.decoder.text_projection


def decode(
    cache: CachedCoca,
    images: Sequence[int],
    prompt: Sequence[int],
    limit: int,
    tokens: Tokens,
    how: Decoding,
    seeds: Sequence[int],
) -> list[Written]:
    """Decode at most `limit` tokens after `prompt` for each of these images of `cache`, greedily or by sampling.

    `seeds` holds one seed per image, for sampling: an image's tokens do not depend on the other images.
    """
    total = cache.start(len(prompt) + 1 + limit, images)
    device, batch = cache.device, len(images)
    fill = total - batch
    chance = uniforms([*seeds, *[0] * fill], limit).to(device) if how.method == "top_p" else None
    written = torch.full((total, limit), tokens.end, device=device)
    ended = torch.arange(total, device=device) >= batch
    rows = torch.arange(total, device=device)  # the captions still in the cache
    new = torch.tensor([tokens.start, *prompt], device=device).expand(total, -1)
    for position in range(limit):
        logits = cache.step(new).float()
        logits[:, tokens.pad] = -torch.inf
        chosen = logits.argmax(-1) if chance is None else draw(logits, chance[rows, position], how)
        chosen = chosen.where(~ended[rows], tokens.end)
        written[rows, position] = chosen
        running = chosen != tokens.end
        ended[rows] = ~running
        left = int(running.sum())
        if not left:
            break
        if cache.groups and padded(left) <= SHRINK * len(rows):
            kept = (~running).int().argsort(stable=True)[: padded(left)]  # running ones first, filled to a whole group
            cache.keep(kept, kept)
            rows, chosen = rows[kept], chosen[kept]
        new = chosen[:, None]
    texts = [row[: row.index(tokens.end)] if tokens.end in row else row for row in written[:batch].tolist()]
    return list(zip(texts, ended[:batch].tolist(), strict=True))


def draw(logits: torch.Tensor, chance: torch.Tensor, how: Decoding) -> torch.Tensor:
    """Sample tokens [B] from logits [B, V] by nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751).

    The distribution is inverted: `chance` [B] in [0, 1) selects among the fewest most probable tokens
    whose total probability reaches `top_p`.
    """
    shares, order = (logits / how.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    shares = shares.double()
    before = shares.cumsum(-1) - shares
    shares = shares.masked_fill(before >= how.top_p, 0.0)
    reached = shares.cumsum(-1)
    picked = (reached <= chance[:, None] * reached[:, -1:]).sum(-1, keepdim=True)
    picked = picked.clamp(max=(shares > 0).sum(-1, keepdim=True) - 1)
    return order.gather(-1, picked)[:, 0]


def uniforms(seeds: Sequence[int], limit: int) -> torch.Tensor:
    """Return one row of uniform random numbers in [0, 1) per seed [B, limit]."""
    return torch.from_numpy(np.stack([np.random.default_rng(seed).random(limit) for seed in seeds]))
