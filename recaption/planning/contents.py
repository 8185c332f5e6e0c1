"""What a caption is made of: an image, and the original caption if the prompt quotes it"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from capstan.pipeline.dataset.shards import Dataset
from capstan.recaption import store


class Content(NamedTuple):
    """The input of a caption: an image, and the original caption if prompts quote it."""

    sha256: str
    quoted: str  # store.quote of the original caption if prompts quote it, else ""


@dataclass(frozen=True)
class Image:
    """A row of a shard."""

    key: str
    content: Content
    original: str


def images(dataset: Dataset, shard: str, *, quoting: bool) -> list[Image]:
    """Return the shard's images in its order; `quoting`: captions also depend on the original captions."""
    table = dataset.table(shard, ["key", "sha256", "caption"])
    return [
        Image(key, Content(sha256, store.quote(caption) if quoting else ""), caption)
        for key, sha256, caption in zip(*(table[name].to_pylist() for name in table.column_names), strict=True)
    ]


def lacking(slots: Sequence[str], have: Collection[str]) -> tuple[str, ...]:
    """Return the slots without a caption."""
    return tuple(slot for slot in slots if slot not in have)
