"""Tar members that share a key → samples: image, caption, JSON

A key ends at the first dot of a member's name, as in webdataset. Names that real tars hold:

    KEY.jpg KEY.txt KEY.json              the usual ones; also .caption, .cap and .text, and .img for the image
    KEY.image.jpg KEY.caption.txt         compound suffixes
    KEY.jpg KEY.0.txt KEY.1.txt           several captions: the first is used
    KEY.0.jpg KEY.1.jpg KEY.txt           several images: each is a sample, with the caption that they share
    img.v1_0.jpg img.v1_0.txt             keys that contain dots, and end at the last one
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from capstan.pipeline.source.tar_index import Member

IMAGES: Final = frozenset([".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jfif"])
TEXTS: Final = (".txt", ".caption", ".cap", ".text")  # suffixes of captions; the first that there is holds
JSON: Final = ".json"
VIDEOS: Final = frozenset([".mp4", ".m4v", ".mov", ".webm", ".mkv"])
SOUNDS: Final = frozenset([".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".m4a"])
TAR_IMAGES: Final = IMAGES | {".img"}  # in a folder, .img is a disk's image
_IMAGE_WORDS: Final = frozenset(["image", "images", "img", "picture", "photo", "rgb"])  # as in KEY.image.jpg

Suffixes = frozenset[str]


@dataclass
class TarSample:
    """What one sample of a tar is made of; `stem` is its name without suffixes, `unused` its members of no use.

    `image` is the file that the row is of: a video or a sound where those are read.
    """

    stem: str
    image: Member | None = None
    text: Member | None = None
    record: Member | None = None
    unused: list[Member] = field(default_factory=list)

    @property
    def left_over(self) -> list[Member]:
        """All members of no use: without an image, captions and JSON are of none either."""
        lost = [] if self.image else [member for member in (self.text, self.record) if member]
        return [*self.unused, *lost]


def samples_of(group: list[Member], suffixes: Suffixes = TAR_IMAGES) -> list[TarSample]:
    """Return the samples that adjacent members with one name up to the first dot make up.

    `suffixes` are those of the files that the rows are of: images, or in their place videos or sounds.
    """
    return [sample for part in _parted(group, suffixes) for sample in _samples(part, suffixes)]


def _parted(group: list[Member], suffixes: Suffixes) -> list[list[Member]]:
    """Split a group in which the names of images are repeated: a sample ends where one of its names comes again."""
    images = [member.name for member in group if _suffix(member) in suffixes]
    if len(set(images)) == len(images):
        return [group]
    parts: list[list[Member]] = [[]]
    for member in group:
        if any(member.name == other.name for other in parts[-1]):
            parts.append([])
        parts[-1].append(member)
    return parts


def _samples(group: list[Member], suffixes: Suffixes) -> list[TarSample]:
    key = first_split(group[0].name)[0]
    if plain := [member for member in group if first_split(member.name)[1].lower() in suffixes]:
        return [_sample(key, plain[0], group, key)]
    runs = [list(run) for _, run in itertools.groupby(group, key=lambda member: split(member.name)[0])]
    pictured = [run for run in runs if _images(run, suffixes)]
    if any(len(run) > len(_images(run, suffixes)) and _sidecars(run) for run in pictured) or not pictured:
        return _by_last_dot(runs, key, suffixes)
    named = [run for run in pictured if _part(run[0], key) in _IMAGE_WORDS][:1]
    sidecars = [member for run in runs if not _images(run, suffixes) for member in run]
    if not named and not (len(pictured) == 1 and not _has_digit(_part(pictured[0][0], key))):
        sidecars = [member for member in sidecars if _part(member, key) == ""]
    if not _sidecars(sidecars):
        return _by_last_dot(runs, key, suffixes)
    chosen = named or pictured
    found = [_sample(key, _images(run, suffixes)[0], [*run, *sidecars], key) for run in chosen]
    used = {member for sample in found for member in (sample.image, sample.text, sample.record)}
    for sample in found:
        sample.unused = []
    found[0].unused = [member for member in group if member not in used]
    return found


def _by_last_dot(runs: list[list[Member]], key: str, suffixes: Suffixes) -> list[TarSample]:
    """Return a sample for each run of members with one name up to the last dot.

    KEY.txt and KEY.json without an image KEY are shared by those images that have none of their own.
    """
    samples = []
    for run in runs:
        images, stem = _images(run, suffixes), split(run[0].name)[0]
        samples.append(_sample(stem, images[0] if images else None, run, stem))
    shared = next((sample for sample in samples if sample.stem == key and sample.image is None), None)
    pictured = [sample for sample in samples if sample.image is not None]
    if shared is None or not pictured:
        return samples
    for sample in pictured:
        sample.text, sample.record = sample.text or shared.text, sample.record or shared.record
    pictured[0].unused += shared.unused
    return [sample for sample in samples if sample is not shared]


def _sample(stem: str, image: Member | None, members: Sequence[Member], key: str) -> TarSample:
    """Return the sample of `image` among `members`: plain KEY.txt and KEY.json come first, then compound ones."""

    def best(suffixes: Sequence[str]) -> Member | None:
        candidates = [member for member in members if _suffix(member) in suffixes]
        return min(candidates, key=lambda m: (_part(m, key) != "", suffixes.index(_suffix(m))), default=None)

    text, record = best(TEXTS), best([JSON])
    return TarSample(stem, image, text, record, [m for m in members if m not in (image, text, record)])


def _images(members: Sequence[Member], suffixes: Suffixes) -> list[Member]:
    return [member for member in members if _suffix(member) in suffixes]


def _sidecars(members: Sequence[Member]) -> bool:
    return any(_suffix(member) in (*TEXTS, JSON) for member in members)


def _suffix(member: Member) -> str:
    return split(member.name)[1].lower()


def _part(member: Member, key: str) -> str:
    """Return what is between the key and the last suffix: "image" of KEY.image.jpg, "" of KEY.jpg."""
    return split(member.name)[0].removeprefix(key).removeprefix(".").lower()


def _has_digit(text: str) -> bool:
    return any(letter.isdigit() for letter in text)


def parts_of(sample: TarSample, wanted: Sequence[str]) -> str:
    """Take KEY.mp4 and the like, by the suffixes `wanted`, from a sample's unused members.

    Return {suffix: [offset, size]} as JSON, "" if there are none.
    """
    named = {f"{sample.stem}.{suffix}": suffix for suffix in wanted}
    found = {named[member.name]: member for member in sample.unused if member.name in named}
    sample.unused = [member for member in sample.unused if member not in found.values()]
    return json.dumps({suffix: [member.offset, member.size] for suffix, member in found.items()}) if found else ""


def unused_suffix(name: str) -> str:
    """Return the suffix under which an unused member is counted: all of it, unless it seems to be part of the key.

    >>> unused_suffix("a/1.seg.png"), unused_suffix("img.v1_2.png"), unused_suffix("LICENSE")
    ('.seg.png', '.png', 'LICENSE')
    """
    suffix = first_split(name)[1].lower()
    suffix = split(name)[1].lower() if _has_digit(split(suffix)[0]) else suffix
    return suffix or name.rpartition("/")[2]


def split(name: str) -> tuple[str, str]:
    """Split a name at its last dot: the part that all files of a sample share, and the suffix.

    >>> split("a/b.c.jpg"), split("a.b/c")
    (('a/b.c', '.jpg'), ('a.b/c', ''))
    """
    stem, dot, suffix = name.rpartition(".")
    return (stem, dot + suffix) if dot and "/" not in suffix else (name, "")


def first_split(name: str) -> tuple[str, str]:
    """Split a name at the first dot of its last part.

    >>> first_split("a.b/c.seg.png")
    ('a.b/c', '.seg.png')
    """
    folder, slash, last = name.rpartition("/")
    stem, dot, suffix = last.partition(".")
    return f"{folder}{slash}{stem}", dot + suffix
