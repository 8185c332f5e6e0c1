"""A dataset → batches for anybody's PyTorch loop, in Capstan's order, with exact resume.

Sample i of the endless training sequence depends on the dataset, the seed and i alone. So the state is one integer, the
step, and a run resumes with any number of workers, seeing every sample once per epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from capstan.pipeline.config import validate
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import RecipeError
from capstan.recaption.store import find_layer
from capstan.training.config import Data
from capstan.training.data.dataset import TrainingData
from capstan.training.data.loader import Loader
from capstan.training.data.transforms import batch_of
from capstan.training.family import Sample


class TorchBatches:
    """Endless batches: `{"image": uint8 [B, 3, size, size], "caption": [B texts], "key": [B keys], "slot": [B slots]}`.

    `batch` is the batch of all workers together; each of `world` workers gets its slice (`rank` and `world` default to
    torch.distributed's, if that is initialized). `blend` maps caption slots to weights (default: 95% descriptive and 5%
    original where there is a layer). `stop` ends the iteration after that many steps. Images are cut to a centred
    square, or at random places with `crop="random"`; `flip` mirrors half of them.

        for step, batch in enumerate(batches, batches.step): …
        torch.save(batches.state_dict(), …)       later: batches.load_state_dict(…)
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch: int,
        size: int,
        layer: str | None,
        blend: Mapping[str, float] | None = None,
        seed: int = 0,
        rank: int | None = None,
        world: int | None = None,
        start: int = 0,
        stop: int | None = None,
        crop: str = "center",
        flip: bool = False,
        threads: int = 2,
        prefetch: int = 4,
    ) -> None:
        if batch < 1 or size < 1:
            raise RecipeError("ds.torch", f"batch={batch}, size={size}", "use positive numbers")
        if crop not in ("center", "random"):
            raise RecipeError("ds.torch", f"crop={crop!r}", 'use "center" or "random"')
        section = {"layer": layer, "blend": dict(blend) if blend else None}
        data = validate(Data, section, "ds.torch")
        found = find_layer(dataset.storage, layer) if layer is not None else None
        self.data = TrainingData(dataset, data, seed, layer=found)
        own_rank, own_world = _this_worker()
        self.batch, self.step, self.stop = batch, start, stop
        self.rank, self.world = own_rank if rank is None else rank, own_world if world is None else world
        self._size, self._cut = size, {"crop": crop, "flip": flip}
        self._ahead = {"threads": threads, "prefetch": prefetch}

    @property
    def steps_per_epoch(self) -> float:
        """Number of steps in which every sample comes once."""
        return len(self.data) / self.batch

    def state_dict(self) -> dict[str, Any]:
        """Return what resumes this sequence: the step, and what identifies the data."""
        return {"step": self.step, "batch": self.batch, "seed": self.data.seed, "data": self.data.identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken. Raises RecipeError if it is of another dataset, layer, batch or seed."""
        for name, value in self.state_dict().items():
            if name != "step" and state[name] != value:
                raise RecipeError(
                    "ds.torch", f"the state has {name} {state[name]}, not {value}", f"use the same {name}"
                )
        self.step = int(state["step"])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        stop = 1 << 62 if self.stop is None else self.stop
        options: dict[str, Any] = {"rank": self.rank, "world": self.world, **self._ahead}
        with Loader(self.data, self._prepare, batch=self.batch, start=self.step, stop=stop, **options) as loader:
            for loaded in loader:
                self.step = loaded.step + 1
                yield dict(loaded.batch)

    def _prepare(self, samples: Sequence[Sample]) -> dict[str, Any]:
        images: torch.Tensor = batch_of(samples, self._size, **self._cut)  # type: ignore[arg-type]
        return {
            "image": images,
            "caption": [sample.text for sample in samples],
            "key": [sample.key for sample in samples],
            "slot": [sample.slot for sample in samples],
        }


def _this_worker() -> tuple[int, int]:
    """Return this process's rank and the number of processes."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
