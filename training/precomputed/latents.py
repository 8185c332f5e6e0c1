"""A dataset and a family's encoder → latents of all images, shard by shard

    latents/<encoder id>/recipe.json                    which encoder, and the images' size
    latents/<encoder id>/shard-000000.safetensors       `latents` [samples, ..., h, w], in tar order: float16, or of
                                                        tokens int16

What a latent is, its family says (`Family.encoder`): an AutoencoderKL's is [2 C, h, w], mean and standard deviation;
a codebook's is a token [h, w]; a clip's is that of each of its frames; a sound's, of no image's size, is [C + 1, L].
With aspect-ratio buckets, whose latents differ in shape, the tensor is [samples, ..., A]: a sample's h·w values, and
zeros up to the area A of the largest. The encoder id is a hash of everything that can change a latent. Training reads
the files by mmap.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from capstan.pipeline import units
from capstan.pipeline.config import Resources, fingerprint
from capstan.pipeline.dataset import tensor_file
from capstan.pipeline.dataset.shards import Dataset, ShardEntry
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage import Storage
from capstan.training.config import AUTO, Data, TrainConfig
from capstan.training.config.families import family_class, traits_of
from capstan.training.data.buckets import Size, assign, check_sizes, nearest_square, sizes_of
from capstan.training.data.dataset import TrainingData
from capstan.training.data.shard_cache import ShardCache
from capstan.training.data.shard_reader import JPG, ShardRows
from capstan.training.data.transforms import image_size
from capstan.training.family import Encoder, Samples
from capstan.training.precomputed.files import file_reader, parse, refuse_not_finite

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_BATCH: Final = 32  # images encoded at once; always the same, so that latents do not depend on the machine


def plan(train: TrainConfig, dataset: Dataset) -> dict[str, Any]:
    """Return the identity of a dataset's latents. Raises RecipeError if the family can have none."""
    family = family_class(train.model)
    encoder = family.encoder(train)
    if encoder is None:
        raise RecipeError("train.model", f"{train.model} is not trained on latents", "set e.g. model: diffusion")
    if getattr(train.settings, "crop", "center") != "center":
        problem, hint = "random crops cannot be precomputed", "use crop: center"
        raise RecipeError(f"train.{family.name}.crop", problem, hint)
    return measure(train, encoder, TrainingData(dataset, Data(layer=None), train.seed, layer=None))[1]


def measure(train: TrainConfig, encoder: Encoder, samples: Samples) -> tuple[int, dict[str, Any]]:
    """Return the side in pixels of the squares that the network generates, and the identity of its latents.

    Both encoding and training call this, so that they agree. Without `size` the side is the first image's, or with
    buckets that of a square with the area of the largest; that of sounds is 0. Raises RecipeError if network or encoder
    do not support it.
    """
    family, factor = family_class(train.model), encoder.factor
    if factor is None:
        if train.data.buckets is not None:
            raise RecipeError("train.data.buckets", f"{train.model} reads no images", "remove it")
        return 0, encoder.identity()
    patch, divisor = family.multiples(train)
    multiple, wanted = math.lcm(8, factor * patch), getattr(train.settings, "size", None)  # pipelines step by 8 pixels
    buckets = None
    if train.data.buckets is not None:
        step = math.lcm(multiple, factor * divisor)
        check_sizes(train.data.buckets, step)
        buckets = sizes_of(train.data.buckets)
        wanted = wanted or nearest_square(buckets, step)
    size = image_size(samples, wanted, multiple, f"train.{family.name}.size")
    return size, latents_identity(encoder, size, buckets)


def check_latents(train: TrainConfig, identity: dict[str, Any]) -> None:
    """Raise RecipeError if the run is to read latents of another encoder or image size than `measure` found."""
    encoder, wanted = fingerprint(identity), train.data.latents
    if wanted not in (None, AUTO, encoder):
        problem = f"{wanted} are of another autoencoder or image size (this one's would be {encoder})"
        raise RecipeError("train.data.latents", problem, "run `capstan encode` and set the id that it prints")


def latents_identity(encoder: Encoder, size: int, buckets: Sequence[Size] | None = None) -> dict[str, Any]:
    """Return everything that can change an image's latents, as plain data."""
    own = encoder.identity() | {"factor": encoder.factor}
    return own | ({"size": size} if buckets is None else {"buckets": [list(bucket) for bucket in buckets]})


