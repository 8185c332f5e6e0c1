"""A caption layer and frozen text encoders → text states of all captions

    latents/<id>/recipe.json                    encoders, layer, slots
    latents/<id>/shard-000000.safetensors       SLOT.NAME [samples, ...], in tar order, for each slot of the layer and
                                                the original captions, and each state of the encoders; float16, or
                                                integers unchanged

If the layer has no caption in a slot for a sample, its state is zeros, which are never read: the original is used.
Each file has the hash of its captions (`captions`); files of other captions are refused, and encoded again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch

from capstan.pipeline import units
from capstan.pipeline.config import Resources, fingerprint
from capstan.pipeline.dataset import tensor_file
from capstan.pipeline.dataset.shards import Dataset, ShardEntry
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage import Storage
from capstan.recaption.store import layer_recipe, read_layer
from capstan.training.config import ORIGINAL, TrainConfig
from capstan.training.config.families import family_class
from capstan.training.data.shard_cache import ShardCache
from capstan.training.family import Batch, Sample
from capstan.training.precomputed.files import file_reader, metadata_of, parse, refuse_not_finite

_BATCH: Final = 32  # captions per encoder call; fixed, so that states do not depend on the machine
_FIELD: Final = "train.data.text_states"

Captions = Mapping[str, Sequence[str | None]]  # slot → text of each of a shard's samples, in tar order


def plan(train: TrainConfig, dataset: Dataset, layer: str | None) -> dict[str, Any]:
    """Return the identity of a dataset's text states. Raises RecipeError if the text encoder is not frozen."""
    encoder = family_class(train.model).text_encoder(train)
    if encoder is None:
        problem = "the text encoder is trained, so its states change"
        raise RecipeError(_FIELD, problem, "use a frozen one (train.diffusion.text.pretrained), or remove the setting")
    slots = [] if layer is None else layer_recipe(dataset.storage, layer)["slots"]
    return {"encoder": encoder.identity(), "layer": layer, "slots": sorted({*slots, ORIGINAL}), "text_format": 1}


class TextStatesJob(units.Job):
    """The unit map of one set of encoders and one layer; a unit is a shard."""

    def __init__(self, dataset: Dataset, train: TrainConfig, identity: dict[str, Any], resources: Resources) -> None:
        self.dataset, self.storage, self.train = dataset, dataset.storage, train
        self.identity, self.resources = identity, resources
        self.encoder = fingerprint(identity)
        self.name, self.folder = f"latents-{self.encoder}", f"latents/{self.encoder}"

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"dataset": self.dataset.part()}  # a unit has the entry of its shard

    def unit(self, entry: ShardEntry) -> units.Unit:
        return units.Unit(
            f"{entry.name}-{entry.sha256[:12]}",
            {"shard": entry.name, "sha256": entry.sha256, "entry": entry.model_dump()},
        )

    def stale(self, work: Sequence[units.Unit]) -> set[str]:
        """Return committed units whose states are gone, or belong to other captions than the layer's current ones."""
        wanted, existing = {unit.id: unit.spec["shard"] for unit in work}, set(self.storage.names(self.folder))
        return {
            unit
            for unit in self.markers.read()
            if unit not in wanted
            or f"{self.folder}/{wanted[unit]}.safetensors" not in existing
            or self._metadata(wanted[unit]).get("captions")
            != fingerprint(captions_of(self.dataset, wanted[unit], self.identity))
        }

    def _metadata(self, shard: str) -> dict[str, str]:
        with self.storage.open(f"{self.folder}/{shard}.safetensors") as file:
            start = file.read(8)
            head = start + file.read(int.from_bytes(start, "little"))
        try:
            return metadata_of(np.frombuffer(head, np.uint8))
        except (ValueError, KeyError):  # damaged: to be encoded again
            return {}

    def prepare(self, unit: units.Unit) -> Iterator[units.Piece]:
        """Yield batches of captions of one slot, with their rows in the shard."""
        captions = captions_of(self.dataset.part(unit.spec["entry"]), unit.spec["shard"], self.identity)
        facts = {"captions": fingerprint(captions), "samples": len(captions[ORIGINAL])}
        for slot, texts in captions.items():
            rows = [row for row, text in enumerate(texts) if text is not None]
            for start in range(0, len(rows), _BATCH):
                part = rows[start : start + _BATCH]
                yield {"slot": slot, "rows": part, "texts": [texts[row] for row in part], **facts}

    def model(self) -> Callable[[units.Piece], units.Piece]:
        torch.set_num_threads(units.model_threads(self.resources))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        encoder = family_class(self.train.model).text_encoder(self.train)
        encoder.to(device)

        def apply(piece: units.Piece) -> units.Piece:
            with torch.no_grad():
                states = encoder(piece["texts"])
            units.report({"samples": len(piece["texts"])})
            stored = {name: state.half() if state.is_floating_point() else state for name, state in states.items()}
            return {**piece, "texts": None, "states": {name: state.cpu().numpy() for name, state in stored.items()}}

        return apply

    def commit(self, unit: units.Unit, pieces: list[units.Piece]) -> dict[str, Any]:
        shard, tensors = unit.spec["shard"], dict[str, np.ndarray]()
        for slot in self.identity["slots"]:
            for piece in [piece for piece in pieces if piece["slot"] == slot] or pieces[:1]:
                for name, state in piece["states"].items():
                    empty = (piece["samples"], *state.shape[1:])
                    tensor = tensors.setdefault(f"{slot}.{name}", np.zeros(empty, state.dtype))
                    if piece["slot"] == slot:
                        tensor[piece["rows"]] = state
        for name, tensor in tensors.items():
            refuse_not_finite(
                self.dataset, shard, f"the text encoder ({name}; train.diffusion.text.pretrained)", tensor
            )
        metadata = {"shard_sha256": unit.spec["sha256"], "captions": pieces[0]["captions"]}
        data = tensor_file.save(tensors, metadata)
        self.storage.write(f"{self.folder}/{shard}.safetensors", data)
        return {"samples": sum(len(piece["rows"]) for piece in pieces), "bytes": len(data)}


