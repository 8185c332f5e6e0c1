"""A shard → a file of captions: the job that writes one caption layer

prepare   on CPU workers: JPEG, or frames of a clip → engine input, only for images without captions
model     on model workers: captions, lint rules, retries
commit    on the unit's CPU worker: one Parquet file per shard
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from capstan.pipeline import units
from capstan.pipeline.config import Resources
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import CapstanError
from capstan.recaption import generate, store
from capstan.recaption.config import RecaptionConfig
from capstan.recaption.engines import CaptionEngine, EngineInput, Request, size_of
from capstan.recaption.lint import linter
from capstan.recaption.planning.contents import Content, Image, images, lacking
from capstan.recaption.planning.existing import captioned, existing
from capstan.recaption.planning.frames import View
from capstan.recaption.store import Place, Row

log = logging.getLogger(__name__)

# Bounds of a piece sent to a model worker: as many whole batches as stay below both.
PIECE_BYTES: Final = 8 << 20
PIECE_BATCHES: Final = 8

Captions = dict[Content, dict[str, Row]]


class CaptionsFailed(CapstanError):
    """A run that kept what was captioned, while a large share of the captions failed or the engine stopped."""

    exit_code = 3


class RecaptionJob(units.Job):
    """The job that writes one caption layer. A unit is a shard."""

    def __init__(self, dataset: Dataset, engine: CaptionEngine, config: RecaptionConfig, resources: Resources) -> None:
        self.dataset, self.storage, self.engine = dataset, dataset.storage, engine
        self.config, self.slots, self.resources = config, tuple(config.slots), resources
        self.view = View(engine, config.frames)
        self.description = self.view.describe()
        self.layer = store.layer_id(self.description, config.lint)
        self.name = f"recaption-{self.layer}"

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"dataset": self.dataset.part()}  # a unit has the entry of its shard

    @property
    def stop_file(self) -> str:
        """The file that says why an engine stopped: shards that have not started are then left for the next run."""
        return f"state/recaption-stopped/{self.layer}.json"

    def prepare(self, unit: units.Unit) -> Iterator[units.Piece]:
        if why := self.stopped():
            raise CaptionsFailed(f"not captioned: {why}")
        shard, table, dataset = unit.spec["shard"], self._images(unit), self.dataset.part(unit.spec["entry"])
        reused, elsewhere = self._reused(unit), self._elsewhere(unit)
        missing = {image.content: lacking(self.slots, reused.get(image.content, {})) for image in table}
        first = {image.content: row for row, image in reversed(list(enumerate(table)))}
        rows = sorted(row for content, row in first.items() if missing[content] and content not in elsewhere)
        piece = _Piece()
        for row, (_, jpeg, parts) in zip(rows, self.view.samples(dataset, shard, rows), strict=True):
            try:
                engine_input = self.view.prepare(jpeg, parts)
            except Exception as error:  # noqa: BLE001 - sample boundary: a broken image becomes a flagged row
                log.warning("%s: cannot read image %s: %s", shard, table[row].content.sha256, error)
                slots = len(missing[table[row].content])
                units.report({"samples": slots, "failed.unreadable": slots})
                piece.broken.append(table[row].content)
            else:
                piece.add(table[row], missing[table[row].content], engine_input)
            if piece.is_full(self.config.batch):
                yield piece.wire()
                piece = _Piece()
        if piece.contents or piece.broken:
            yield piece.wire()

    def model(self) -> Callable[[units.Piece], units.Piece]:
        import torch

        torch.set_num_threads(units.model_threads(self.resources))

        def apply(piece: units.Piece) -> units.Piece:
            requests = [
                Request(content.sha256, slots, original)
                for content, slots, original in zip(piece["contents"], piece["slots"], piece["originals"], strict=True)
            ]
            rows = self.write(piece["inputs"], requests) if requests else []
            if why := getattr(self.engine, "stopped", ""):
                self.stop(why)
            units.report({"samples": sum(map(len, rows)), "retried": _retried(rows), **_failures(rows)})
            return {"rows": dict(zip(piece["contents"], rows, strict=True)), "broken": piece["broken"]}

        return apply

    def write(self, inputs: Sequence[EngineInput], requests: Sequence[Request]) -> list[dict[str, Row]]:
        """Return slot → row for each image."""
        return generate.write(self.engine, inputs, requests, self.config.lint, self.description.get("prompts", {}))

    def stopped(self) -> str:
        """Return why an engine of this run stopped; "" if none did."""
        names = self.storage.names("state/recaption-stopped")
        return str(json.loads(self.storage.read(self.stop_file))["reason"]) if self.stop_file in names else ""

    def stop(self, why: str) -> None:
        """Leave the shards that have not started for the next run."""
        if not self.stopped():
            self.storage.write(self.stop_file, json.dumps({"reason": why}).encode())

    def commit(self, unit: units.Unit, pieces: list[units.Piece]) -> dict[str, Any]:
        table, reused = self._images(unit), self._reused(unit)
        made = {content: rows for piece in pieces for content, rows in piece["rows"].items()}
        broken = {content for piece in pieces for content in piece["broken"]}
        unread = {content: dict.fromkeys(self.slots, Row.missing(linter.UNREADABLE)) for content in broken}
        captions = {
            content: unread.get(content, {}) | made.get(content, {}) | reused.get(content, {})
            for content in unread.keys() | made.keys() | reused.keys()
        }
        rows = [
            (Place(image.key, *image.content, slot), captions[image.content][slot].with_original(image.original))
            for image in table
            for slot in self.slots
            if slot in captions.get(image.content, {})
        ]
        waits = bool(self._elsewhere(unit))
        store.write_rows(self.storage, unit.spec["aside"] if waits else self._file(unit), rows)
        flags = Counter(flag for _, row in rows for flag in row.flags)
        return {
            # The shard's checksum: if it changes, the shard is captioned again.
            "source": "" if waits else unit.spec["source"],
            "images": len(table),
            "new": len(made),
            "reused": sum(not lacking(self.slots, reused.get(image.content, {})) for image in table),
            "retried": _retried(made.values()),
            "unreadable": len(broken),
            "failed": flags[linter.FAILED],
            **{f"flag_{flag}": count for flag, count in sorted(flags.items())},
        }

    def _file(self, unit: units.Unit) -> str:
        return store.file_name(self.layer, unit.spec["shard"])

    def _elsewhere(self, unit: units.Unit) -> set[Content]:
        """Return the unit's images that are captioned for another unit."""
        return existing(self.storage, *unit.spec["elsewhere"])[1] if unit.spec["elsewhere"] else set()

    def _images(self, unit: units.Unit) -> list[Image]:
        dataset = self.dataset.part(unit.spec["entry"])
        return images(dataset, unit.spec["shard"], self.view.reads)

    def _reused(self, unit: units.Unit) -> Captions:
        """Return content → slot → row of the captions that the unit's images already have."""
        reused: Captions = {}
        if not unit.spec["reuse"]:
            return reused
        for row in captioned(self.storage.read_table(unit.spec["reuse"])).to_pylist():
            del row["key"]
            content, slot = Content(row.pop("sha256"), row.pop("quoted")), row.pop("slot")
            lists = {name: tuple(row[name]) for name in ("flags", "discarded")}
            reused.setdefault(content, {})[slot] = Row(**{**row, **lists})
        return reused


