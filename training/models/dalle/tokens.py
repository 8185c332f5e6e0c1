"""Images and captions → tokens: the codes of a first stage, and ids that end at the image

A prompt is [start, words …, end], as transformers' CLIPTokenizer writes it, and the image follows its end. Batches are
padded on the left, so that every image begins at the same place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from capstan.pipeline.errors import RecipeError
from capstan.training.data.tokenizer import Tokenizer
from capstan.training.models.vqgan.family import VqCodec
from capstan.training.product import family_of, find_product


def open_first_stage(path: str, field: str) -> VqCodec:
    """Open the first stage at `path`, a run or a folder. Raises RecipeError naming `field` if it has no codes."""
    product = find_product(path, field)
    family = family_of(product)
    codec = None if family is None else family.codec(product, torch.device("cpu"))
    if not isinstance(codec, VqCodec):
        kind = "of an unknown format" if family is None else f"of model: {family.name}"
        problem = f"{product} is {kind}, which has no codes"
        raise RecipeError(field, problem, "use a run of model: dvae, vqgan or vitvqgan")
    codec.model.requires_grad_(False)
    return codec


def prompt_ids(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask, int64 [B, L], of at most `length` tokens each, padded on the left where the mask is 0."""
    lines = [[tokenizer.start, *tokenizer.ids(text)[: length - 2], tokenizer.end] for text in texts]
    longest = max(map(len, lines))
    ids = torch.full((len(lines), longest), tokenizer.pad)
    mask = torch.zeros(len(lines), longest, dtype=torch.long)
    for row, line in enumerate(lines):
        ids[row, longest - len(line) :] = torch.tensor(line)
        mask[row, longest - len(line) :] = 1
    return ids, mask


def emptied(ids: torch.Tensor, tokenizer: Tokenizer, rows: torch.Tensor | None = None) -> torch.Tensor:
    """Return ids whose words, in the given rows (bool [B]; None: all), are the id that stands for no text.

    Start and end stay, and so does the mask: transformers draws its images without text so.
    """
    words = (ids != tokenizer.start) & (ids != tokenizer.end)
    return ids.masked_fill(words if rows is None else words & rows[:, None], nothing(tokenizer))


def nothing(tokenizer: Tokenizer) -> int:
    """Return the id that stands for no text: one more than the tokenizer has."""
    return tokenizer.vocab_size
