"""Captions that people correct one by one → a layer over the layer that they correct

    captions/<layer>-edited/edits.parquet     one row per corrected image and slot, sorted by key and slot

Corrections are few, so this one file is read and replaced as a whole, under the lease of the layer.
"""

from __future__ import annotations

from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage import Storage
from capstan.recaption import store

SUFFIX: Final = "-edited"
MOST_CHARACTERS: Final = 10_000


def edited_layer(layer: str) -> str:
    """Return the name of the layer with corrections of `layer`."""
    return f"{layer}{SUFFIX}"


def edits_file(layer: str) -> str:
    """Return the file with the corrections of the layer that `edited_layer` names."""
    return f"{store.ROOT}/{layer}/edits.parquet"


def read_edits(storage: Storage, layer: str) -> pa.Table:
    """Return the corrections of `layer` (store.SCHEMA); none if there are none yet.

    Raises RecipeError if `layer` cannot be corrected: it does not exist, lies over another, or the name is taken.
    """
    store.slots_over(storage, [], layer)
    edited = edited_layer(layer)
    if edited in store.list_layers(storage) and store.layer_recipe(storage, edited).get("over") != layer:
        raise RecipeError("layer", f"layer {edited} exists and does not lie over {layer}", "remove or rename it")
    try:
        return storage.read_table(edits_file(edited))
    except FileNotFoundError:
        return store.SCHEMA.empty_table()


def write_edits(storage: Storage, layer: str, table: pa.Table) -> None:
    """Publish the corrections of `layer`, and the layer that holds them."""
    edited = edited_layer(layer)
    storage.write_table(edits_file(edited), table.cast(store.SCHEMA))
    store.publish_given(storage, edited, [], layer)


def changed(table: pa.Table, place: store.Place, text: str | None) -> pa.Table:
    """Return the corrections with another text of one image and slot; None takes its correction back.

    Raises RecipeError for a text that is empty or too long.
    """
    if text is not None and not text.strip():
        raise RecipeError("text", "is empty", "write a caption, or take the edit back")
    if text is not None and len(text) > MOST_CHARACTERS:
        raise RecipeError("text", f"has {len(text):,} characters", f"write at most {MOST_CHARACTERS:,}")
    same = pc.and_(pc.equal(table["key"], place.key), pc.equal(table["slot"], place.slot))
    others = table.filter(pc.invert(same)).cast(store.SCHEMA)
    if text is None:
        return others
    row = vars(place) | vars(store.given_row(text, place.slot))
    return pa.concat_tables([others, pa.Table.from_pylist([row], store.SCHEMA)]).sort_by(
        [("key", "ascending"), ("slot", "ascending")]
    )


def text_of(table: pa.Table, key: str, slot: str) -> str | None:
    """Return the corrected text of an image and slot, or None."""
    found = table.filter(pc.and_(pc.equal(table["key"], key), pc.equal(table["slot"], slot)))
    return str(found["text"][0].as_py()) if len(found) else None