def captions_of(dataset: Dataset, shard: str, identity: Mapping[str, Any]) -> dict[str, list[str | None]]:
    """Return slot → texts of a shard's samples in tar order; None if the layer has no caption for a sample."""
    table = dataset.table(shard, ["key", "sha256", "caption"])
    keys, layer = table["key"].to_pylist(), identity["layer"]
    known = read_layer(dataset.storage, layer, shard, table) if layer is not None else {}
    texts = {slot: [known.get(key, {}).get(slot) for key in keys] for slot in identity["slots"]}
    return {**texts, ORIGINAL: table["caption"].to_pylist()}


def states_of(samples: Sequence[Sample]) -> Batch:
    """Return the precomputed states of the samples' captions by name, [B, ...], floats as float32; {} if none exist."""
    first = samples[0].states or {}
    all_states = [sample.states for sample in samples if sample.states is not None]
    states = {name: torch.from_numpy(np.stack([one[name] for one in all_states])) for name in first}
    return {name: state.float() if state.is_floating_point() else state for name, state in states.items()}


def reader(storage: Storage, encoder: str, cache: ShardCache | None = None) -> Callable[[str], dict[str, np.ndarray]]:
    """Return a function that reads a shard's states: SLOT.NAME → [samples, ...] in tar order, mapped.

    Raises RecipeError, here or when a shard is read, if they are missing, or of an earlier shard or other captions.
    """
    hint = "run `capstan encode`, or `capstan train`, which encodes first"
    if not storage.exists(f"latents/{encoder}/recipe.json"):
        raise RecipeError(_FIELD, f"{storage.url} has no text states {encoder}", hint)
    identity = json.loads(storage.read(f"latents/{encoder}/recipe.json"))
    dataset, read = Dataset(storage), file_reader(storage, encoder, _FIELD, cache)

    def states(shard: str) -> dict[str, np.ndarray]:
        raw = read(shard)
        if metadata_of(raw)["captions"] != fingerprint(captions_of(dataset, shard, identity)):
            raise RecipeError(_FIELD, f"the text states of {shard} belong to other captions", hint)
        return parse(raw)

    return states
