"""Rows that met the conditions → which of them repeat an evaluation image, or each other, by the recipe's `dedup`.

Evaluation images (`dedup.decontaminate`) are read as any source is, and measured as the dataset's own; what was
measured is kept, so that the next selection does not decode them again:

    state/decontaminate/<hash of the files and the image settings>.parquet     name, sha256, phash, colours
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from capstan.pipeline.config import Dedup, Recipe, Source, fingerprint
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.image.decode import StoredImage, decode
from capstan.pipeline.image.phash import read_colours
from capstan.pipeline.progress import Progress
from capstan.pipeline.records import FORMAT_VERSION
from capstan.pipeline.select.near_duplicates import (
    CONTAMINATED,
    REASONS,
    SEMANTIC,
    Duplicates,
    find_duplicates,
    near_reference,
    precedence,
    settle,
)
from capstan.pipeline.select.semantic import find_semantic
from capstan.pipeline.source.image_reader import read_images, span_of
from capstan.pipeline.source.reader import SourceReader
from capstan.pipeline.storage import Storage

log = logging.getLogger(__name__)

_FIELD = "dedup.decontaminate"
_FOLDER = "state/decontaminate"
_SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("phash", pa.uint64(), nullable=False),
        pa.field("colours", pa.string(), nullable=False),
    ]
)

Ints = npt.NDArray[np.int64]
Embeddings = npt.NDArray[np.float16]
Sums = npt.NDArray[np.bytes_]  # SHA-256, 32 raw bytes each
Colours = npt.NDArray[np.uint8] | None


@dataclass(frozen=True)
class Repeats:
    """For each of n rows: which row it repeats (-1: none) and how (dedup.EXACT, …). Of a row that repeats an evaluation
    image, `kept` is that one's place in `evaluation`."""

    kept: Ints
    kind: npt.NDArray[np.int8]
    evaluation: list[str] = field(default_factory=list)

    def reason(self, row: int) -> str:
        return REASONS[self.kind[row]]


def find_repeats(
    recipe: Recipe,
    storage: Storage,
    sha256: Sums,
    phash: npt.NDArray[np.uint64],
    colours: Colours,
    area: Ints,
    batch: Ints,
    embeddings: Embeddings | None = None,
    places: Ints | None = None,
) -> Repeats:
    """Look for repeats among n rows, in the order of batches and, in a batch, of keys: `sha256` as 32 raw bytes,
    `colours` [n, phash.COLOUR_BYTES] (None: by the hash alone), `area` in pixels. `embeddings` [m, d] are for
    `dedup.semantic`; `places` says where those of the n rows are in them, if not in order.

    Raises RecipeError for evaluation images that cannot be read.
    """
    dedup, n = recipe.dedup, len(phash)
    evaluation, contaminated = _contaminated(recipe, storage, sha256, phash, colours)
    kept, kind = np.full(n, -1, np.int64), np.zeros(n, np.int8)
    (clean,) = np.nonzero(contaminated < 0)
    order = precedence(batch[clean], area[clean])
    found = find_duplicates(
        order,
        sha256[clean],
        phash[clean],
        exact=dedup.exact,
        distance=dedup.perceptual,
        colours=None if colours is None else colours[clean],
        tolerance=dedup.colours or 0,
    )
    if dedup.semantic is not None:
        assert embeddings is not None
        found = _semantic(found, order, batch[clean], embeddings, clean if places is None else places[clean], dedup)
    kept[clean] = np.where(found.kept >= 0, clean[found.kept], -1)
    kind[clean] = found.kind
    hit = contaminated >= 0
    kept[hit], kind[hit] = contaminated[hit], CONTAMINATED
    return Repeats(kept, kind, evaluation)


def _semantic(
    found: Duplicates, order: Ints, batch: Ints, embeddings: Embeddings, places: Ints, dedup: Dedup
) -> Duplicates:
    """`found`, and what repeats by meaning a row that is kept so far."""
    assert dedup.semantic is not None
    left = order[found.kept[order] < 0]
    first = int((batch[left] == batch[left].min(initial=0)).sum())
    near = find_semantic(embeddings, places[left], dedup.semantic, first=first)
    kept, kind = found.kept.copy(), found.kind.copy()
    settle(kept, kind, left, near, SEMANTIC)
    return Duplicates(kept, kind)


