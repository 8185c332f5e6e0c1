"""Finished shards → index files for other tools

sizes.json, shards/sizes.json     samples per tar, for open_clip (which looks next to the tars) and datacomp's tools
wids.json                         webdataset's index of shards for random access
.nv-meta/                         Megatron-Energon's indexes (see energon.py)
croissant.json                    the dataset for catalogues, and for mlcroissant (see croissant.py)

Equal shards give equal files.
"""

from __future__ import annotations

import hashlib
import json

from capstan.pipeline.dataset import croissant, energon
from capstan.pipeline.dataset.shards import Manifest, sha256_of
from capstan.pipeline.storage import Storage
from capstan.pipeline.storage.local import scratch


def indexes(manifest: Manifest) -> dict[str, bytes]:
    """Return name → content of every index that the manifest alone determines."""
    sizes = json.dumps({f"{entry.name}.tar": entry.samples for entry in manifest.shards}, indent=1).encode()
    shards = [{"url": entry.tar, "nsamples": entry.samples, "filesize": entry.bytes} for entry in manifest.shards]
    wids = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": "capstan", "shardlist": shards}
    return {
        "sizes.json": sizes,
        "shards/sizes.json": sizes,
        "wids.json": json.dumps(wids, indent=1).encode(),
        **energon.metadata(manifest),
        **({croissant.NAME: croissant.croissant(manifest)} if manifest.shards else {}),
    }


def write_indexes(storage: Storage, manifest: Manifest) -> dict[str, str]:
    """Publish all indexes of the manifest's shards; return name → SHA-256.

    The index of samples by key only if the recipe asks for it: training does not need it, and one process has to write
    it, from every shard.
    """
    sums: dict[str, str] = {}
    if manifest.shards and manifest.recipe.get("shards", {}).get("random_access"):
        with scratch() as folder:
            path = folder / "index.sqlite"  # SQLite needs a disk; the finished file is uploaded to a bucket
            energon.write_sqlite(path, storage, manifest.shards)
            with path.open("rb") as file:
                sums[energon.INDEX] = hashlib.file_digest(file, "sha256").hexdigest()
            storage.put(path, energon.INDEX)
    for name, data in indexes(manifest).items():
        storage.write(name, data)
        sums[name] = sha256_of(data)
    return sums


def hide_indexes(storage: Storage) -> None:
    """Remove all indexes, Energon's first: readers that use them must not see shards that are being replaced."""
    for name in (*energon.NAMES, "shards/sizes.json", "sizes.json", "wids.json", croissant.NAME):
        storage.delete(name)
