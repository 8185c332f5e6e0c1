"""The caption store: layers of captions next to the shards

    captions/<layer id>/shard-000000.parquet    one row per image and slot, in the shard's order (SCHEMA)
    captions/<layer id>/recipe.json             the layer's settings; written last: without it a layer is not listed
    captions/<layer id>/aside/                  during a run: captions that are moving to another shard

Shards are never rewritten. A layer's id is a hash of everything that can change a caption: a new prompt makes a new
layer, and the same recipe always adds to the same one. All model output is kept, in `raw` and `discarded`.

Code that removes images from a dataset relies on one rule: every table below captions/ has a column `key`, and stays
valid when rows are removed.

A layer that people wrote may lie over another layer: `over` in its recipe.json. An image and slot that it lacks then
has the text of the layer below. One layer lies over another, never over a layer that lies over a third.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from capstan.pipeline.config import fingerprint
from capstan.pipeline.dataset.shards import Dataset, listed
from capstan.pipeline.errors import DamagedFile, RecipeError
from capstan.pipeline.records import make_key
from capstan.pipeline.storage import Storage
from capstan.recaption.lint import linter

ROOT: Final = "captions"
GIVEN: Final = "given"  # the engine name of layers that people wrote

_GIVEN_LINT: Final = linter.Settings(retries=0, language=None)
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # of a layer's folder
_STRINGS: Final = pa.list_(pa.field("item", pa.string(), nullable=False))
SCHEMA: Final = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),  # of the image's source bytes, as in the shard's table
        pa.field("slot", pa.string(), nullable=False),
        pa.field("quoted", pa.string(), nullable=False),  # `quote` of the original caption if the prompt quoted it
        pa.field("raw", pa.string(), nullable=False),  # the model's output; for `failed` rows also a server's message
        pa.field("text", pa.string(), nullable=False),  # cleaned, or the original (flag `original`); "": no caption
        pa.field("tokens", pa.int32(), nullable=False),
        pa.field("finish", pa.string(), nullable=False),  # linter.Finish
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("flags", _STRINGS, nullable=False),  # keys of linter.reasons(), or a failure's reason; sorted
        pa.field("discarded", _STRINGS, nullable=False),  # raw texts of the other attempts, in order
    ]
)

TEXT_COLUMNS: Final = ["key", "sha256", "slot", "text", "flags"]  # what readers of captions need


@dataclass(frozen=True)
class Row:
    """The caption of one image and slot, without its key."""

    raw: str
    text: str
    tokens: int
    finish: linter.Finish
    seed: int
    flags: tuple[str, ...]
    discarded: tuple[str, ...] = ()

    @classmethod
    def of_caption(cls, raw: str, tokens: int, finish: linter.Finish, seed: int, linted: linter.Linted) -> Row:
        """Return the row of a caption, whatever its flags."""
        return cls(raw, linted.text, tokens, finish, seed, linted.flags)

    @classmethod
    def missing(cls, *flags: str) -> Row:
        """Return the row for a missing caption: the image cannot be decoded, or the engine returned no caption."""
        return cls("", "", 0, "none", 0, tuple(sorted(flags)))

    @classmethod
    def failed(cls, raw: str, tokens: int, reason: str, message: str) -> Row:
        """Return the row of a failed caption; it keeps the partial output, else the server's message."""
        return cls(raw or message, "", tokens, "none", 0, tuple(sorted((linter.FAILED, reason))))

    def as_original(self) -> Row:
        """Return the row of a rejected caption, flagged to be replaced by the original."""
        return replace(self, flags=tuple(sorted({*self.flags, linter.ORIGINAL})))

    def with_original(self, original: str) -> Row:
        """Return the row with the text `original` if it is flagged to be replaced by the original."""
        return replace(self, text=original) if linter.ORIGINAL in self.flags else self


def layer_id(engine: Mapping[str, Any], settings: linter.Settings) -> str:
    """Return the id of the layer of an engine description and lint settings: 16 hexadecimal digits."""
    return fingerprint({"engine": dict(engine), "lint": _lint(settings)})


def _lint(settings: linter.Settings) -> dict[str, Any]:
    return {**linter.identity(), "settings": settings.model_dump(mode="json")}


def quote(original: str) -> str:
    """Return a hash of the caption that a prompt quoted: 32 hexadecimal digits."""
    return make_key(original)