def _retried(rows: Iterable[Mapping[str, Row]]) -> int:
    """Count the captions that took more than one attempt."""
    return sum(bool(row.discarded) for slots in rows for row in slots.values())


def _failures(rows: Iterable[Mapping[str, Row]]) -> dict[str, int]:
    """Count the captions that failed as `failed.<reason>`, for the display."""
    flags = (flag for slots in rows for row in slots.values() if linter.FAILED in row.flags for flag in row.flags)
    return Counter(f"failed.{flag}" for flag in flags if flag != linter.FAILED)


class _Piece:
    """A piece that `prepare` is filling."""

    def __init__(self) -> None:
        self.contents: list[Content] = []
        self.slots: list[tuple[str, ...]] = []  # to caption
        self.originals: list[str] = []
        self.inputs: list[EngineInput] = []
        self.broken: list[Content] = []
        self.bytes = 0

    def add(self, image: Image, slots: tuple[str, ...], engine_input: EngineInput) -> None:
        self.contents.append(image.content)
        self.slots.append(slots)
        self.originals.append(image.original)
        self.inputs.append(engine_input)
        self.bytes += size_of(engine_input)

    def is_full(self, batch: int) -> bool:
        count = len(self.contents)
        return count > 0 and count % batch == 0 and (count >= PIECE_BATCHES * batch or self.bytes >= PIECE_BYTES)

    def wire(self) -> units.Piece:
        return {name: value for name, value in vars(self).items() if name != "bytes"}
