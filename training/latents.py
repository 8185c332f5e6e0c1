"""A dataset and an autoencoder → the latents of all its pictures, encoded once, shard by shard through the unit map.

    latents/<encoder id>/recipe.json                    which autoencoder, and the pictures' size
    latents/<encoder id>/shard-000000.safetensors       `latents` float16 [samples, 2 C, h, w], in tar order

The first C channels are the posterior's mean, the last C its standard deviation, before `scaling_factor`: so that a
step may still draw from it. The encoder id is a hash of all that can change a latent. Training reads the files by mmap.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import numpy as np

from pipeline import units
from pipeline.config import Recipe, Resources, fingerprint
from pipeline.errors import Quarantined, RecipeError
from pipeline.shards import Dataset, ShardEntry, read_manifest
from pipeline.storage import Storage
from training.autoencoder.family import factor_of, load_autoencoder
from training.config import TrainConfig
from training.data import TrainingData
from training.pixels import picture_size, square, to_signed

logger = logging.getLogger(__name__)

_BATCH: Final = 32  # pictures encoded at once; always the same, so that latents do not depend on the machine
_FIELD: Final = "train.diffusion.autoencoder"


def encode(recipe: Recipe, *, progress: bool = True) -> dict[str, Any]:
    """Encode what has no latents yet, for the autoencoder of `train.diffusion`. Gives a summary with the `encoder` id.

    Write that id under `train.data.latents` to train on them. Raises Quarantined if some shards could not be encoded.
    """
    train = TrainConfig.from_recipe(recipe)
    path, wanted = getattr(train.settings, "autoencoder", None), getattr(train.settings, "size", None)
    if not isinstance(path, str):
        raise RecipeError("train.model", f"{train.model} is not trained on latents", "encode for model: diffusion")
    if getattr(train.settings, "crop", "center") != "center":
        raise RecipeError("train.diffusion.crop", "random cuts cannot be encoded ahead", "use crop: center")
    dataset = Dataset(Storage(recipe.dataset, recipe.storage))
    vae = load_autoencoder(path, _FIELD)
    samples = TrainingData(dataset, train.data, train.seed, layer=None)
    size = picture_size(samples, wanted, max(8, factor_of(vae.config)), "train.diffusion.size")
    job = LatentsJob(dataset, path, encoder_identity(vae, size), recipe.resources)
    dataset.storage.write(f"{job.folder}/recipe.json", json.dumps(job.identity, indent=1).encode())
    work = [job.unit(entry) for entry in dataset.manifest.shards]
    units.forget(job, job.stale(work))
    summary = units.run(job, work, recipe.resources, progress=progress)
    if summary.quarantined:
        raise Quarantined(job.name, summary.quarantined)
    counts = {name: int(count) for name, count in summary.counts.items()}
    return {"encoder": job.encoder, "shards_done": summary.done, "shards_skipped": summary.skipped, **counts}


def encoder_identity(vae: Any, size: int) -> dict[str, Any]:
    """Everything that can change a latent of a picture, as plain data."""
    digest = hashlib.sha256()
    for name, weight in sorted(vae.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(weight.cpu().float().numpy()).tobytes())
    return {"weights": digest.hexdigest(), "size": size, "crop": "center", "factor": factor_of(vae.config), "format": 1}


class LatentsJob(units.Job):
    """One encoder; a unit is a shard."""

    def __init__(self, dataset: Dataset, autoencoder: str, identity: dict[str, Any], resources: Resources) -> None:
        self.dataset, self.storage, self.autoencoder = dataset, dataset.storage, autoencoder
        self.identity, self.resources = identity, resources
        self.encoder = fingerprint(identity)
        self.name, self.folder = f"latents-{self.encoder}", f"latents/{self.encoder}"

    def unit(self, entry: ShardEntry) -> units.Unit:
        """A rewritten shard is another unit: it is encoded again."""
        return units.Unit(f"{entry.name}-{entry.sha256[:12]}", {"shard": entry.name, "sha256": entry.sha256})

    def stale(self, work: Iterable[units.Unit]) -> set[str]:
        """Committed units whose latents are there no longer: deleted, or written over with those of another shard."""
        there, wanted = set(self.storage.names(self.folder)), {unit.id: unit for unit in work}
        committed = units.markers(self).keys()
        return {
            unit
            for unit in committed
            if unit not in wanted or f"{self.folder}/{wanted[unit].spec['shard']}.safetensors" not in there
        }

    def prepare(self, unit: units.Unit) -> Iterator[units.Piece]:
        jpegs: list[bytes] = []
        for _, jpeg in self.dataset.read_images(unit.spec["shard"]):
            jpegs.append(jpeg)
            if len(jpegs) == _BATCH:
                yield {"jpegs": jpegs}
                jpegs = []
        if jpegs:
            yield {"jpegs": jpegs}

    def model(self) -> Callable[[units.Piece], units.Piece]:
        import torch

        torch.set_num_threads(units.model_threads(self.resources))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        vae = load_autoencoder(self.autoencoder, _FIELD).to(device).eval()

        def apply(piece: units.Piece) -> units.Piece:
            pictures = np.stack([square(jpeg, self.identity["size"]) for jpeg in piece["jpegs"]])
            signed = to_signed(torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous().to(device))
            with torch.no_grad():
                posterior = vae.encode(signed).latent_dist
            both = torch.cat([posterior.mean, posterior.std], dim=1)
            units.report({"samples": len(pictures)})
            return {"latents": both.half().cpu().numpy()}

        return apply

    def commit(self, unit: units.Unit, pieces: list[units.Piece]) -> dict[str, Any]:
        from safetensors.numpy import save

        # safetensors writes memory as it lies, whatever the strides.
        latents = np.ascontiguousarray(np.concatenate([piece["latents"] for piece in pieces]))
        data = save({"latents": latents}, metadata={"shard_sha256": unit.spec["sha256"]})
        self.storage.write(f"{self.folder}/{unit.spec['shard']}.safetensors", data)
        return {"samples": len(latents), "bytes": len(data)}


def reader(storage: Storage, encoder: str) -> Callable[[str], np.ndarray]:
    """Gives what reads a shard's latents [samples, 2 C, h, w] in tar order, by mmap from a local folder.

    Raises RecipeError (here, or when a shard is read) where the latents are missing or of an earlier shard.
    """
    if not storage.exists(f"latents/{encoder}/recipe.json"):
        problem = f"{storage.url} has no latents {encoder}"
        raise RecipeError("train.data.latents", problem, "run `capstan encode` and write the id that it prints")
    manifest = read_manifest(storage)
    sums = {entry.name: entry.sha256 for entry in manifest.shards} if manifest else {}

    def read(shard: str) -> np.ndarray:
        name = f"latents/{encoder}/{shard}.safetensors"
        if not storage.exists(name):
            raise RecipeError("train.data.latents", f"{encoder} lacks {shard}", "run `capstan encode` to complete it")
        path = storage.local_path(name)
        raw = np.frombuffer(storage.read(name), np.uint8) if path is None else np.memmap(path, np.uint8, mode="r")
        latents, made_of = _parse(raw)
        if made_of != sums.get(shard):
            problem = f"the latents of {shard} are of an earlier version of that shard"
            raise RecipeError("train.data.latents", problem, "run `capstan encode` to renew them")
        return latents

    return read


def _parse(raw: np.ndarray) -> tuple[np.ndarray, str]:
    """The bytes of a safetensors file → (`latents` without a copy, sum of the shard that they were made of)."""
    length = int.from_bytes(raw[:8].tobytes(), "little")
    header = json.loads(raw[8 : 8 + length].tobytes())
    entry = header["latents"]
    start, stop = (8 + length + offset for offset in entry["data_offsets"])
    return raw[start:stop].view(np.float16).reshape(entry["shape"]), header["__metadata__"]["shard_sha256"]