def is_model(recipe: Mapping[str, Any]) -> bool:
    """Return whether a model wrote the layer of this recipe.json. Captions that people wrote never become stale."""
    return bool(recipe["engine"]["engine"] != GIVEN)


def file_name(layer: str, shard: str) -> str:
    """Return the name of the file with a shard's captions."""
    return f"{ROOT}/{layer}/{shard}.parquet"


def aside(layer: str) -> str:
    """Return the name of the folder for captions that are moving to another shard."""
    return f"{ROOT}/{layer}/aside"


# Reading -------------------------------------------------------------------------------------------------------------


def list_layers(storage: Storage) -> list[str]:
    """Return the ids of the dataset's published layers, oldest first."""
    recipes = [name for name in storage.names(ROOT) if name.count("/") == 2 and name.endswith("/recipe.json")]
    recipes = [name for name in recipes if _NAME.fullmatch(name.split("/")[1])]
    numbered = [(_read_recipe(storage, name)["number"], name.split("/")[1]) for name in recipes]
    return [layer for _, layer in sorted(numbered)]


def latest_layer(storage: Storage) -> str | None:
    """Return the layer that was published last, or None."""
    return next(reversed(list_layers(storage)), None)


def find_layer(storage: Storage, name: str) -> str:
    """Return the id of the layer `name`, which may be `latest`. Raises RecipeError if it does not exist."""
    layer = latest_layer(storage) if name == "latest" else name
    return str(layer_recipe(storage, layer or name)["layer"])


def layer_recipe(storage: Storage, layer: str) -> dict[str, Any]:
    """Return a layer's recipe.json: {layer, number, slots, lint, engine, over}; `over` only if it lies over a layer.

    Raises RecipeError if it does not exist.
    """
    name = f"{ROOT}/{layer}/recipe.json"
    if not _NAME.fullmatch(layer) or not storage.exists(name):
        known = ", ".join(list_layers(storage)) or "none"
        hint = f"run `capstan recaption`, or use one of its layers: {known}"
        raise RecipeError("layer", f"no caption layer {layer!r} in {storage.url}", hint)
    return _read_recipe(storage, name)


def _read_recipe(storage: Storage, name: str) -> dict[str, Any]:
    hint = f"restore it from a copy, or remove {name.rpartition('/')[0]} and write the layer again"
    recipe = storage.read_json(name, hint)
    if not isinstance(recipe.get("number"), int):
        raise DamagedFile(storage.path(name), "it has no number", hint)
    if recipe.get("layer") != name.split("/")[1]:
        raise DamagedFile(storage.path(name), "it names another layer than its folder", hint)
    return recipe


def read_rows(storage: Storage, layer: str, shard: str, columns: list[str] | None = None) -> pa.Table:
    """Return a shard's captions (SCHEMA). Raises FileNotFoundError if it has not been captioned yet."""
    return storage.read_table(file_name(layer, shard), columns)


def rows_of_shard(
    storage: Storage, layer: str, shard: str, images: pa.Table | None = None, columns: list[str] | None = None
) -> pa.Table:
    """Return the layer's rows (`columns`, by default `TEXT_COLUMNS`) of the images now in a shard.

    `images` is the shard's table, or its columns `key` and `sha256`. A caption belongs to one image: if its key now
    has another image, it is left out. A model's captions are in the file of the shard's name, which `capstan recaption`
    keeps up to date. Captions that people wrote stay in the file where they were written even if shards are repacked,
    so all of the layer's files are searched. If the layer lies over another, that one's rows follow, without those of
    an image and slot that the layer has itself.

    Raises FileNotFoundError if a model has not captioned the shard yet.
    """
    if images is None:
        with listed(storage.path(table := f"shards/{shard}.parquet")):
            images = storage.read_table(table, ["key", "sha256"])
    columns, recipe = columns or TEXT_COLUMNS, _published(storage, layer)
    own = _own_rows(storage, layer, recipe, shard, images, columns)
    if recipe is None or not (base := recipe.get("over")):
        return own
    below = _own_rows(storage, base, layer_recipe(storage, base), shard, images, columns)
    return pa.concat_tables([own, below.filter(pc.invert(pc.is_in(_places(below), _places(own).combine_chunks())))])


def _places(rows: pa.Table) -> pa.ChunkedArray:
    """Return image and slot of each row as one text."""
    return pc.binary_join_element_wise(rows["key"], rows["slot"], " ")


