"""The state of a run in pieces that know no worker: kind and name of a tensor, and which of its elements they hold.

    Part (live, on one worker) ──save──▶ {kind: {name: [(start, elements)]}} in a file a worker ──Pieces──▶ Part

A strategy decides which elements of a weight, and of Adam's two moments of it, lie on which worker: all on every one
(DDP), a run of them that no tensor's end respects (ZeRO 1 and 2), an even share (ZeRO 3, and the average under all of
them). What is written says so element by element, hence any strategy on any number of workers can take it up again.
DeepSpeed's universal checkpoint does this for ZeRO alone, in a step of its own that writes everything once more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from capstan.pipeline.errors import CapstanError

WEIGHT: Final = "weight"
STEP: Final = "step"  # how often Adam has updated a weight: one element
MOMENTS: Final = ("exp_avg", "exp_avg_sq")
AVERAGE: Final = "average"

Written = dict[str, dict[str, list[tuple[int, torch.Tensor]]]]  # kind → name → pieces of the flat tensor


@dataclass(frozen=True)
class StateSlice:
    """Elements `start` … `start` + numel of the flat tensor `name`, as they lie on this worker in `tensor` (any shape).

    `written` are those that this worker writes; where all hold the same, each writes its share.
    """

    kind: str
    name: str
    start: int
    tensor: torch.Tensor
    written: slice = field(default_factory=lambda: slice(None))

    def copy(self) -> tuple[int, torch.Tensor]:
        """(start, elements) to be written: a copy on the CPU."""
        flat = self.tensor.detach().reshape(-1)[self.written]
        return self.start + (self.written.start or 0), flat.to("cpu", copy=True)

    def take(self, pieces: StateReader) -> None:
        """Fill the tensor from what was written."""
        with torch.no_grad():
            self.tensor.copy_(pieces.read(self.kind, self.name, self.start, self.tensor.numel()).view_as(self.tensor))


def even_share(numel: int, rank: int, world: int) -> slice:
    """The elements of a flat tensor that are `rank`'s: ceil(numel / world), fewer at the end.

    >>> [even_share(5, rank, 2) for rank in range(2)], even_share(1, 1, 2)
    ([slice(0, 3, None), slice(3, 5, None)], slice(1, 1, None))
    """
    size = -(-numel // world)
    return slice(min(rank * size, numel), min((rank + 1) * size, numel))


def adam_parts(
    name: str, start: int, weight: torch.Tensor, state: dict[str, torch.Tensor], within: slice, written: slice
) -> Iterator[StateSlice]:
    """A weight's part and those of its Adam state; `within` are its elements of the flat tensors (all: slice(None)).

    `state` is torch's own for the tensor that the optimizer steps, which under ZeRO holds many weights.
    """
    everything = within == slice(None)
    for kind, tensor in ((WEIGHT, weight), *((moment, state[moment]) for moment in MOMENTS)):
        yield StateSlice(kind, name, start, tensor.detach() if everything else tensor.detach()[within], written)
    yield StateSlice(STEP, name, 0, state["step"])


def adam_state(optimizer: torch.optim.Optimizer, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """AdamW's state of `tensor`, begun as torch begins it at the first step where there is none yet."""
    state: dict[str, torch.Tensor] = optimizer.state[tensor]
    if not state:
        fused = optimizer.defaults.get("fused")
        state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device if fused else "cpu")
        state |= {moment: torch.zeros_like(tensor.detach()) for moment in MOMENTS}
    return state


def written(parts: Iterable[StateSlice]) -> Written:
    """What this worker writes of `parts`."""
    content: Written = {}
    for part in parts:
        start, elements = part.copy()
        if elements.numel():
            content.setdefault(part.kind, {}).setdefault(part.name, []).append((start, elements))
    return content


class StateReader:
    """What all workers of a run have written into `files`, to be read by elements; mapped, not loaded."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = list(files)
        self._opened: list[Any] = [
            torch.load(path, map_location="cpu", mmap=True, weights_only=True) for path in self.files
        ]
        self.workers: list[dict[str, Any]] = [content["worker"] for content in self._opened]
        self.buffers: list[dict[str, torch.Tensor]] = [content["buffers"] for content in self._opened]

    def read(self, kind: str, name: str, start: int, numel: int) -> torch.Tensor:
        """Elements `start` … `start` + `numel` of a tensor, flat. Raises CapstanError where some were not written."""
        found, missing = torch.empty(0), numel
        for content in self._opened:
            for first, elements in content["parts"].get(kind, {}).get(name, []):
                low, high = max(start, first), min(start + numel, first + elements.numel())
                if low >= high or missing <= 0:
                    continue
                if found.numel() == 0:
                    found = torch.empty(numel, dtype=elements.dtype)
                found[low - start : high - start] = elements[low - first : high - first]
                missing -= high - low
        if missing > 0:
            raise CapstanError(f"{self.files[0].parent} lacks {kind} of {name}: it was written by another model")
        return found