class LatentsJob(units.Job):
    """The unit map of one encoder; a unit is a shard."""

    def __init__(self, dataset: Dataset, train: TrainConfig, identity: dict[str, Any], resources: Resources) -> None:
        self.dataset, self.storage, self.train = dataset, dataset.storage, train
        self.identity, self.resources = identity, resources
        self.encoder = fingerprint(identity)
        self.name, self.folder = f"latents-{self.encoder}", f"latents/{self.encoder}"

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"dataset": self.dataset.part()}  # a unit has the entry of its shard

    def unit(self, entry: ShardEntry) -> units.Unit:
        """Return the unit of a shard. A rewritten shard is a new unit, so it is encoded again."""
        return units.Unit(
            f"{entry.name}-{entry.sha256[:12]}",
            {"shard": entry.name, "sha256": entry.sha256, "entry": entry.model_dump()},
        )

    def stale(self, work: Iterable[units.Unit]) -> set[str]:
        """Return committed units whose latents are gone: deleted, or replaced by those of a newer shard."""
        existing, wanted = set(self.storage.names(self.folder)), {unit.id: unit for unit in work}
        committed = self.markers.read().keys()
        return {
            unit
            for unit in committed
            if unit not in wanted or f"{self.folder}/{wanted[unit].spec['shard']}.safetensors" not in existing
        }

    def prepare(self, unit: units.Unit) -> Iterator[units.Piece]:
        """Yield batches of files of one size, with their rows in the shard. Reads the tar once, in order.

        A sample's file is the first part that the family reads (its clip), else its image.
        """
        shard, dataset = unit.spec["shard"], self.dataset.part(unit.spec["entry"])
        sizes, buckets = _buckets(dataset, shard, self.identity)
        waiting: list[list[tuple[int, bytes]]] = [[] for _ in sizes]

        def piece(bucket: int) -> units.Piece:
            rows, files = zip(*waiting[bucket], strict=True)
            waiting[bucket] = []
            return {"files": list(files), "rows": list(rows), "size": sizes[bucket]}

        reads = traits_of(self.train.model).reads
        parts = any(suffix != JPG for suffix in reads)
        for row, (_, jpeg, others) in enumerate(dataset.read_samples(shard, parts=parts)):
            file = next((others[suffix] for suffix in reads if suffix in others), jpeg)
            waiting[buckets[row]].append((row, file))
            if len(waiting[buckets[row]]) == _BATCH:
                yield piece(buckets[row])
        yield from (piece(bucket) for bucket in range(len(sizes)) if waiting[bucket])

    def model(self) -> Callable[[units.Piece], units.Piece]:
        import torch

        torch.set_num_threads(units.model_threads(self.resources))
        encoder = family_class(self.train.model).encoder(self.train)
        encoder.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))

        def apply(piece: units.Piece) -> units.Piece:
            with torch.no_grad():
                latents = encoder(piece["files"], piece["size"])
            units.report({"samples": len(latents)})
            return {"latents": _stored(latents), "rows": piece["rows"], "part": encoder.part}

        return apply

    def commit(self, unit: units.Unit, pieces: list[units.Piece]) -> dict[str, Any]:
        latents = self._in_order(pieces)
        refuse_not_finite(self.dataset.part(unit.spec["entry"]), unit.spec["shard"], pieces[0]["part"], latents)
        data = tensor_file.save({"latents": latents}, {"shard_sha256": unit.spec["sha256"]})
        self.storage.write(f"{self.folder}/{unit.spec['shard']}.safetensors", data)
        return {"samples": len(latents), "bytes": len(data)}

    def _in_order(self, pieces: list[units.Piece]) -> np.ndarray:
        if "buckets" not in self.identity:
            return np.concatenate([piece["latents"] for piece in pieces])
        area = max(width * height for width, height in self.identity["buckets"]) // self.identity["factor"] ** 2
        first, samples = pieces[0]["latents"], sum(len(piece["rows"]) for piece in pieces)
        latents = np.zeros((samples, *first.shape[1:-2], area), first.dtype)
        for piece in pieces:
            flat = piece["latents"].reshape(*piece["latents"].shape[:-2], -1)
            latents[piece["rows"], ..., : flat.shape[-1]] = flat
        return latents


def _stored(latents: torch.Tensor) -> np.ndarray:
    """Return latents as they are stored: float16, or tokens as int16."""
    values: np.ndarray = (latents.half() if latents.is_floating_point() else latents.short()).cpu().numpy()
    return values


def _buckets(dataset: Dataset, shard: str, identity: dict[str, Any]) -> tuple[list[Size], np.ndarray]:
    """Return the sizes at which images are encoded, and the index of each sample's size (int16 [samples])."""
    sizes = [(width, height) for width, height in identity.get("buckets", [[identity.get("size")] * 2])]
    table = dataset.table(shard, ["width", "height"])
    return sizes, assign(table["width"].to_numpy(), table["height"].to_numpy(), sizes)


@dataclass(frozen=True)
class _Shaped:
    """A shard's latents in several shapes: `flat` is [samples, ..., A], `shapes` are (h, w) of each bucket."""

    flat: np.ndarray
    buckets: np.ndarray
    shapes: list[tuple[int, int]]

    def __getitem__(self, row: int) -> np.ndarray:
        height, width = self.shapes[self.buckets[row]]
        return self.flat[row, ..., : height * width].reshape(*self.flat.shape[1:-1], height, width)


def reader(storage: Storage, encoder: str, cache: ShardCache | None = None) -> Callable[[str], ShardRows]:
    """Return a function that reads a shard's latents in tar order, each [..., h, w], mapped if local or cached.

    Raises RecipeError, here or when a shard is read, if the latents are missing or of an earlier version of the shard.
    """
    if not storage.exists(f"latents/{encoder}/recipe.json"):
        problem = f"{storage.url} has no latents {encoder}"
        raise RecipeError("train.data.latents", problem, "run `capstan encode` and set the id that it prints")
    identity = json.loads(storage.read(f"latents/{encoder}/recipe.json"))
    dataset, read = Dataset(storage), file_reader(storage, encoder, "train.data.latents", cache)

    def rows(shard: str) -> ShardRows:
        latents = parse(read(shard))["latents"]
        if "buckets" not in identity:
            return latents
        sizes, buckets = _buckets(dataset, shard, identity)
        factor = identity["factor"]
        return _Shaped(latents, buckets, [(height // factor, width // factor) for width, height in sizes])

    return rows