def _own_rows(
    storage: Storage, layer: str, recipe: Mapping[str, Any] | None, shard: str, images: pa.Table, columns: list[str]
) -> pa.Table:
    """Return the rows of a shard's images in the layer's own files."""
    name = file_name(layer, shard)
    if recipe is None or is_model(recipe):
        return _rows_of(images, storage.read_table(name, columns))
    names = storage.names(f"{ROOT}/{layer}")
    own = [_rows_of(images, storage.read_table(name, columns))] if name in names else []
    left = images["key"]
    if own:
        left = left.filter(pc.invert(pc.is_in(left, own[0]["key"].combine_chunks())))
    others = [other for other in names if other.endswith(".parquet") and other != name]
    if len(left) and others:
        # The bounds skip files of other keys: shards are sorted by key, and Parquet stores each column's range.
        bounds, key = pc.min_max(left), pc.field("key")
        wanted = (key >= bounds["min"]) & (key <= bounds["max"]) & key.isin(left.combine_chunks())
        own.append(_rows_of(images, storage.dataset(others, SCHEMA).to_table(columns, filter=wanted)))
    return pa.concat_tables(own) if own else SCHEMA.empty_table().select(columns)


def _rows_of(images: pa.Table, rows: pa.Table) -> pa.Table:
    """Return the rows whose key and sha256 are those of an image."""
    keys, sums = (images[name].combine_chunks() for name in ("key", "sha256"))
    return rows.filter(pc.equal(rows["sha256"], sums.take(pc.index_in(rows["key"].combine_chunks(), keys))))


def texts_of(rows: pa.Table) -> dict[str, dict[str, str]]:
    """Return key → slot → text. Slots without a caption of the layer's own are left out."""
    captions: dict[str, dict[str, str]] = {}
    columns = (rows[name].to_pylist() for name in ("key", "slot", "text", "flags"))
    for key, slot, text, flags in zip(*columns, strict=True):
        if text and linter.ORIGINAL not in flags:
            captions.setdefault(key, {}).setdefault(slot, text)
    return captions


def read_layer(storage: Storage, layer: str, shard: str, images: pa.Table | None = None) -> dict[str, dict[str, str]]:
    """Return key → slot → text of a shard's captions: `texts_of` its `rows_of_shard`."""
    return texts_of(rows_of_shard(storage, layer, shard, images))


def check_layer(storage: Storage, layer: str, shard: str, images: pa.Table) -> None:
    """Raise RecipeError unless a model's layer covers the shard's current `images` (key, sha256).

    A layer that people wrote may be partial; the model's layer below it may not.
    """
    if (model := model_layer(storage, layer)) is None:
        return
    if not storage.exists(file_name(model, shard)):
        problem = f"layer {model} has no captions for {shard}"
    elif pairs(read_rows(storage, model, shard, ["key", "sha256"])) == pairs(images):
        return
    else:
        problem = f"the captions of {shard} in layer {model} belong to an earlier version of that shard"
    hint = "run `capstan recaption` again; it captions only the images without captions"
    raise RecipeError("train.data.layer", problem, hint)


def empty_slots(storage: Storage, layer: str, slots: Iterable[str]) -> list[str]:
    """Return those of the slots for which the layer has no caption of its own at all.

    Reads the layer's files only until each slot has one: one file for a healthy layer.
    """
    left = {slot for slot in slots if slot != linter.ORIGINAL}
    base = (_published(storage, layer) or {}).get("over")
    for name in [name for one in (layer, base) if one for name in storage.names(f"{ROOT}/{one}")]:
        if not left:
            break
        if name.endswith(".parquet") and "/aside/" not in name:
            for texts in texts_of(storage.read_table(name, TEXT_COLUMNS)).values():
                left -= texts.keys()
    return sorted(left)


def pairs(table: pa.Table) -> set[tuple[str, str]]:
    """Return the (key, sha256) pairs of a table's rows."""
    return set(zip(table["key"].to_pylist(), table["sha256"].to_pylist(), strict=True))


def is_captioned(storage: Storage, layer: str, shard: str) -> bool:
    """Return whether the shard is captioned. A layer that people wrote may be partial, so it always is."""
    model = model_layer(storage, layer)
    return model is None or storage.exists(file_name(model, shard))


