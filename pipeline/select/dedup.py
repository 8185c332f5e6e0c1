"""Find rows that repeat an evaluation image, or each other (`dedup`).

Evaluation images (`dedup.decontaminate`) are read like any source and measured like the dataset's own images. The
measurements are kept, so that the next selection does not decode them again:

    state/decontaminate/<hash of the files and the image settings>.parquet     name, sha256, phash, colours
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from capstan.pipeline.config import Recipe, Source, fingerprint
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.image.decode import StoredImage, decode
from capstan.pipeline.image.phash import read_colours
from capstan.pipeline.progress import Progress
from capstan.pipeline.records import FORMAT_VERSION
from capstan.pipeline.select.arrays.apart import NOTHING, Apart
from capstan.pipeline.select.arrays.large_arrays import (
    copied,
    count,
    filled,
    joined,
    made_of,
    pieces,
    release,
    taken,
    which,
)
from capstan.pipeline.select.near_duplicates import (
    CONTAMINATED,
    COPIES,
    NONE,
    REASONS,
    SEMANTIC,
    Duplicates,
    Earlier,
    find_duplicates,
    near_reference,
    precedence,
    settle,
)
from capstan.pipeline.select.semantic.clusters import find_semantic
from capstan.pipeline.select.semantic.on_workers import VectorFiles
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
Embeddings = npt.NDArray[np.float16] | VectorFiles
Sums = npt.NDArray[np.bytes_]  # SHA-256, 32 raw bytes each
Colours = npt.NDArray[np.uint8] | None
# SHA-256, hashes, colours, and which rows have a hash (None: all) → what the rows repeat
Meet = Callable[[Sums, npt.NDArray[np.uint64], Colours, npt.NDArray[np.bool_] | None], Earlier]


@dataclass(frozen=True)
class Repeats:
    """For each of n rows: the row that it repeats (-1: none) and how (near_duplicates.EXACT, …).

    For a row that repeats an evaluation image, `kept` is the index of that image in `evaluation`. n + number stands for
    a kept row of an earlier batch (near_duplicates.Earlier).
    """

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
    descriptors: Embeddings | None = None,
    apart: Apart = NOTHING,
    meet: Meet | None = None,
) -> Repeats:
    """Find repeats among n rows, ordered by batch and, within a batch, by key.

    `sha256` is 32 raw bytes per row, `colours` [n, phash.COLOUR_BYTES] (None: compare hashes only), `area` is in
    pixels. `embeddings` [m, d] serve `dedup.semantic`, `descriptors` [m, e] `dedup.copies`; `places` holds the rows'
    indices in them, if they are not in order. Rows that are `apart` do not repeat each other. Rows of new batches
    `meet` those of earlier ones.

    Raises RecipeError for evaluation images that cannot be read.
    """
    dedup, n, hashed = recipe.dedup, len(phash), _hashed(recipe, phash)
    evaluation, contaminated = _contaminated(recipe, storage, sha256, phash, colours, hashed)
    clean = which(n, lambda piece: contaminated[piece] < 0)
    batch = taken(batch, clean)
    order, apart = precedence(batch, taken(area, clean)), apart.take(clean)
    values = taken(sha256, clean), taken(phash, clean), None if colours is None else taken(colours, clean)
    known = None if hashed is None else taken(hashed, clean)
    found = find_duplicates(
        order,
        *values[:2],
        exact=dedup.exact,
        distance=dedup.perceptual,
        colours=values[2],
        tolerance=dedup.colours or 0,
        apart=apart,
        hashed=known,
        earlier=None if meet is None else meet(*values, known),
    )
    at = clean if places is None else taken(places, clean)
    if dedup.copies is not None:
        assert descriptors is not None
        found = _by_vectors(found, order, batch, descriptors, at, dedup.copies.threshold, COPIES, apart)
    if dedup.semantic is not None:
        assert embeddings is not None
        found = _by_vectors(found, order, batch, embeddings, at, dedup.semantic, SEMANTIC, apart)
    kept = made_of(n, lambda piece: contaminated[piece], np.int64)
    kind = made_of(n, lambda piece: np.where(contaminated[piece] >= 0, CONTAMINATED, NONE), np.int8)
    for piece in pieces(len(clean)):
        own = found.kept[piece]
        kept[clean[piece]] = renumbered(own, clean, n)
        kind[clean[piece]] = found.kind[piece]
    release(kept, kind)
    return Repeats(kept, kind, evaluation)


def renumbered(kept: Ints, rows: Ints, n: int) -> Ints:
    """Return the repeated rows `kept`, which are places in `rows`, as they are among n rows; -1 stays -1."""
    named = rows[np.clip(kept, 0, len(rows) - 1)]
    return np.where(kept < 0, -1, np.where(kept < len(rows), named, kept - len(rows) + n))


def _hashed(recipe: Recipe, phash: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_] | None:
    """Return which rows have a perceptual hash: images that were copied without decoding have 0. None: all."""
    if recipe.image.check == "full" or recipe.dedup.perceptual is None:
        return None
    hashed = made_of(len(phash), lambda piece: phash[piece] != 0, np.bool_)
    if missing := count(len(hashed), lambda piece: ~hashed[piece]):
        message = "select: %s of %s images have no perceptual hash (image.check: header); near copies of these stay"
        log.warning(message, f"{missing:,}", f"{len(hashed):,}")
    return hashed


def _by_vectors(
    found: Duplicates,
    order: Ints,
    batch: Ints,
    vectors: Embeddings,
    places: Ints,
    threshold: float,
    reason: int,
    apart: Apart,
) -> Duplicates:
    """Add to `found` the rows whose vector is near that of a row kept so far.

    A copy of a row that now repeats a third row, from which the copy is apart, repeats neither: it is compared itself.
    """
    before, reasons = copied(found.kept), copied(found.kind)
    while True:
        ordered = (order[piece] for piece in pieces(len(order)))
        left = joined((rows[before[rows] < 0] for rows in ordered), np.int64)
        first = sum(int((batch[left[piece]] == 0).sum()) for piece in pieces(len(left)))
        rows, different = taken(places, left), apart.take(left)
        if isinstance(vectors, VectorFiles):
            near = vectors.find(rows, threshold, first=first, apart=different)
        else:
            near = find_semantic(vectors, rows, threshold, first=first, apart=different)
        kept, kind = copied(before), copied(reasons)
        free = settle(kept, kind, left, near, reason, apart)
        if not len(free):
            return Duplicates(kept, kind)
        before[free], reasons[free] = -1, NONE


# Evaluation images -------------------------------------------------------------------------------------------------


def evaluation_signature(recipe: Recipe) -> str:
    """Return a hash of the evaluation set's files and of the image settings; "" without an evaluation set."""
    if recipe.dedup.decontaminate is None:
        return ""
    return fingerprint([FORMAT_VERSION, recipe.image.model_dump(mode="json"), _source(recipe)[1].signature])