# Evaluation images -------------------------------------------------------------------------------------------------


def evaluation_signature(recipe: Recipe) -> str:
    """Changes with the files of the evaluation set, and with what is measured of them; "" where there is none."""
    if recipe.dedup.decontaminate is None:
        return ""
    return fingerprint([FORMAT_VERSION, recipe.image.model_dump(mode="json"), _source(recipe)[1].signature])


def evaluation_images(recipe: Recipe, storage: Storage) -> pa.Table:
    """What is measured of the evaluation images (name, sha256, phash, colours). One that cannot be read is an error:
    it would be looked for in vain."""
    name = f"{_FOLDER}/{evaluation_signature(recipe)}.parquet"
    if storage.exists(name):
        return storage.read_table(name)
    reader, rows = _source(recipe)
    image = recipe.image.model_copy(update={"min_size": 1})
    found: list[dict[str, object]] = []
    with Progress("evaluation set", None, unit="pictures") as bar:
        for table in rows.tables():
            listed = table.to_pylist()
            if any(row["image"] is None and not row["file"] for row in listed):
                raise RecipeError(_FIELD, "holds addresses, not images", "name a folder, tars, or a table with bytes")
            spans = [span_of(row, i) for i, row in enumerate(listed) if row["file"]]
            given = ((i, row["image"]) for i, row in enumerate(listed) if row["image"] is not None)
            for index, data in [*given, *read_images(spans, reader)]:
                url = listed[index]["url"] or listed[index]["key"]
                picture = decode(data, image) if isinstance(data, bytes) else data
                if not isinstance(picture, StoredImage):
                    raise RecipeError(_FIELD, f"{url} cannot be read ({picture})", "mend it, or leave it out")
                assert isinstance(data, bytes)
                sha256 = hashlib.sha256(data).hexdigest()
                measures = {"sha256": sha256, "phash": picture.phash, "colours": picture.colours}
                found.append({"name": url.rpartition("/")[2], **measures})
            bar.advance(len(listed))
    measured = pa.Table.from_pylist(sorted(found, key=lambda row: (str(row["name"]), str(row["sha256"]))), _SCHEMA)
    storage.write_table(name, measured)
    storage.delete(*(other for other in storage.names(_FOLDER) if other != name))
    return measured


def _source(recipe: Recipe) -> tuple[Recipe, SourceReader]:
    """The evaluation set as the source of a recipe of its own, and its rows."""
    try:
        source = Source(path=recipe.dedup.decontaminate, image=_image_column(recipe))
        reader = recipe.model_copy(update={"source": source})
        return reader, SourceReader(reader)
    except RecipeError as error:
        raise RecipeError(_FIELD, error.problem, error.hint) from None


def _image_column(recipe: Recipe) -> str | None:
    """Tables of evaluation images hold them as the source's tables do, or as Hugging Face's do."""
    paths = recipe.dedup.decontaminate
    tables = [path for path in ([paths] if isinstance(paths, str) else paths or []) if path.endswith(".parquet")]
    return (recipe.source.image if recipe.source and recipe.source.image else "image") if tables else None


def _contaminated(
    recipe: Recipe, storage: Storage, sums: Sums, phash: npt.NDArray[np.uint64], colours: Colours
) -> tuple[list[str], Ints]:
    """The evaluation images' names, and for each row the first one that it repeats, or -1."""
    if recipe.dedup.decontaminate is None:
        return [], np.full(len(phash), -1, np.int64)
    images = evaluation_images(recipe, storage)
    names = images["name"].to_pylist()
    if not names:
        return [], np.full(len(phash), -1, np.int64)
    held = np.array([bytes.fromhex(sha256) for sha256 in images["sha256"].to_pylist()], "S32")
    by = np.argsort(held, kind="stable")
    at = np.minimum(np.searchsorted(held[by], sums), max(len(held) - 1, 0))
    exact = np.where(held[by[at]] == sums, by[at], -1)
    if recipe.dedup.perceptual is None:
        return names, exact
    reference = images["phash"].to_numpy(), None if colours is None else read_colours(images["colours"])
    near = near_reference(reference, phash, colours, recipe.dedup.perceptual, recipe.dedup.colours or 0)
    return names, np.where(exact >= 0, exact, near)
