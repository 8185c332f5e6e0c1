"""Staged units → score files, decoding each image once for all scorers.

    prepare   on CPU workers: captions and decoded images → scores of SampleScorers, and pixels for the CLIPs
    model     on model workers: pixels and captions → embeddings → scores of EmbeddingScorers
    commit    in the driver: one Parquet file per scorer

A unit's marker names its staged table and its score files, by scorer. A unit that was staged again, or lacks one of the
recipe's scorers, is scored again for those scorers only. Files of other scorers are kept, so that returning to an
earlier recipe costs nothing.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import simplejpeg

from capstan.pipeline.config import Recipe, Resources
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.ingest.job import Staged
from capstan.pipeline.ingest.staging import Packed, samples
from capstan.pipeline.records import storable
from capstan.pipeline.score import store
from capstan.pipeline.score.clip_model import ClipModel, Loaded
from capstan.pipeline.score.scorer import EmbeddingScorer, Sample, SampleScorer, Scorer, Values
from capstan.pipeline.storage import Storage
from capstan.pipeline.units import Job, Piece, Summary, Unit, model_threads, report, run
from capstan.pipeline.units.by_halves import by_halves, model_errors

_BATCH: Final = 256  # rows sent together if no model follows
_NOT_FINITE: Final = "not_finite: the model gave no number"
_FREED: Final = "freed: keep_staged: false removed its image"


class ScoreJob(Job):
    """Job over staged units. `spec` holds a unit's table and tar, the ids of missing scorers, and its score files."""

    name = title = "score"

    def __init__(self, storage: Storage, scorers: Sequence[Scorer], batch: int, resources: Resources) -> None:
        self.storage, self.batch, self.resources = storage, batch, resources
        self.scorers = {scorer.id: scorer for scorer in scorers}

    def prepare(self, unit: Unit) -> Iterator[Piece]:
        wanted = [self.scorers[id_] for id_ in unit.spec["missing"]]
        own = [scorer for scorer in wanted if isinstance(scorer, SampleScorer)]
        readers = [scorer for scorer in wanted if isinstance(scorer, EmbeddingScorer)]
        for scorer in own:
            scorer.setup("cpu")
        table = self.storage.read_table(unit.spec["table"], ["caption", "reason"])
        captions = table["caption"].to_pylist()
        rows = [row for row, reason in enumerate(table["reason"].to_pylist()) if not reason]
        size = self.batch if readers else _BATCH
        piece = _Piece(own, readers)
        for row, jpeg, parts in self._files(unit, rows, piece):
            piece.add(row, captions[row], jpeg, parts)
            if piece.rows == size:
                yield piece.wire()
                piece = _Piece(own, readers)
        if piece.rows:
            yield piece.wire()

    def _files(
        self, unit: Unit, rows: list[int], piece: _Piece
    ) -> Iterator[tuple[int, bytes | None, dict[str, bytes] | None]]:
        """Yield (row, its JPEG, its parts) as far as they are needed; None for what is no longer there."""
        if not piece.needs_images and not piece.needs_parts:
            yield from ((row, None, {}) for row in rows)
            return
        packed = [(tar, table) for tar, table in unit.spec.get("packed", [])]
        found = samples(self.storage, unit.spec["table"], unit.spec["tar"], rows, packed, parts=piece.needs_parts)
        for row, stored in found:
            yield (row, None, None) if stored is None else (row, stored.jpeg, stored.parts)

    def commit(self, unit: Unit, pieces: list[Piece]) -> dict[str, Any]:
        keys = self.storage.read_table(unit.spec["table"], ["key"])["key"]
        files, failed = dict(unit.spec["have"]), set[int]()
        for id_ in unit.spec["missing"]:
            table, bad = _table(self.scorers[id_], keys, pieces)
            if id_ in unit.spec["before"] and _FREED in table["error"].unique().to_pylist():
                table = _with_former(table, self.storage.read_table(unit.spec["before"][id_]))
            files[id_] = store.file_name(id_, unit.spec["table"])
            self.storage.write_table(files[id_], table)
            failed |= bad
        return {"table": unit.spec["table"], "files": files, "scored": len(keys), "unscored": len(failed)}