def evaluation_images(recipe: Recipe, storage: Storage) -> pa.Table:
    """Return the evaluation images' measurements (name, sha256, phash, colours).

    Raises RecipeError for an image that cannot be read: its copies in the dataset would go unnoticed.
    """
    name = f"{_FOLDER}/{evaluation_signature(recipe)}.parquet"
    if storage.exists(name):
        return storage.read_table(name)
    reader, rows = _source(recipe)
    image = recipe.image.model_copy(update={"min_size": 1})
    found: list[dict[str, object]] = []
    with Progress("evaluation set", None, unit="images") as bar:
        for table in rows.tables():
            listed = table.to_pylist()
            if any(row["image"] is None and not row["file"] for row in listed):
                raise RecipeError(_FIELD, "holds URLs, not images", "name a folder, tars, or a table with image bytes")
            spans = [span_of(row, i) for i, row in enumerate(listed) if row["file"]]
            given = ((i, row["image"]) for i, row in enumerate(listed) if row["image"] is not None)
            for index, data in [*given, *read_images(spans, reader)]:
                url = listed[index]["url"] or listed[index]["key"]
                decoded = decode(data, image) if isinstance(data, bytes) else data
                if not isinstance(decoded, StoredImage):
                    raise RecipeError(_FIELD, f"{url} cannot be read ({decoded})", "repair the file or remove it")
                assert isinstance(data, bytes)
                sha256 = hashlib.sha256(data).hexdigest()
                measures = {"sha256": sha256, "phash": decoded.phash, "colours": decoded.colours}
                found.append({"name": url.rpartition("/")[2], **measures})
            bar.advance(len(listed))
    measured = pa.Table.from_pylist(sorted(found, key=lambda row: (str(row["name"]), str(row["sha256"]))), _SCHEMA)
    storage.write_table(name, measured)
    storage.delete(*(other for other in storage.names(_FOLDER) if other != name))
    return measured


def _source(recipe: Recipe) -> tuple[Recipe, SourceReader]:
    """Return a recipe whose source is the evaluation set, and its reader."""
    try:
        source = Source(path=recipe.dedup.decontaminate, image=_image_column(recipe))
        reader = recipe.model_copy(update={"source": source})
        return reader, SourceReader(reader)
    except RecipeError as error:
        raise RecipeError(_FIELD, error.problem, error.hint) from None


def _image_column(recipe: Recipe) -> str | None:
    """Return the image column of evaluation tables: the source's if it has one, else Hugging Face's `image`."""
    paths = recipe.dedup.decontaminate
    tables = [path for path in ([paths] if isinstance(paths, str) else paths or []) if path.endswith(".parquet")]
    return (recipe.source.image if recipe.source and recipe.source.image else "image") if tables else None


def _contaminated(
    recipe: Recipe,
    storage: Storage,
    sums: Sums,
    phash: npt.NDArray[np.uint64],
    colours: Colours,
    hashed: npt.NDArray[np.bool_] | None,
) -> tuple[list[str], Ints]:
    """Return the evaluation images' names, and for each row the first of them that it repeats, or -1."""
    if recipe.dedup.decontaminate is None:
        return [], filled(len(phash), -1, np.int64)
    images = evaluation_images(recipe, storage)
    names = images["name"].to_pylist()
    if not names:
        return [], filled(len(phash), -1, np.int64)
    held = np.array([bytes.fromhex(sha256) for sha256 in images["sha256"].to_pylist()], "S32")
    by = np.argsort(held, kind="stable")

    def first_with(piece: slice) -> Ints:
        at = np.minimum(np.searchsorted(held[by], sums[piece]), max(len(held) - 1, 0))
        return np.where(held[by[at]] == sums[piece], by[at], -1)

    exact = made_of(len(phash), first_with, np.int64)
    if recipe.dedup.perceptual is None:
        return names, exact
    reference = images["phash"].to_numpy(), None if colours is None else read_colours(images["colours"])
    near = near_reference(reference, phash, colours, recipe.dedup.perceptual, recipe.dedup.colours or 0)

    def first_of(piece: slice) -> Ints:
        found = exact[piece] >= 0
        return np.where(found if hashed is None else found | ~hashed[piece], exact[piece], near[piece])

    return names, made_of(len(phash), first_of, np.int64)
