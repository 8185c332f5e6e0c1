"""File names of a source → which files are read, and in which format

Nothing is read twice: if the names do not decide which files are meant, the source is refused. Files that are left out
are logged.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from typing import Final

from capstan.pipeline.config import Source
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.source.image_metadata import is_metadata
from capstan.pipeline.source.samples import IMAGES, Suffixes
from capstan.pipeline.source.table_checks import UNPACKED
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
}
# Files next to tables whose names show that they are not tables. A .json file can be JSON Lines, but no other text that
# is read by lines. Tars and Parquet files have their suffix if the files next to them do.
_NO_TABLE: Final = re.compile(
    r"[._].*|.*\.(idx|index|md|rst|html|ya?ml|crc|sqlite|uuid|bin|lock|py|ipynb|pdf)", re.IGNORECASE
)
# Texts for people, not lists of URLs. Many folders of tables contain them.
_ABOUT: Final = re.compile(
    r"(read.?me|licen[cs]e|notice|copying|authors|citation|credits|changelog|changes|contributing)\b.*\.txt",
    re.IGNORECASE,
)


def kind_of(path: str, suffixes: Suffixes = IMAGES) -> str:
    """Return one of the formats, "image" for a file with one of the `suffixes`, or "" if the name does not show it.

    >>> kind_of("a.csv.gz"), kind_of("b.TAR"), kind_of("c.png"), kind_of("README.txt"), kind_of("d")
    ('csv', 'webdataset', 'image', '', '')
    """
    stem, dot, suffix = path.lower().rpartition(".")
    if f".{suffix}" in UNPACKED:
        stem, dot, suffix = stem.rpartition(".")
    if not dot or not stem or stem.endswith("/") or (suffix == "txt" and _ABOUT.fullmatch(path.rpartition("/")[2])):
        return ""
    return _IMAGE if f".{suffix}" in suffixes else _SUFFIXES.get(f".{suffix}", "")


class FormatGuess:
    """The formats of the files at one `path` of the source.

    `first` is the first file of each kind ("" for files of no kind); `formats` every kind that a name alone shows.
    `metadata` are files that describe the images next to them; if there are no images, they are tables.
    """

    def __init__(self, path: str, suffixes: Suffixes = IMAGES) -> None:
        self._suffixes = suffixes
        self.path, self.formats, self.metadata = path, set[str](), list[SourceFile]()
        self._first, self._tables = dict[str, str](), dict[str, str]()

    @property
    def first(self) -> dict[str, str]:
        return self._first if _IMAGE in self._first else self._tables | self._first

    def note(self, files: list[SourceFile]) -> None:
        """Add a batch of files."""
        for kind, file in _by_name(files, self._suffixes):
            if is_metadata(file):
                self.metadata.append(file)
                self._tables.setdefault(kind, file.path)
            else:
                self._first.setdefault(kind, file.path)
        self.formats |= {kind_of(file.path, self._suffixes) for file in files}


def _by_name(files: list[SourceFile], suffixes: Suffixes) -> Iterator[tuple[str, SourceFile]]:
    """Yield (kind, file) for each file.

    NAME.parquet next to NAME.tar has no kind: as img2dataset and Capstan write it, it repeats the content of the tar.
    """
    tars = {stem_of(file.path) for file in files if file.path.lower().endswith(".tar")}
    for file in files:
        kind = kind_of(file.path, suffixes) or ("txt" if file.named and file.path.lower().endswith(".txt") else "")
        twin = kind == "parquet" and not file.named and stem_of(file.path) in tars
        yield "" if twin else kind, file


class FormatPolicy:
    """Decides which files of a source are read, and in which format; `images`: as a folder of images.

    Raises RecipeError if several kinds are mixed and the recipe does not say which one it means.
    """

    def __init__(self, source: Source, guesses: Iterable[FormatGuess], suffixes: Suffixes = IMAGES) -> None:
        guesses, self._suffixes = list(guesses), suffixes
        self._format = source.format
        self._kinds = {kind: path for guess in reversed(guesses) for kind, path in guess.first.items()}
        self._formats = {kind for guess in guesses for kind in guess.formats}
        self.images = source.format == "folder" or (source.format == "auto" and _IMAGE in self._kinds)
        if source.format == "auto":
            self._refuse_tables_with_images()
            for guess in guesses:
                _refuse_mixed(guess)

    def _refuse_tables_with_images(self) -> None:
        """Raise RecipeError if there are both: whichever is read, the other would be left out."""
        tables = [path for kind, path in self._kinds.items() if kind in (*TABLES, _TAR) and kind != "txt"]
        if tables and _IMAGE in self._kinds:
            problem = f"holds tables ({tables[0]}) and images ({self._kinds[_IMAGE]})"
            hint = "name the tables with a glob, or set source.format: folder for the images"
            raise RecipeError("source.path", problem, hint)

    def of(self, files: list[SourceFile]) -> Iterator[tuple[str, SourceFile]]:
        """Yield (format, file) for each file in a batch; the format is "" for a file that is left out."""
        for kind, file in _by_name(files, self._suffixes):
            yield kind if self._format == "auto" else self._requested(file), file

    def _requested(self, file: SourceFile) -> str:
        """Return the recipe's format; "" if the user did not name this file and other files fit that format better."""
        others = not file.named and self._format in self._formats
        kind, name = kind_of(file.path, self._suffixes), file.path.rpartition("/")[2].lower()
        no_table = _NO_TABLE.fullmatch(name) or (self._format != "jsonl" and name.endswith(".json"))
        no_table = no_table or (self._format in ("parquet", _TAR) and "." in name)
        return "" if others and kind != self._format and (kind or no_table) else self._format


def _refuse_mixed(guess: FormatGuess) -> None:
    """Raise RecipeError for tables of several formats: they may hold the same rows, which would be read twice."""
    tables = [guess.first[kind] for kind in (_TAR, *TABLES) if kind in guess.first]
    if len(tables) > 1 and _IMAGE not in guess.first:
        problem = f"{guess.path} holds tables of several kinds ({tables[0]}, {tables[1]})"
        hint = "name the intended files with a glob (or a list of globs), or set source.format"
        raise RecipeError("source.path", problem, hint)
