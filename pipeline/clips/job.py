"""Planned videos → shards of clips and tables of the ledger: fetch, cut, pack

shards/clips-<unit>.tar        KEY.jpg KEY.mp4 [KEY.flac] KEY.json KEY.txt of each clip; none if there is no clip
ledger/videos-<unit>.parquet   LEDGER_OF_VIDEOS, one row per planned row, in the same order
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import pyarrow as pa

from capstan.pipeline.clips.clip import Clip, CutFile, cut_file
from capstan.pipeline.config import Recipe, fingerprint
from capstan.pipeline.dataset.shards import Sample, sha256_of, write_samples
from capstan.pipeline.fetch.host_limits import HostLimits
from capstan.pipeline.image.decode import Failure
from capstan.pipeline.ingest.guarded import Decoder, guarded
from capstan.pipeline.ingest.row_bytes import read_rows
from capstan.pipeline.records import FAILED, KEPT, REJECTED, REMOVED, make_key, storable
from capstan.pipeline.secrets import public_text, public_url
from capstan.pipeline.source.blocklist import blocked
from capstan.pipeline.source.planning.batches import PlannedUnit
from capstan.pipeline.storage import Storage, parquet_bytes
from capstan.pipeline.storage.local import scratch
from capstan.pipeline.units import Job, Piece, Unit, report

_VERSION: Final = 2  # rises if clips of the same video and settings get other bytes
_LONGEST_DETAIL: Final = 1000  # characters
_BODIES: Final = 1 << 30  # bytes of source files that a worker may have in memory at once
_SPEED: Final = 0.5  # seconds that a second of video may take, before its worker is ended
_PATIENCE_S: Final = 120.0  # and of any file

# What the headers of the source file say: see `media.MediaFacts`. `clips` counts the clips that were made of it.
_FACTS: Final = {
    "container": pa.string(),
    "codec": pa.string(),
    "width": pa.int32(),
    "height": pa.int32(),
    "fps": pa.float64(),
    "frames": pa.int64(),
    "seconds": pa.float64(),
    "sound_codec": pa.string(),
    "sample_rate": pa.int32(),
    "channels": pa.int32(),
}
LEDGER_OF_VIDEOS: Final = pa.schema(
    [
        pa.field(name, kind, nullable=False)
        for name, kind in {
            **dict.fromkeys(("key", "url", "caption", "outcome", "reason", "detail"), pa.string()),
            "bytes": pa.int64(),
            "sha256": pa.string(),
            **_FACTS,
            "clips": pa.int32(),
            **dict.fromkeys(("extra", "unit", "shard"), pa.string()),
        }.items()
    ]
)


def shard_of(unit: str) -> str:
    """Return the name of the tar with a unit's clips."""
    return f"shards/clips-{unit}.tar"


def ledger_of(unit: str) -> str:
    """Return the name of the table with a unit's source videos."""
    return f"ledger/videos-{unit}.parquet"


