"""A JSON Lines file of captions that people wrote → a caption layer

    {"image": "dogs/1.jpg", "short": "a dog", "descriptive": "a brown dog asleep on a red sofa."}

A line names its image by `key` (the sample's key), `url` or `image`. The latter two are a URL as in the dataset's
tables, or a file path relative to the folder of the JSON Lines file. Captions are in fields named after the slots, or
in the fields that `slots` names.
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
from capstan.pipeline.lease import lease
from capstan.pipeline.secrets import public_url
from capstan.pipeline.storage import Storage
from capstan.pipeline.text.regular_file import regular
from capstan.recaption import store
from capstan.recaption.edits import edits_file

SLOTS: Final = {"short": "short", "descriptive": "descriptive"}
NAMES: Final = ("key", "url", "image")  # fields that name a line's image
_SLOT: Final = re.compile("[a-z][a-z0-9_-]*")


def fields(options: Sequence[str]) -> dict[str, str]:
    """Parse options `SLOT` or `SLOT=FIELD` into slot → field; without any, return `SLOTS`. Raises RecipeError."""
    parsed: dict[str, str] = {}
    for text in options:
        slot, _, field = text.partition("=")
        if not _SLOT.fullmatch(slot) or slot == "original" or slot in parsed:
            hint = "use SLOT or SLOT=FIELD, each slot once; `original` is reserved for the image's own caption"
            raise RecipeError("--slot", f"{text!r} is not a valid slot", hint)
        parsed[slot] = field or slot
    return parsed or dict(SLOTS)


def write(
    storage: Storage, layer: str, file: Path, slots: Mapping[str, str] = SLOTS, over: str | None = None
) -> dict[str, Any]:
    """Write the captions in `file` as the layer `layer`; `slots` maps each slot to its field.

    With `over`, the layer lies over that one: what the file does not name keeps its text.

    Returns {layer, slots, lines, images, missing}: `images` of the dataset now have captions, `missing` lines name an
    image that is not in it. Raises RecipeError for a malformed file, and for an existing layer with other content.
    """
    texts = dict[str, dict[str, str]]()
    for number, name, captions_of in _lines(file, slots):
        if texts.setdefault(name, captions_of) is not captions_of:
            problem = f"{file}:{number} repeats the image {name}"
            raise RecipeError("FILE", problem, "put all captions of an image on one line")
    below = store.find_layer(storage, over) if over is not None else ""
    _refuse_other(storage, layer, {slot for captions_of in texts.values() for slot in captions_of}, below)
    captions, used = dict[str, dict[str, str]](), set[str]()
    dataset = Dataset(storage)
    named = dict[str, list[str]]()
    for name in texts:  # the tables' URLs are without credentials
        named.setdefault(public_url(name), []).append(name)
    for shard in dataset.shard_names:
        for row in dataset.table(shard, ["key", "url"]).to_pylist():
            for name in named.get(row["key"], []) + named.get(row["url"], []):
                captions[row["key"]] = texts[name]
                used.add(name)
    if not used:
        hint = "name images by key, or by URL or path as in the column url of the dataset's tables"
        example = f" (the first is {next(iter(texts))})" if texts else ""
        raise RecipeError("FILE", f"none of the images in {file} is in {storage.url}{example}", hint)
    with lease(storage, "captions import", f"captions/{layer}"):
        images = store.write_given_layer(storage, layer, captions, below)["images"]
    chosen = sorted({slot for captions_of in captions.values() for slot in captions_of})
    return {"layer": layer, "slots": chosen, "lines": len(texts), "images": images, "missing": len(texts) - len(used)}


def _lines(file: Path, slots: Mapping[str, str]) -> Iterator[tuple[int, str, dict[str, str]]]:
    """Yield (line number, key or URL of its image, slot → text) of every non-blank line."""
    try:
        content = Path(regular(file, or_pipe=True)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError("FILE", f"cannot read {file} ({error})", "use a JSON Lines file in UTF-8") from None
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise RecipeError("FILE", f"{file}:{number} is not a JSON object", "write one object per line")
        names = [record[field] for field in NAMES if field in record]
        if len(names) != 1 or not isinstance(names[0], str):
            hint = f"set exactly one of {', '.join(NAMES)}, as text"
            raise RecipeError("FILE", f"{file}:{number} does not name its image", hint)
        texts = {slot: record[field] for slot, field in slots.items() if record.get(field) is not None}
        if not texts or not all(isinstance(text, str) for text in texts.values()):
            hint = "name the fields that hold text, e.g. --slot descriptive=caption"
            raise RecipeError("FILE", f"{file}:{number} has no text in {', '.join(slots.values())}", hint)
        yield number, names[0] if "key" in record else _url(names[0], file), texts


def _url(name: str, file: Path) -> str:
    """Return the URL as in the dataset's tables: for a local file its absolute path."""
    return name if "://" in name else posixpath.normpath(file.absolute().parent / name)


def _refuse_other(storage: Storage, layer: str, slots: set[str], over: str) -> None:
    """Raise RecipeError if `layer` exists and is of another kind or has other slots: its users rely on it."""
    slots = set(store.slots_over(storage, slots, over))
    if layer not in store.list_layers(storage):
        return
    recipe, why = store.layer_recipe(storage, layer), ""
    if store.is_model(recipe):
        why = "was generated by a model"
    elif storage.exists(edits_file(layer)):
        why = "holds edits made in `capstan view`"
    elif recipe.get("over", "") != over:
        why = f"lies over layer {recipe['over']}" if "over" in recipe else "lies over no layer"
    elif set(recipe["slots"]) != slots:
        why = "has other slots"
    if why:
        raise RecipeError("LAYER", f"layer {layer} already exists and {why}", "choose another name")
