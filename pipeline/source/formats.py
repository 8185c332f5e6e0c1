"""What the names of a source's files say → which of them are read, and as what. Nothing is read twice: where names do
not settle what is meant, the source is refused. Nothing is left out without a word: what is, is logged.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from typing import Final

from capstan.pipeline.config import Source
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.source.folders import IMAGES
from capstan.pipeline.source.tables import UNPACKED
from capstan.pipeline.storage.listing import SourceFile, stem_of

log = logging.getLogger(__name__)

TABLES: Final = ("parquet", "csv", "tsv", "jsonl", "txt")
_TAR: Final = "webdataset"
_IMAGE: Final = "image"
_SUFFIXES: Final = {
    **{f".{kind}": kind for kind in TABLES},
    ".pq": "parquet",
    ".ndjson": "jsonl",
    ".tar": _TAR,
    ".tgz": _TAR,  # which is refused, with its reason
    **dict.fromkeys(IMAGES, _IMAGE),
}
# Beside tables of any format: what is no table, as its name says. In no text that is read by lines, but perhaps in JSON
# Lines, is there a .json; and tars and Parquet files have their suffix wherever others beside them have.
_NO_TABLE: Final = re.compile(
    r"[._].*|.*\.(idx|index|md|rst|html|ya?ml|crc|sqlite|uuid|bin|lock|py|ipynb|pdf)", re.IGNORECASE
)
# Texts for people, not of addresses. They stand in many folders of tables.
_ABOUT: Final = re.compile(
    r"(read.?me|licen[cs]e|notice|copying|authors|citation|credits|changelog|changes|contributing)\b.*\.txt",
    re.IGNORECASE,
)


def kind_of(path: str) -> str:
    """One of the formats, "image", or "" where the name does not tell.

    >>> kind_of("a.csv.gz"), kind_of("b.TAR"), kind_of("c.png"), kind_of("README.txt"), kind_of("d")
    ('csv', 'webdataset', 'image', '', '')
    """
    stem, dot, suffix = path.lower().rpartition(".")
    if f".{suffix}" in UNPACKED:
        stem, dot, suffix = stem.rpartition(".")
    if not dot or not stem or stem.endswith("/") or (suffix == "txt" and _ABOUT.fullmatch(path.rpartition("/")[2])):
        return ""
    return _SUFFIXES.get(f".{suffix}", "")


class FormatGuess:
    """The `first` file of each kind ("": of none) that one `path` of the source names; `formats` are all that the names
    alone tell."""

    def __init__(self, path: str) -> None:
        self.path, self.first, self.formats = path, dict[str, str](), set[str]()

    def note(self, files: list[SourceFile]) -> None:
        """Take in a batch of pipeline.listing."""
        for kind, file in _by_name(files):
            self.first.setdefault(kind, file.path)
        self.formats |= {kind_of(file.path) for file in files}


def _by_name(files: list[SourceFile]) -> Iterator[tuple[str, SourceFile]]:
    """(kind, file) of each. NAME.parquet beside NAME.tar is of none: it says of the tar's samples what they say
    themselves, as img2dataset's and Capstan's own do."""
    tars = {stem_of(file.path) for file in files if file.path.lower().endswith(".tar")}
    for file in files:
        kind = kind_of(file.path) or ("txt" if file.named and file.path.lower().endswith(".txt") else "")
        twin = kind == "parquet" and not file.named and stem_of(file.path) in tars
        yield "" if twin else kind, file


class FormatPolicy:
    """Which files of a source are read, and as what; `pictures`: as a folder of images.

    Raises RecipeError where several kinds lie together and the recipe does not say which it means.
    """

    def __init__(self, source: Source, found: Iterable[FormatGuess]) -> None:
        found = list(found)
        self._format = source.format
        self._kinds = {kind: path for kinds in reversed(found) for kind, path in kinds.first.items()}
        self._formats = {kind for kinds in found for kind in kinds.formats}
        self.images = source.format == "folder" or (source.format == "auto" and _IMAGE in self._kinds)
        if source.format == "auto":
            self._refuse_tables_beside_images()
            for kinds in found:
                _refuse_mixed(kinds)

    def _refuse_tables_beside_images(self) -> None:
        """Whichever is read, the other would be left out."""
        tables = [path for kind, path in self._kinds.items() if kind in (*TABLES, _TAR) and kind != "txt"]
        if tables and _IMAGE in self._kinds:
            problem = f"holds tables ({tables[0]}) and images ({self._kinds[_IMAGE]})"
            hint = "name the tables with a glob, or say format: folder for the images"
            raise RecipeError("source.path", problem, hint)

    def of(self, files: list[SourceFile]) -> Iterator[tuple[str, SourceFile]]:
        """(format, file) of each file in a batch; the format is "" for one that is left out."""
        for kind, file in _by_name(files):
            yield kind if self._format == "auto" else self._asked(file), file

    def _asked(self, file: SourceFile) -> str:
        """The format that the recipe asks for, unless the file was not named itself, and others fit it better."""
        others = not file.named and self._format in self._formats
        kind, name = kind_of(file.path), file.path.rpartition("/")[2].lower()
        no_table = _NO_TABLE.fullmatch(name) or (self._format != "jsonl" and name.endswith(".json"))
        no_table = no_table or (self._format in ("parquet", _TAR) and "." in name)
        return "" if others and kind != self._format and (kind or no_table) else self._format


def _refuse_mixed(kinds: FormatGuess) -> None:
    """The same rows in two formats would be read twice."""
    tables = [kinds.first[kind] for kind in (_TAR, *TABLES) if kind in kinds.first]
    if len(tables) > 1 and _IMAGE not in kinds.first:
        problem = f"{kinds.path} holds tables of several kinds ({tables[0]}, {tables[1]})"
        hint = "name those that are meant with a glob (or a list of globs), or say their kind in source.format"
        raise RecipeError("source.path", problem, hint)