class ModelScoreJob(ScoreJob):
    """ScoreJob with a model stage, for scorers that read embeddings."""

    def model(self) -> Callable[[Piece], Piece]:
        import torch

        threads = model_threads(self.resources)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        readers = [scorer for scorer in self.scorers.values() if isinstance(scorer, EmbeddingScorer)]
        clip_models = {
            id_: clip_model.load(device, threads)
            for id_, clip_model in {s.clip_model.id: s.clip_model for s in readers}.items()
        }
        for scorer in readers:
            scorer.setup(device)

        def apply(piece: Piece) -> Piece:
            seen = {
                id_: Batch(clip_models[id_], pixels, piece["captions"]) for id_, pixels in piece.pop("pixels").items()
            }
            for scorer in readers:
                if piece["seen"] and scorer.id in piece["readers"]:
                    found, errors = _read(scorer, seen[scorer.clip_model.id])
                    rows = piece["seen"]
                    piece["found"][scorer.id] = ([rows[place] for place in found[0]], found[1])
                    piece["errors"].setdefault(scorer.id, {}).update({rows[at]: why for at, why in errors.items()})
                    if errors:
                        report({"failed.model_error": len(errors)})
            return piece

        return apply


class Batch:
    """Pixels uint8 [batch, height, width, 3] and captions, embedded by a loaded CLIP (scorer.Embedded)."""

    def __init__(self, clip_model: Loaded, pixels: np.ndarray, captions: list[str]) -> None:
        self._clip_model, self._pixels, self._captions = clip_model, pixels, captions

    @functools.cached_property
    def raw_images(self) -> Any:
        return self._clip_model.images(self._pixels)

    @functools.cached_property
    def images(self) -> Any:
        return self._clip_model.normalize(self.raw_images)

    @functools.cached_property
    def texts(self) -> Any:
        return self._clip_model.normalize(self._clip_model.texts(self._captions))

    def __len__(self) -> int:
        return len(self._captions)

    def part(self, places: Sequence[int]) -> Batch:
        """Return a batch of these samples alone; the batch itself if these are all."""
        if len(places) == len(self):
            return self
        return Batch(self._clip_model, self._pixels[list(places)], [self._captions[place] for place in places])


Found = tuple[list[int], dict[str, Values]]  # rows, and column → their values


def _read(scorer: EmbeddingScorer, batch: Batch) -> tuple[Found, dict[int, str]]:
    """Return the scores of a batch by place; if the model raises on some samples, those of the others, and reasons."""
    parts, errors = by_halves(range(len(batch)), lambda places: scorer.score(batch.part(places)))
    columns: dict[str, Values] = {}
    for field in scorer.columns if parts else ():
        values = [part[field.name] for _, part in parts]
        arrays = all(isinstance(some, np.ndarray) for some in values)
        columns[field.name] = np.concatenate(values) if arrays else [value for some in values for value in some]
    return ([place for places, _ in parts for place in places], columns), model_errors(errors)


class _Piece:
    """A batch of rows that `prepare` collects, with the scores found so far."""

    def __init__(self, scorers: list[SampleScorer], readers: list[EmbeddingScorer]) -> None:
        self.rows = 0
        self.needs_images = bool(readers) or any(scorer.sees_images for scorer in scorers)
        self.needs_parts = any(scorer.sees_part for scorer in scorers)
        self._scorers, self._readers = scorers, [reader.id for reader in readers]
        self._clip_models: dict[str, ClipModel] = {reader.clip_model.id: reader.clip_model for reader in readers}
        self._found: dict[str, tuple[list[int], dict[str, list[Any]]]] = {
            s.id: ([], {field.name: [] for field in s.columns}) for s in scorers
        }
        self._pixels: dict[str, list[np.ndarray]] = {id_: [] for id_ in self._clip_models}
        self._seen, self._captions = list[int](), list[str]()  # of the rows whose pixels go to the CLIPs
        self._unreadable, self._errors = dict[int, str](), dict[str, dict[int, str]]()

    def add(self, row: int, caption: str, jpeg: bytes | None, parts: dict[str, bytes] | None) -> None:
        """Score one sample; `jpeg` is None if it is not needed, or no longer there, like `parts`."""
        self.rows += 1
        sample = Sample(caption)
        if self.needs_images:
            try:
                rgb = _decoded(jpeg)
                fitted = {id_: clip_model.prepare(rgb) for id_, clip_model in self._clip_models.items()}
            except Exception as error:  # noqa: BLE001 - the sample boundary: a broken image is a row with a reason
                self._unreadable[row] = _message(error)
            else:
                sample = Sample(caption, jpeg, rgb)
                self._seen.append(row)
                self._captions.append(caption)
                for id_, pixels in fitted.items():
                    self._pixels[id_].append(pixels)
        for scorer in self._scorers:
            if scorer.sees_part:
                self._score_part(scorer, row, caption, parts)
            elif not scorer.sees_images or sample.rgb is not None:
                self._score(scorer, row, sample)
        failed = {"failed.unreadable": 1} if row in self._unreadable else {}
        report({"samples": 1, "bytes": len(jpeg or b""), **failed})

    def _score_part(self, scorer: SampleScorer, row: int, caption: str, parts: dict[str, bytes] | None) -> None:
        if parts is not None and scorer.sees_part in parts:
            self._score(scorer, row, Sample(caption, part=parts[scorer.sees_part]))
        else:
            why = _FREED if parts is None else f"no_{scorer.sees_part}: the sample has no {scorer.sees_part}"
            self._errors.setdefault(scorer.id, {})[row] = why

    def _score(self, scorer: SampleScorer, row: int, sample: Sample) -> None:
        rows, columns = self._found[scorer.id]
        try:
            values = scorer.score([sample])
        except Exception as error:  # noqa: BLE001 - the sample boundary: a sample that a scorer rejects is a row with a reason
            self._errors.setdefault(scorer.id, {})[row] = _message(error)
            return
        rows.append(row)
        for name, column in columns.items():
            column.append(values[name][0])

    def wire(self) -> Piece:
        return {
            "readers": self._readers,
            "found": self._found,
            "unreadable": self._unreadable,
            "errors": self._errors,
            "seen": self._seen,
            "captions": self._captions,
            "pixels": {id_: np.stack(pixels) for id_, pixels in self._pixels.items() if pixels},
        }


