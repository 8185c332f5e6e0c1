"""A dataset's caption layers, latents, text states and reviews → what is wrong with them

A file is expected if the job that makes it has committed its shard: layers and latents that are incomplete, since no
job has come that far, are no damage.
"""

from __future__ import annotations

from collections.abc import Iterator

from capstan.pipeline.dataset import tensor_file
from capstan.pipeline.dataset.shards import Manifest
from capstan.pipeline.errors import DamagedFile
from capstan.pipeline.prefetch import ahead
from capstan.pipeline.select.review import verify_reviews
from capstan.pipeline.storage import Storage
from capstan.pipeline.units import MarkerLog


def verify_derived(storage: Storage, manifest: Manifest) -> list[str]:
    """Return every problem of caption layers, latents and reviews, one line each that names the file."""
    captions, latents = storage.names("captions"), storage.names("latents")
    problems = [*_missing_captions(storage, manifest, captions), *_missing_latents(storage, manifest, latents)]
    files = [name for name in captions if name.endswith(".parquet")]
    files += [name for name in latents if name.endswith(".safetensors")]
    problems += [problem for problem in ahead(lambda name: _problem(storage, name), files) if problem is not None]
    return [*problems, *verify_reviews(storage)]


def _problem(storage: Storage, name: str) -> str | None:
    """Return what is wrong with one file."""
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
    for layer in layers:
        committed = MarkerLog(storage, f"recaption-{layer}").read()
        for shard in (entry.name for entry in manifest.shards if entry.name in committed):
            if (name := f"captions/{layer}/{shard}.parquet") not in names:
                yield f"{name}: missing: run `capstan recaption` to make it again"


def _missing_latents(storage: Storage, manifest: Manifest, names: list[str]) -> Iterator[str]:
    """Yield a line for every committed shard of an encoder whose latents or text states are gone."""
    encoders = sorted({name.split("/")[1] for name in names if name.count("/") == 2})
    for encoder in encoders:
        committed = MarkerLog(storage, f"latents-{encoder}").read()
        for entry in manifest.shards:
            name = f"latents/{encoder}/{entry.name}.safetensors"
            if f"{entry.name}-{entry.sha256[:12]}" in committed and name not in names:
                yield f"{name}: missing: run `capstan encode` to make it again"
