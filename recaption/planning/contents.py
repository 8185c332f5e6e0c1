"""What a caption is made of: an image or a clip, and the original caption if the prompt quotes it"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from capstan.pipeline.dataset.shards import Dataset
from capstan.recaption import store

_CLIP: Final = ("mp4_size", "mp4_crc32")  # of the shard's table: which clip it is


class Content(NamedTuple):
    """The input of a caption: an image, and what else a caption of this layer depends on."""

    sha256: str
    quoted: str  # store.quote of the original caption if prompts quote it, and of the clip if it is seen; else ""


class Reads(NamedTuple):
    """What captions of a layer depend on, next to the image."""

    original: bool = False  # the original caption, which prompts quote
    clip: bool = False  # frames of the sample's clip


@dataclass(frozen=True)
class Image:
    """A row of a shard."""

    key: str
    content: Content
    original: str


def images(dataset: Dataset, shard: str, reads: Reads) -> list[Image]:
    """Return the shard's images in its order."""
    table = dataset.table(shard, ["key", "sha256", "caption", *(_CLIP if reads.clip else ())])
    return [Image(row["key"], Content(row["sha256"], _quoted(row, reads)), row["caption"]) for row in table.to_pylist()]


def _quoted(row: Mapping[str, Any], reads: Reads) -> str:
    """Return what tells apart captions of one image. Clips may differ although their middle frames do not."""
    clip = " ".join(str(row[name]) for name in _CLIP) if reads.clip and row.get(_CLIP[0]) else ""
    if not clip:
        return store.quote(row["caption"]) if reads.original else ""
    return store.quote(f"{clip} {row['caption'] if reads.original else ''}")


def lacking(slots: Sequence[str], have: Collection[str]) -> tuple[str, ...]:
    """Return the slots without a caption."""
    return tuple(slot for slot in slots if slot not in have)
