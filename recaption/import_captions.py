"""Captions that people wrote, a JSON Lines file → a layer of a dataset.

    {"image": "dogs/1.jpg", "short": "a dog", "descriptive": "a brown dog asleep on a red sofa."}

A line names its image by `key` (the sample's), `url` or `image`: an address as in the dataset's tables, or a file's
path, relative to the folder of the JSON Lines file. Its captions stand in fields of the slots' names, or in those that
`slots` names.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage import Storage
from capstan.recaption import store

SLOTS: Final = {"short": "short", "descriptive": "descriptive"}
NAMES: Final = ("key", "url", "image")  # fields that say which image a line is about
_SLOT: Final = re.compile("[a-z][a-z0-9_-]*")


def fields(asked: Sequence[str]) -> dict[str, str]:
    """`SLOT` or `SLOT=FIELD`, as on the command line → slot → field; none: `SLOTS`. Raises RecipeError."""
    found: dict[str, str] = {}
    for text in asked:
        slot, _, field = text.partition("=")
        if not _SLOT.fullmatch(slot) or slot == "original" or slot in found:
            hint = "name each slot once, as SLOT or SLOT=FIELD; `original` is the caption that came with the image"
            raise RecipeError("--slot", f"{text!r} names no slot", hint)
        found[slot] = field or slot
    return found or dict(SLOTS)


def write(storage: Storage, layer: str, file: Path, slots: Mapping[str, str] = SLOTS) -> dict[str, Any]:
    """The captions in `file` as the layer `layer`; `slots` gives the field of each slot.

    Gives {layer, slots, lines, images, missing}: images of the dataset that now have captions, and lines whose
    image is not in it. Raises RecipeError for a file that does not hold what it should, and for a layer that is there
    and holds something else.
    """
    texts = dict[str, dict[str, str]]()
    for number, name, found in _lines(file, slots):
        if texts.setdefault(name, found) is not found:
            problem = f"{file}:{number} names {name} again"
            raise RecipeError("FILE", problem, "give each image's captions on one line")
    _refuse_other(storage, layer, {slot for found in texts.values() for slot in found})
    captions, used = dict[str, dict[str, str]](), set[str]()
    dataset = Dataset(storage)
    for shard in dataset.shard_names:
        for row in dataset.table(shard, ["key", "url"]).to_pylist():
            for name in {row["key"], row["url"]} & texts.keys():
                captions[row["key"]] = texts[name]
                used.add(name)
    if not used:
        hint = "name images by key, or by address or path as in the column url of the dataset's tables"
        example = f" (its first is {next(iter(texts))})" if texts else ""
        raise RecipeError("FILE", f"{file} names no image of {storage.url}{example}", hint)
    images = store.write_given_layer(storage, layer, captions)["images"]
    chosen = sorted({slot for found in captions.values() for slot in found})
    return {"layer": layer, "slots": chosen, "lines": len(texts), "images": images, "missing": len(texts) - len(used)}


def _lines(file: Path, slots: Mapping[str, str]) -> Iterator[tuple[int, str, dict[str, str]]]:
    """(line number, what its image is known by, slot → text) of every line that is not blank."""
    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError("FILE", f"cannot read {file} ({error})", "name a JSON Lines file in UTF-8") from None
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise RecipeError("FILE", f"{file}:{number} is no JSON object", "write one object a line")
        names = [record[field] for field in NAMES if field in record]
        if len(names) != 1 or not isinstance(names[0], str):
            hint = f"give exactly one of {', '.join(NAMES)}, as text"
            raise RecipeError("FILE", f"{file}:{number} does not say which image it is about", hint)
        texts = {slot: record[field] for slot, field in slots.items() if record.get(field) is not None}
        if not texts or not all(isinstance(text, str) for text in texts.values()):
            hint = "or name the fields that do, e.g. --slot descriptive=caption"
            raise RecipeError("FILE", f"{file}:{number} holds no text in {', '.join(slots.values())}", hint)
        yield number, names[0] if "key" in record else _address(names[0], file), texts


def _address(name: str, file: Path) -> str:
    """An address as the dataset's tables have it: of a local file its absolute path."""
    return name if "://" in name else posixpath.normpath(file.absolute().parent / name)


def _refuse_other(storage: Storage, layer: str, slots: set[str]) -> None:
    """Raise RecipeError where `layer` is a model's, or has other slots: it is not to change under those who use it."""
    if layer not in store.list_layers(storage):
        return
    recipe = store.layer_recipe(storage, layer)
    if store.is_model(recipe) or set(recipe["slots"]) != slots:
        problem = f"{layer} is there, and " + ("a model wrote it" if store.is_model(recipe) else "has other slots")
        raise RecipeError("LAYER", problem, "choose another name")