def _decoded(jpeg: bytes | None) -> np.ndarray:
    """Decode a stored JPEG to uint8 RGB [height, width, 3]."""
    if jpeg is None:
        raise LookupError(_FREED)
    return simplejpeg.decode_jpeg(jpeg, "RGB")


def _message(error: Exception) -> str:
    """Return why a sample has no score, for people."""
    message = storable(" ".join(str(error).split()))
    return message if isinstance(error, LookupError) else f"{type(error).__name__}: {message}"


def _table(scorer: Scorer, keys: pa.ChunkedArray, pieces: Iterable[Piece]) -> tuple[pa.Table, set[int]]:
    """Return a scorer's table, and the rows that could not be scored."""
    schema, found = store.schema(scorer), {field.name: _Column(field.type, len(keys)) for field in scorer.columns}
    errors = [""] * len(keys)
    sees = not isinstance(scorer, SampleScorer) or scorer.sees_images
    for piece in pieces:
        for row, why in {**(piece["unreadable"] if sees else {}), **piece["errors"].get(scorer.id, {})}.items():
            errors[row] = why
        rows, values = piece["found"].get(scorer.id, ([], {}))
        for name, column in found.items() if rows else ():
            for row in column.put(rows, values[name]):
                errors[row] = _NOT_FINITE
    arrays = [keys, *(column.array() for column in found.values()), pa.array(errors, pa.string())]
    return pa.table(arrays, schema=schema), {row for row, why in enumerate(errors) if why}


def _with_former(table: pa.Table, former: pa.Table) -> pa.Table:
    """Take over the scores of rows whose image was freed since, from `former`, the scorer's previous table."""
    freed = pc.equal(table["error"], _FREED)
    old = former.take(pc.index_in(table["key"], former["key"].combine_chunks()))
    known = pc.fill_null(pc.and_(freed, pc.is_valid(old["key"])), False)
    columns = [table["key"], *(pc.if_else(known, old[name], table[name]) for name in table.column_names[1:])]
    return pa.table(columns, schema=table.schema)


class _Column:
    """One column, filled in any order; rows without a value are null."""

    def __init__(self, kind: pa.DataType, rows: int) -> None:
        self._kind, self._there = kind, np.zeros(rows, bool)
        self._values: np.ndarray = np.empty(rows, object)
        if pa.types.is_fixed_size_list(kind):
            self._values = np.zeros((rows, kind.list_size), kind.value_type.to_pandas_dtype())

    def put(self, rows: Sequence[int], values: Values) -> list[int]:
        """Store the rows' values; return the rows whose value is not a number, which stay null."""
        at = np.asarray(rows, np.int64)
        good: Any
        finite: Any
        if isinstance(values, np.ndarray) and values.dtype.kind == "f":
            good = finite = np.isfinite(values).reshape(len(rows), -1).all(axis=1)
        else:
            finite = np.array([not isinstance(value, float) or math.isfinite(value) for value in values], bool)
            good = finite & np.array([value is not None for value in values], bool)
        self._there[at[good]] = True
        if self._values.dtype == object:
            for row, value, is_good in zip(rows, values, good.tolist(), strict=True):
                if is_good:
                    self._values[row] = value
        else:
            self._values[at[good]] = np.asarray(values)[good]
        return at[~finite].tolist()

    def array(self) -> pa.Array:
        if self._values.dtype == object:
            return pa.array(self._values, self._kind, mask=~self._there)
        flat = pa.array(self._values.reshape(-1), self._kind.value_type)
        return pa.FixedSizeListArray.from_arrays(flat, type=self._kind, mask=pa.array(~self._there))


