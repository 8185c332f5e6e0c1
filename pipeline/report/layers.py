"""Caption layers of a dataset → lengths and flags of each, and examples next to the original caption

Layers belong to the floor above; here they are tables with the columns key, slot, text and flags (docs/formats.md).
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from capstan.pipeline.errors import DamagedFile
from capstan.pipeline.html import page
from capstan.pipeline.html.page import Cell, Html, percent
from capstan.pipeline.report.examples import Examples
from capstan.pipeline.report.query import Rows
from capstan.pipeline.storage import Storage

_LAYERS: Final = 8
_SHARDS: Final = 4  # of each layer, whose captions are counted
_EDITS: Final = "edits"  # instead of a shard, in a layer with corrections made in `capstan view`
_EXAMPLES: Final = 8
_TEXT: Final = 400  # characters of a caption
_FLAGS: Final = 5
_COLUMNS: Final = ["key", "slot", "text", "flags"]


@dataclass
class _Slot:
    """The captions of one slot that were counted."""

    words: list[int] = field(default_factory=list)
    empty: int = 0
    flags: Counter[str] = field(default_factory=Counter)

    def add(self, text: str, flags: list[str]) -> None:
        self.empty += not text
        if text:
            self.words.append(len(text.split()))
        self.flags.update(flags)


def layers(rows: Rows, examples: Examples, thumbs: Mapping[str, bytes]) -> list[Html]:
    """Return the blocks about all caption layers; [] if the dataset has none."""
    names = _names(rows.storage)
    shards = [entry.name for entry in rows.manifest.shards] if rows.manifest else []
    counted = [line for layer in names[:_LAYERS] for line in _lines(rows.storage, layer, shards)]
    if not counted:
        return []
    header = ["layer", "slot", "captions counted", "words, median", "words, 90% within", "empty", "most frequent flags"]
    about = f"Counted over the first {_SHARDS} shards of each layer."
    more = [page.note(f"And {len(names) - _LAYERS:,} more layers.")] if len(names) > _LAYERS else []
    blocks = [page.note(about), page.table(header, counted), *more]
    if shown := list(_examples(rows, names[:_LAYERS], examples, thumbs)):
        blocks.append(page.cards(shown))
    return blocks


def _names(storage: Storage) -> list[str]:
    """Return the layers that have a recipe, by name."""
    parts = (name.split("/") for name in storage.names("captions") if name.endswith("/recipe.json"))
    return sorted(found[1] for found in parts if len(found) == 3)


def _lines(storage: Storage, layer: str, shards: list[str]) -> Iterator[list[Any]]:
    """Yield a line of the table for each slot of a layer."""
    slots: dict[str, _Slot] = {}
    read = 0
    for shard in [*shards, _EDITS]:
        if read == _SHARDS:
            break
        captions = _read(storage, layer, shard)
        read += bool(captions)
        for one in captions:
            slots.setdefault(str(one["slot"]), _Slot()).add(one["text"], one["flags"])
    for name, slot in sorted(slots.items()):
        count = len(slot.words) + slot.empty
        spread = "–"
        if len(slot.words) > 1:
            cuts = statistics.quantiles(slot.words, n=20, method="inclusive")
            spread = f"{cuts[0]:.0f} – {cuts[-1]:.0f}"
        flags = ", ".join(f"{flag} {percent(n, count)}" for flag, n in slot.flags.most_common(_FLAGS))
        median = round(statistics.median(slot.words)) if slot.words else None
        yield [layer, name, count, median, Cell(page.user_text(spread)), percent(slot.empty, count), flags or "none"]


def _read(storage: Storage, layer: str, shard: str) -> list[dict[str, Any]]:
    """Return the captions of a shard; [] if it is not captioned yet, or its file is not a layer's."""
    try:
        table = storage.read_table(f"captions/{layer}/{shard}.parquet", _COLUMNS)
    except (FileNotFoundError, DamagedFile):  # `capstan verify` reports damage
        return []
    if set(table.column_names) != set(_COLUMNS):
        return []
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _examples(
    rows: Rows, names: list[str], examples: Examples, thumbs: Mapping[str, bytes]
) -> Iterator[tuple[bytes, dict[str, str]]]:
    """Yield kept images with the original caption and that of every layer and slot."""
    shown = [examples.rows[key] for key in examples.kept if key in thumbs and examples.rows[key].shard][:_EXAMPLES]
    read: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in shown:
        texts = {"original": page.clip(row.caption, _TEXT)}
        for layer in names:
            if (layer, row.shard) not in read:
                found = [_read(rows.storage, layer, name) for name in (row.shard, _EDITS)]
                read[layer, row.shard] = found[0] or found[1]
            for one in read[layer, row.shard]:
                if one["key"] == row.key:
                    flags = f" [{', '.join(one['flags'])}]" if one["flags"] else ""
                    texts[f"{layer}, {one['slot']}"] = page.clip(one["text"], _TEXT) + flags
        if len(texts) > 1:
            yield thumbs[row.key], texts
