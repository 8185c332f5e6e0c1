"""A small dataset with everything that is made of one, for takedowns."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save

from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.shards import Dataset, sha256_of
from capstan.pipeline.pack.scrub import scrub_derived
from capstan.pipeline.storage import Storage

ROWS = 24
Draw = Callable[[int], bytes]


def row(draw: Draw, number: int) -> dict[str, Any]:
    """Row 20 holds the same file as row 3; hosts differ by the row's number."""
    image = draw(3 if number == 20 else number)
    url = f"https://host{number % 4}.example{number % 2}.org/secret-{number:02}.jpg"
    caption = f"words-{number:02} of a person"
    return {"image": image, "url": url, "caption": caption, "photographer": f"name-{number:02}"}


def recipe_for(folder: Path, **sections: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "dataset": str(folder / "dataset"),
            "source": {"path": str(folder / "rows.parquet"), "image": "image"},
            "image": {"size": 64, "min_size": 8},
            "dedup": {"perceptual": None},
            "shards": {"samples": 4},
            "unit": {"rows": 7},
            **sections,
        }
    )


def layers(storage: Storage) -> None:
    """A caption layer and latents of every shard, as the floors above write them."""
    dataset = Dataset(storage)
    for entry in dataset.manifest.shards:
        table = dataset.table(entry.name, ["key", "caption"])
        captions = pa.table({"key": table["key"], "text": table["caption"]})
        storage.write_table(f"captions/mine/{entry.name}.parquet", captions)
        numbers = np.array([int(key[:4], 16) for key in table["key"].to_pylist()], np.float16).reshape(-1, 1, 1, 1)
        data = save({"latents": numbers}, metadata={"shard_sha256": entry.sha256})
        storage.write(f"latents/enc/{entry.name}.safetensors", data)


def storage_of(folder: Path) -> Storage:
    return Storage(str(folder / "dataset"))


def listed(folder: Path, *entries: str) -> str:
    path = folder / "list.txt"
    path.write_text("# what is asked for\n\n" + "\n".join(entries) + "\n")
    return str(path)


def everything(storage: Storage) -> bytes:
    """All bytes of all files, and every cell of every table as text."""
    parts = []
    for name in storage.names():
        data = storage.read(name)
        parts.append(data)
        if name.endswith(".parquet"):
            for column in pq.read_table(io.BytesIO(data)).columns:
                parts += [v if isinstance(v, bytes) else str(v).encode() for v in column.to_pylist() if v is not None]
    return b"\n".join(parts)


def ledger(storage: Storage) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in Dataset(storage).ledger().to_pylist()}


def key_of(storage: Storage, number: int) -> str:
    (key,) = [key for key, row in ledger(storage).items() if row["url"].endswith(f"secret-{number:02}.jpg")]
    return key


def gone(storage: Storage, number: int, jpeg: bytes) -> bool:
    held = everything(storage)
    words = [f"{what}-{number:02}".encode() for what in ("secret", "words", "name")]
    return not any(trace in held for trace in (*words, jpeg[200:-2]))


def stored(storage: Storage, number: int) -> bytes:
    """The image as it lies in the shards."""
    key, dataset = key_of(storage, number), Dataset(storage)
    return dict(dataset.read_images(ledger(storage)[key]["shard"]))[key]


def tars(storage: Storage) -> dict[str, str]:
    return {name: sha256_of(storage.read(name)) for name in storage.names("shards") if name.endswith(".tar")}


def contents(storage: Storage) -> dict[str, bytes]:
    """All files but those with dates in them."""
    dated = ("removed/log.jsonl", "state/runs.jsonl")
    return {name: storage.read(name) for name in storage.names() if name not in dated}


def scrub(storage: Storage, *keys: str) -> None:
    """Remove these rows, which no shard holds, from what people said of them."""
    rows = pa.table({"key": list(keys), "shard": [""] * len(keys)})
    storage.write_table("pending.parquet", rows)
    scrub_derived(storage, "pending.parquet", rows, [], progress=False)