# Over a dataset ------------------------------------------------------------------------------------------------------


def score(
    recipe: Recipe,
    storage: Storage,
    scorers: Sequence[Scorer],
    units: Sequence[Staged],
    *,
    packed: Callable[[Staged], list[Packed]] | None = None,
    progress: bool = True,
) -> tuple[list[Staged], Summary]:
    """Score the units by all scorers that have not scored them yet; return them with their files, and a summary.

    `packed` returns the shards that hold a unit's images, for units whose tar was freed. Raises RecipeError for weights
    that cannot be loaded.
    """
    job = _job(recipe, storage, scorers)
    marks = job.markers.read() if scorers else {}
    work, redo = list[Unit](), list[str]()
    for unit in units if scorers else ():
        have = _files(marks.get(unit.unit, {}), unit)
        missing = [scorer.id for scorer in scorers if scorer.id not in have]
        spec: dict[str, Any] = {
            "rows": unit.rows,
            "table": unit.table,
            "tar": unit.tar,
            "missing": missing,
            "have": have,
            "before": _former(marks.get(unit.unit, {}), unit),
        }
        if missing and unit.freed and packed is not None:
            spec["packed"] = packed(unit)
        work.append(Unit(unit.unit, spec))
        redo += [unit.unit] if missing else []
    if redo:
        for scorer in scorers:
            record = json.dumps(scorer.identity, indent=1, sort_keys=True).encode()
            storage.write(f"{store.ROOT}/{scorer.id}/recipe.json", record)
    summary = run(job, work, recipe.resources, redo=redo, progress=progress) if redo else Summary(0, len(work), {}, {})
    now = {name for mark in job.markers.read().values() for name in mark["files"].values()} if redo else set[str]()
    storage.delete(*(name for unit in work for name in unit.spec["before"].values() if redo and name not in now))
    return scored(job, scorers, units), summary


def scored(job: ScoreJob, scorers: Sequence[Scorer], units: Sequence[Staged]) -> list[Staged]:
    """Return the units with the score files that they have, for the given scorers."""
    marks = job.markers.read() if scorers else {}
    found = []
    for unit in units:
        files = _files(marks.get(unit.unit, {}), unit)
        found.append(replace(unit, scores=tuple((s.name, files[s.id]) for s in scorers if s.id in files)))
    return found


def as_scored(recipe: Recipe, storage: Storage, scorers: Sequence[Scorer], units: Sequence[Staged]) -> list[Staged]:
    """Return the units as `score` does, without scoring. Raises RecipeError if a unit could be scored but was not."""
    job = _job(recipe, storage, scorers)
    found, bad = scored(job, scorers, units), job.markers.quarantined() if scorers else {}
    for scorer in scorers:
        if left := [u for u in found if scorer.name not in dict(u.scores) and u.unit not in bad]:
            problem = f"{sum(unit.rows for unit in left):,} rows have not been scored with these settings"
            raise RecipeError(_key(scorer), problem, "run `capstan score RECIPE` first (it fetches nothing)")
    return found


def _key(scorer: Scorer) -> str:
    """Return the key of the recipe that asks for a scorer."""
    own = {store.EMBEDDINGS: "score.clip.embeddings", store.DESCRIPTORS: "dedup.copies"}
    return own.get(scorer.name, f"score.{scorer.name}")


def _job(recipe: Recipe, storage: Storage, scorers: Sequence[Scorer]) -> ScoreJob:
    kind = ModelScoreJob if any(isinstance(scorer, EmbeddingScorer) for scorer in scorers) else ScoreJob
    return kind(storage, scorers, recipe.score.clip.batch if recipe.score.clip else 64, recipe.resources)


def _former(mark: Mapping[str, Any], unit: Staged) -> dict[str, str]:
    """Return scorer id → file, for files that scored an earlier staging of the unit."""
    return dict(mark.get("files", {})) if mark.get("table") != unit.table else {}


def _files(mark: Mapping[str, Any], unit: Staged) -> dict[str, str]:
    """Return scorer id → file, for files that scored the unit as it is staged now."""
    return dict(mark["files"]) if mark.get("table") == unit.table else {}
