"""Image tokens of open_clip's CoCa → caption tokens, with a key-value cache.

open_clip 3.3 has no cache: it runs text tower and decoder over the whole caption for every new token, and projects the
image anew. Here each layer keeps its keys and values, the decoder's cross-attention those of the image (once for all
slots, once for all beams), and a step costs one token. The tokens are those of open_clip's own forward.

Sums of floats depend on their order, and a library of matrix products chooses the order by the shape. So that a
caption depends on its own image only, products have shapes for which one row's sum is the same whatever rows and
threads are beside it: on the CPU whole groups of `GROUP` rows (measured with torch 2.15 and its MKL, which shares rows
out to threads in eights, and sums 1 to 3 of them otherwise than more), elsewhere always the same number of rows.

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

# Captions that have ended leave the batch once so few are left: each step then costs what is still being written, and
# moving the cache costs little beside it.
SHRINK: Final = 0.75


@dataclass(frozen=True)
class Tokens:
    """What the decoder needs to know of a tokenizer."""

    start: int
    end: int
    pad: int  # masked in training, so the model has never learnt where it stands: never chosen


Written = tuple[list[int], bool]  # a caption's tokens after its prompt, and whether the end token closed them


def padded(rows: int) -> int:
    """`rows`, rounded up to whole groups."""
    return -(-rows // GROUP) * GROUP


class Attention:
    """One `nn.MultiheadAttention` with the keys and values of what it has seen."""

    def __init__(self, module: nn.MultiheadAttention) -> None:
        self.module, self.heads = module, module.num_heads
        self.scale = (module.embed_dim // module.num_heads) ** -0.5
        self.keys = self.values = torch.empty(0)  # [B, H, T, D], or [P, H, I, D]

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
        """Keys and values of image tokens x [P, I, W], for cross-attention."""
        keys, values = self.project(x, 1, 2)
        self.keys, self.values = keys.contiguous(), values.contiguous()  # read at every step

    def keep(self, rows: torch.Tensor, seen: int | None = None) -> None:
        """Go on with these rows, of which `seen` tokens count (None: all)."""
        kept = self.keys.shape[2] if seen is None else seen
        if len(rows) < len(self.keys):
            self.keys, self.values = self.keys[rows], self.values[rows]
        else:  # beams changed places: in what there is already
            self.keys[:, :, :kept] = self.keys[rows, :, :kept]
            self.values[:, :, :kept] = self.values[rows, :, :kept]

    def to_itself(self, x: torch.Tensor, seen: int, mask: torch.Tensor | None) -> torch.Tensor:
        """Self-attention of the new tokens x [B, T, W] that follow `seen` cached ones."""
        query, key, value = self.project(x, 0, 2)
        stop = seen + x.shape[1]
        self.keys[:, :, seen:stop], self.values[:, :, seen:stop] = key, value
        return self._attend(query, self.keys[:, :, :stop], self.values[:, :, :stop], mask)

    def to_image(self, x: torch.Tensor) -> torch.Tensor:
        """Cross-attention of x [B, T, W]; an image's beams stand beside each other and look at it as one."""
        beside = x.reshape(len(self.keys), -1, x.shape[-1])  # [P, beams · T, W]
        return self._attend(self.project(beside, 0, 0)[0], self.keys, self.values, None).view_as(x)

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
        """Take in a batch of images [P, I, W]; serves any number of `start`s."""
        self._image = []
        for _, _, cross, attention in self.layers:
            attention.remember(cross.ln_1_kv(image_tokens))
            self._image.append((attention.keys, attention.values))
        self._like, self.device = image_tokens, image_tokens.device
        self.groups = self.device.type == "cpu"  # elsewhere a batch keeps its shape to the end

    def start(self, length: int, images: Sequence[int], beams: int = 1) -> int:
        """Forget all text; room for `length` tokens of captions of these images, `beams` rows each.

        Gives how many images the cache now holds: the first are those asked for, the others fill the shape.
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
        """Go on with these rows, and these images (None: all of them)."""
        for _, attention in self.tower:
            attention.keep(rows, self.seen)
        for _, own, _, cross in self.layers:
            own.keep(rows, self.seen)
            if images is not None:
                cross.keep(images)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] of the token after `tokens` [B, T], which follow those given before."""
        many, stop = tokens.shape[1], self.seen + tokens.shape[1]
        dtype = self.text.transformer.get_cast_dtype()
        x = self.text.token_embedding(tokens).to(dtype) + self.text.positional_embedding[self.seen : stop].to(dtype)
        causal = None
        if many > 1:
            causal = torch.full((many, stop), -torch.inf, dtype=dtype, device=x.device).triu(self.seen + 1)
        for block, attention in self.tower:
            x = x + block.ls_1(attention.to_itself(block.ln_1(x), self.seen, causal))
            x = x + block.ls_2(block.mlp(block.ln_2(x)))
        for block, attention, cross, to_image in self.layers:
            x = x + block.ls_1(attention.to_itself(block.ln_1(x), self.seen, causal))
            x = x + block.ls_2(block.mlp(block.ln_2(x)))
            x = x + cross.ls_1(to_image.to_image(cross.ln_1(x)))
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
    """For each of these images of `cache`: the tokens after `prompt`, at most `limit`, greedy or drawn.

    `seeds` holds one seed an image, used where tokens are drawn: what is drawn for an image depends on no other.
    """
    total = cache.start(len(prompt) + 1 + limit, images)
    device, batch = cache.device, len(images)
    fill = total - batch
    chances = chances_of([*seeds, *[0] * fill], limit).to(device) if how.method == "top_p" else None
    written = torch.full((total, limit), tokens.end, device=device)
    ended = torch.arange(total, device=device) >= batch
    rows = torch.arange(total, device=device)  # the captions that the cache still holds
    new = torch.tensor([tokens.start, *prompt], device=device).expand(total, -1)
    for position in range(limit):
        logits = cache.step(new).float()
        logits[:, tokens.pad] = -torch.inf
        chosen = logits.argmax(-1) if chances is None else draw(logits, chances[rows, position], how)
        chosen = chosen.where(~ended[rows], tokens.end)
        written[rows, position] = chosen
        going = chosen != tokens.end
        ended[rows] = ~going
        left = int(going.sum())
        if not left:
            break
        if cache.groups and padded(left) <= SHRINK * len(rows):
            kept = (~going).int().argsort(stable=True)[: padded(left)]  # those that go on, and as many as fill a group
            cache.keep(kept, kept)
            rows, chosen = rows[kept], chosen[kept]
        new = chosen[:, None]
    texts = [row[: row.index(tokens.end)] if tokens.end in row else row for row in written[:batch].tolist()]
    return list(zip(texts, ended[:batch].tolist(), strict=True))


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


def chances_of(seeds: Sequence[int], limit: int) -> torch.Tensor:
    """One row of uniform numbers a seed [B, limit]."""
    return torch.from_numpy(np.stack([np.random.default_rng(seed).random(limit) for seed in seeds]))