def model_layer(storage: Storage, layer: str) -> str | None:
    """Return the model's layer that must cover all images: `layer`, or the one it lies over; None if people wrote it.

    Raises RecipeError if the layer below does not exist.
    """
    recipe = _published(storage, layer)
    if recipe is None or is_model(recipe):
        return layer
    base: str = recipe.get("over", "")
    return base if base and is_model(layer_recipe(storage, base)) else None


def _published(storage: Storage, layer: str) -> dict[str, Any] | None:
    """Return a layer's recipe.json; None while a model is still writing the layer."""
    name = f"{ROOT}/{layer}/recipe.json"
    return _read_recipe(storage, name) if storage.exists(name) else None


# Writing -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """The image and slot of a row."""

    key: str
    sha256: str
    quoted: str
    slot: str


def write_rows(storage: Storage, name: str, rows: Iterable[tuple[Place, Row]]) -> None:
    """Publish captions as the file `name`. The same rows give the same bytes."""
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for place, row in rows:
        for column, value in (vars(place) | vars(row)).items():
            columns[column].append(value)
    storage.write_table(name, pa.table(columns, schema=SCHEMA))


def publish(
    storage: Storage,
    layer: str,
    slots: Iterable[str],
    engine: Mapping[str, Any],
    settings: linter.Settings,
    over: str = "",
) -> None:
    """Publish the layer: write its recipe.json, unless it exists."""
    if storage.exists(f"{ROOT}/{layer}/recipe.json"):
        return
    before = list_layers(storage)
    number = 1 + (layer_recipe(storage, before[-1])["number"] if before else 0)
    recipe = {
        "layer": layer,
        "number": number,  # layers are numbered in the order in which they were published
        "slots": list(slots),
        "lint": _lint(settings),
        "engine": dict(engine),
        **({"over": over} if over else {}),
    }
    storage.write(f"{ROOT}/{layer}/recipe.json", json.dumps(recipe, indent=1, sort_keys=True).encode() + b"\n")


def write_given_layer(
    storage: Storage, layer: str, captions: Mapping[str, Mapping[str, str]], over: str = ""
) -> dict[str, int]:
    """Write captions that people wrote, key → slot → text, as the layer `layer`, which may lie over another.

    Returns {images, missing}: the number of images that got captions, and of keys that are not in the dataset.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", layer):
        raise RecipeError("layer", f"{layer!r} is not a valid layer name", "use lower-case letters, digits, - and _")
    dataset = Dataset(storage)
    slots = sorted({slot for texts in captions.values() for slot in texts})
    images = 0
    for shard in dataset.shard_names:
        rows: list[tuple[Place, Row]] = []
        table = dataset.table(shard, ["key", "sha256"])
        for key, sha256 in zip(table["key"].to_pylist(), table["sha256"].to_pylist(), strict=True):
            texts = captions.get(key, {})
            images += bool(texts)
            for slot in (slot for slot in slots if slot in texts):
                rows.append((Place(key, sha256, "", slot), given_row(texts[slot], slot)))
        write_rows(storage, file_name(layer, shard), rows)
    publish_given(storage, layer, slots, over)
    own = {f"{ROOT}/{layer}/recipe.json", *(file_name(layer, shard) for shard in dataset.shard_names)}
    storage.delete(*(name for name in storage.names(f"{ROOT}/{layer}") if name not in own))  # of former shards
    return {"images": images, "missing": len(captions) - images}


def given_row(text: str, slot: str) -> Row:
    """Return the row of a text that a person wrote: unchanged, with the lint rules' flags."""
    return Row.of_caption(text, 0, "given", 0, linter.lint(text, "given", _GIVEN_LINT, slot=slot))


def publish_given(storage: Storage, layer: str, slots: Iterable[str], over: str = "") -> None:
    """Publish a layer that people wrote; over another layer it has that one's slots, too."""
    publish(storage, layer, slots_over(storage, slots, over), {"engine": GIVEN}, _GIVEN_LINT, over)


def slots_over(storage: Storage, slots: Iterable[str], over: str) -> list[str]:
    """Return the slots of a given layer with `slots`, over the layer `over` if that is not "".

    Raises RecipeError if a layer cannot lie over `over`.
    """
    below = layer_recipe(storage, over) if over else {"slots": []}
    if "over" in below:
        problem = f"layer {over} lies over layer {below['over']} itself"
        raise RecipeError("over", problem, f"use {below['over']}")
    return sorted({*slots, *below["slots"]})