class CutVideos(Job):
    """The job that cuts the videos of a unit. What decides the clips' bytes is hashed in its name."""

    title = "cut"

    def __init__(self, recipe: Recipe, storage: Storage, resolve: Mapping[str, str] | None = None) -> None:
        cut = recipe.cut
        most = max(1, min(recipe.fetch.concurrency, _BODIES // cut.max_bytes))
        fetch = recipe.fetch.model_copy(update={"max_bytes": cut.max_bytes, "concurrency": most})
        self.recipe, self.storage = recipe.model_copy(update={"fetch": fetch}), storage
        self.resolve = dict(resolve or {})
        self.name = f"cut-{fingerprint([_VERSION, cut.model_dump(mode='json'), recipe.image.quality])}"

    @staticmethod
    def units(planned: Iterable[PlannedUnit]) -> list[Unit]:
        """Return the units of the plan."""
        return [Unit(unit.id, {"table": unit.table, "rows": unit.rows}) for unit in planned]

    def shared(self) -> HostLimits:
        """Return what workers have to know together of the hosts."""
        return HostLimits(self.recipe.fetch.per_host)

    def decoder(self) -> Decoder:
        """Return the function that cuts one file; pickled for a child process in a unit's retries."""
        return functools.partial(cut_file, cut=self.recipe.cut, quality=self.recipe.image.quality)

    def prepare(self, unit: Unit) -> Iterator[Piece]:
        """Yield one piece: the content of the unit's marker."""
        rows = self.storage.read_table(unit.spec["table"]).to_pylist()
        deadline = _PATIENCE_S + _SPEED * self.recipe.cut.max_seconds
        with scratch() as folder, _Spool(folder) as spool:
            with guarded(self.decoder(), is_retry=unit.is_retry, seconds=deadline) as decoder:
                outcomes = self._outcomes(rows, decoder, spool)
            tar, digest = folder / "clips.tar", hashlib.sha256()
            samples = spool.samples(rows, outcomes, self.recipe.cut.fps)
            clips = len(write_samples(tar, samples, digest))
            size = tar.stat().st_size
            if clips:
                self.storage.put(tar, shard_of(unit.id))
        table = parquet_bytes(_ledger(rows, outcomes, unit.id))
        self.storage.write(ledger_of(unit.id), table)
        failed = Counter(f"failed.{outcome['reason']}" for outcome in outcomes if outcome["outcome"] == FAILED)
        seconds = sum(clip.frames for index in range(len(rows)) for clip in spool.clips(index)) / self.recipe.cut.fps
        shard = {"shard": {"samples": clips, "bytes": size, "sha256": digest.hexdigest()}} if clips else {}
        yield {"rows": len(rows), "clips": clips, "clip_seconds": seconds, "ledger": sha256_of(table), **failed} | shard

    def commit(self, unit: Unit, pieces: list[Piece]) -> dict[str, Any]:
        (marker,) = pieces
        return marker

    def _outcomes(self, rows: list[dict[str, Any]], decoder: Decoder, spool: _Spool) -> list[dict[str, Any]]:
        """Return the outcome of each row; its clips go to the spool as they are made."""
        outcomes: list[dict[str, Any]] = [{}] * len(rows)
        unwanted = blocked(self.recipe, self.storage)
        for index, data in read_rows(rows, self.recipe, self.resolve):
            result = decoder(data) if isinstance(data, bytes) else data
            if isinstance(result, CutFile) and result.sha256 in unwanted.sha256:
                result = Failure(REMOVED)
            if isinstance(result, CutFile):
                spool.add(index, result.clips)
            outcomes[index] = _outcome(result)
            failed = {f"failed.{outcomes[index]['reason']}": 1} if outcomes[index]["outcome"] == FAILED else {}
            report({"samples": 1, "bytes": outcomes[index]["bytes"], **failed})
        assert all(outcomes), "a row has no outcome"
        return outcomes


@dataclass(frozen=True)
class _Spooled:
    """A clip on the local disk: (offset, size) of each of its files, and the clip without them."""

    clip: Clip
    spans: dict[str, tuple[int, int]]


class _Spool:
    """Clips on the local disk, written as their videos arrive and readable in the order of the rows."""

    def __init__(self, folder: Path) -> None:
        self._path, self._rows = folder / "clips", dict[int, list[_Spooled]]()
        self._file: BinaryIO

    def __enter__(self) -> _Spool:
        self._file = self._path.open("w+b")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, index: int, clips: list[Clip]) -> None:
        """Add the clips of a row."""
        self._rows[index] = []
        for clip in clips:
            spans = {}
            for name, data in (("jpg", clip.jpg), ("mp4", clip.mp4), ("flac", clip.flac)):
                if data:
                    spans[name] = (self._file.tell(), len(data))
                    self._file.write(data)
            clip.jpg = clip.mp4 = clip.flac = b""
            self._rows[index].append(_Spooled(clip, spans))

    def clips(self, index: int) -> list[Clip]:
        """Return the clips of a row without their files."""
        return [spooled.clip for spooled in self._rows.get(index, [])]

    def samples(self, rows: list[dict[str, Any]], outcomes: list[dict[str, Any]], fps: int) -> Iterator[Sample]:
        """Yield the clips as samples, in the order of the rows and of their time."""
        for index in sorted(self._rows):
            for spooled in self._rows[index]:
                files = {name: self._read(*span) for name, span in spooled.spans.items()}
                fields = clip_fields(rows[index], outcomes[index], spooled.clip, spooled.spans, fps)
                yield Sample(fields["key"], files.pop("jpg"), fields, rows[index]["caption"], files)

    def _read(self, offset: int, size: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(size)


def clip_fields(
    row: Mapping[str, Any], outcome: Mapping[str, Any], clip: Clip, parts: Mapping[str, Any], fps: int
) -> dict[str, Any]:
    """Return the content of a clip's KEY.json: the same keys for every clip, and no nulls."""
    url = public_url(row["url"])
    return {
        "key": make_key("clip", row["key"], f"{clip.start}+{clip.frames}@{fps}"),
        "url": url,
        "caption": row["caption"],
        "width": clip.width,
        "height": clip.height,
        "original_width": outcome["width"],
        "original_height": outcome["height"],
        "sha256": outcome["sha256"],
        "parent": row["key"],
        "fps": float(fps),
        "frames": clip.frames,
        "start_s": clip.start / fps,
        "end_s": (clip.start + clip.frames) / fps,
        "codec": "h264" if "mp4" in parts else "none",
        "sample_rate": clip.sample_rate,
        "channels": clip.channels,
        "extra": row["extra"],
    }


def _outcome(result: CutFile | Failure) -> dict[str, Any]:
    """Return the columns of the ledger that a file's result decides."""
    if isinstance(result, CutFile):
        facts = {name: getattr(result.facts, name) for name in _FACTS}
        done = {"outcome": KEPT, "reason": "", "detail": "", "clips": len(result.clips)}
        return done | {"bytes": result.bytes, "sha256": result.sha256} | facts
    nothing = {name: "" if kind == pa.string() else 0 for name, kind in _FACTS.items()}
    detail = storable(public_text(result.detail))[:_LONGEST_DETAIL]
    outcome = REJECTED if result.reason == REMOVED else FAILED
    return {
        "outcome": outcome,
        "reason": result.reason,
        "detail": detail,
        "clips": 0,
        "bytes": 0,
        "sha256": "",
    } | nothing


def _ledger(rows: list[dict[str, Any]], outcomes: list[dict[str, Any]], unit: str) -> pa.Table:
    records = [
        {
            **{name: row[name] for name in ("key", "caption", "extra")},
            "url": public_url(row["url"]),
            **outcome,
            "unit": unit,
            "shard": shard_of(unit).partition("/")[2].removesuffix(".tar") if outcome["clips"] else "",
        }
        for row, outcome in zip(rows, outcomes, strict=True)
    ]
    return pa.Table.from_pylist(records, schema=LEDGER_OF_VIDEOS)


def failed_ledger(storage: Storage, unit: PlannedUnit, reason: str) -> bytes:
    """Return the table of a unit that was quarantined: every row failed."""
    rows = storage.read_table(unit.table).to_pylist()
    failure = Failure("read_error", f"its unit was quarantined: {reason}")
    table = _ledger(rows, [_outcome(failure)] * len(rows), unit.id)
    return parquet_bytes(table.replace_schema_metadata({"json": json.dumps({"quarantined": True})}))
