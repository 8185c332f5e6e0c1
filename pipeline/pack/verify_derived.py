"""A dataset's caption layers, latents, text states and reviews → what is wrong with them, and what is made again

A file is expected if the job that makes it has committed its shard: layers and latents that are incomplete, since no
job has come that far, are no damage. A file that a model made is repaired by forgetting it: it is removed together with
its marker, so that the next `capstan recaption` or `capstan encode` makes it again. What people wrote is only named.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any, Final

from capstan.pipeline.config import fingerprint
from capstan.pipeline.dataset import tensor_file
from capstan.pipeline.dataset.shards import Manifest
from capstan.pipeline.errors import DamagedFile
from capstan.pipeline.select.pairs import verify_pairs
from capstan.pipeline.select.review import verify_reviews
from capstan.pipeline.storage import Storage
from capstan.pipeline.units import MarkerLog

_RECAPTION: Final = "run `capstan recaption` to make it again"
_ENCODE: Final = "run `capstan encode` to make it again"
_ID: Final = re.compile(r"[0-9a-f]{16}")  # a layer or encoder that is named by the hash of its settings


def derived_files(storage: Storage) -> list[str]:
    """Return the files of captions, latents and text states that `file_problem` checks."""
    captions, latents = storage.names("captions"), storage.names("latents")
    tensors = [name for name in latents if name.endswith(".safetensors")]
    return [*(name for name in captions if name.endswith(".parquet")), *tensors]


def verify_derived(storage: Storage, manifest: Manifest, damaged: Iterable[str]) -> list[str]:
    """Return every problem of captions, latents, reviews and verdicts on pairs, one line each that names the file.

    `damaged` are the problems of `derived_files`.
    """
    captions, latents = storage.names("captions"), storage.names("latents")
    problems = [*_missing_captions(storage, manifest, captions), *_missing_latents(storage, manifest, latents)]
    problems += [*_caption_recipes(storage, captions), *_latent_recipes(storage, latents)]
    return [*problems, *damaged, *verify_reviews(storage), *verify_pairs(storage)]


def file_problem(storage: Storage, name: str) -> str | None:
    """Return what is wrong with one of `derived_files`."""
    try:
        if name.endswith(".parquet"):
            storage.read_table(name)
            return None
        with storage.open(name) as file:
            tensor_file.check_file(file, name)
    except DamagedFile as error:
        if name.endswith(".parquet"):
            hint = "restore it from a copy, or delete it and run `capstan recaption` (or captions import) again"
        else:
            hint = "delete it, and run `capstan encode` to make it again"
        return f"{name}: damaged ({error.problem}): {hint}"
    return None


def _missing_captions(storage: Storage, manifest: Manifest, names: list[str]) -> Iterator[str]:
    """Yield a line for every committed shard of a layer whose captions are gone."""
    layers = [name.split("/")[1] for name in names if name.count("/") == 2 and name.endswith("/recipe.json")]
    present = set(names)
    for layer in layers:
        committed = MarkerLog(storage, f"recaption-{layer}").read()
        for shard in (entry.name for entry in manifest.shards if entry.name in committed):
            if (name := f"captions/{layer}/{shard}.parquet") not in present:
                yield f"{name}: missing: {_RECAPTION}"


def _missing_latents(storage: Storage, manifest: Manifest, names: list[str]) -> Iterator[str]:
    """Yield a line for every committed shard of an encoder whose latents or text states are gone."""
    encoders, present = sorted({name.split("/")[1] for name in names if name.count("/") == 2}), set(names)
    for encoder in encoders:
        committed = MarkerLog(storage, f"latents-{encoder}").read()
        for entry in manifest.shards:
            name = f"latents/{encoder}/{entry.name}.safetensors"
            if f"{entry.name}-{entry.sha256[:12]}" in committed and name not in present:
                yield f"{name}: missing: {_ENCODE}"


def _caption_recipes(storage: Storage, names: list[str]) -> Iterator[str]:
    """Yield a line for every layer's recipe.json that is damaged; the id of a model's layer is a hash of it."""
    for name in names:
        if name.count("/") == 2 and name.endswith("/recipe.json"):
            recipe, layer = _json(storage, name), name.split("/")[1]
            engine, lint = (recipe.get(key) for key in ("engine", "lint"))
            sound = isinstance(recipe.get("number"), int) and isinstance(engine, dict)
            if sound and _ID.fullmatch(layer) and engine != {"engine": "given"}:
                sound = fingerprint({"engine": engine, "lint": lint}) == layer
            if not sound:
                yield f"{name}: damaged: restore it from a copy, or delete it and {_RECAPTION}"
            elif (base := recipe.get("over")) is not None and f"captions/{base}/recipe.json" not in names:
                yield f"{name}: lies over the layer {base}, which is missing: restore that layer from a copy"


def _latent_recipes(storage: Storage, names: list[str]) -> Iterator[str]:
    """Yield a line for every recipe.json of latents that is missing or damaged: their id is the hash of it."""
    for encoder in sorted({name.split("/")[1] for name in names if name.endswith(".safetensors")}):
        name = f"latents/{encoder}/recipe.json"
        if _ID.fullmatch(encoder) and name not in names:
            yield f"{name}: missing: {_ENCODE}"
        elif _ID.fullmatch(encoder) and fingerprint(_json(storage, name)) != encoder:
            yield f"{name}: damaged: {_ENCODE}"


def _json(storage: Storage, name: str) -> dict[str, Any]:
    """Return a JSON object; {} if the file holds none."""
    try:
        return storage.read_json(name, "")
    except DamagedFile:
        return {}


# Repair ----------------------------------------------------------------------------------------------------------


def forget_derived(storage: Storage, names: Iterable[str]) -> list[str]:
    """Forget those of the damaged or missing files `names` that a model made; return a line for each, with the command.

    Captions that people wrote, and reviews, are left as they are.
    """
    paths = [PurePosixPath(name) for name in sorted(names)]
    layers = {path.parts[1] for path in paths if path.parts[0] == "captions" and len(path.parts) > 2}
    of_models = {layer for layer in layers if _is_of_a_model(storage, layer)}
    lines = []
    for path in paths:
        if path.parts[0] == "captions" and len(path.parts) > 2 and path.parts[1] in of_models:
            _forget(storage, str(path), f"recaption-{path.parts[1]}", path.stem)
            lines.append(f"{path}: {_RECAPTION}")
        elif path.parts[0] == "latents" and path.suffix == ".safetensors":
            _forget(storage, str(path), f"latents-{path.parts[1]}", path.stem)
            lines.append(f"{path}: {_ENCODE}")
    return lines


def _forget(storage: Storage, name: str, job: str, shard: str) -> None:
    """Remove a file, and its shard's markers: `shard` for captions, `shard-<sum>` for latents."""
    markers = MarkerLog(storage, job)
    storage.delete(name)
    markers.forget(unit for unit in markers.read() if unit == shard or unit.startswith(f"{shard}-"))


def _is_of_a_model(storage: Storage, layer: str) -> bool:
    """Return whether a model wrote a layer: its job keeps markers. Layers that people wrote have no job."""
    return bool(MarkerLog(storage, f"recaption-{layer}").read())
