"""State of a run as slices of named tensors, independent of workers

    StateSlice ──collect_state──▶ {kind: {name: [(start, elements)]}}, a file per worker ──StateReader──▶ StateSlice

The strategy decides which worker holds which elements of a weight and of Adam's two moments: every worker all (DDP), a
range that may end within a tensor (ZeRO 1 and 2), or an even share (ZeRO 3, and the average under all of them). Files
record the element ranges, so any strategy on any number of workers can load them. DeepSpeed's universal checkpoint does
this for ZeRO only, in a separate step that writes everything again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from capstan.pipeline.errors import CapstanError

WEIGHT: Final = "weight"
STEP: Final = "step"  # number of Adam's updates of a weight: one element
MOMENTS: Final = ("exp_avg", "exp_avg_sq")
AVERAGE: Final = "average"

SavedState = dict[str, dict[str, list[tuple[int, torch.Tensor]]]]  # kind → name → pieces of the flat tensor


@dataclass(frozen=True)
class StateSlice:
    """Return elements `start` … `start` + numel of the flat tensor `name`, held by this worker in `tensor` (any shape).

    `saved` are the elements that this worker saves; if all workers hold the same, each saves its share.
    """

    kind: str
    name: str
    start: int
    tensor: torch.Tensor
    saved: slice = field(default_factory=lambda: slice(None))

    def copy(self) -> tuple[int, torch.Tensor]:
        """Return (start, elements) to save: a copy on the CPU."""
        flat = self.tensor.detach().reshape(-1)[self.saved]
        return self.start + (self.saved.start or 0), flat.to("cpu", copy=True)

    def load_from(self, reader: StateReader) -> None:
        """Fill the tensor from the saved state."""
        with torch.no_grad():
            self.tensor.copy_(reader.read(self.kind, self.name, self.start, self.tensor.numel()).view_as(self.tensor))


def even_share(numel: int, rank: int, world: int) -> slice:
    """Return `rank`'s elements of a flat tensor: ceil(numel / world), fewer at the end.

    >>> [even_share(5, rank, 2) for rank in range(2)], even_share(1, 1, 2)
    ([slice(0, 3, None), slice(3, 5, None)], slice(1, 1, None))
    """
    size = -(-numel // world)
    return slice(min(rank * size, numel), min((rank + 1) * size, numel))


def adam_slices(
    name: str, start: int, weight: torch.Tensor, state: dict[str, torch.Tensor], within: slice, saved: slice
) -> Iterator[StateSlice]:
    """Yield the slices of a weight and of its Adam state; `within` are its elements of the flat tensors.

    `state` is torch's state of the tensor that the optimizer steps, which under ZeRO holds many weights.
    """
    everything = within == slice(None)
    for kind, tensor in ((WEIGHT, weight), *((moment, state[moment]) for moment in MOMENTS)):
        yield StateSlice(kind, name, start, tensor.detach() if everything else tensor.detach()[within], saved)
    yield StateSlice(STEP, name, 0, state["step"])


def adam_state(optimizer: torch.optim.Optimizer, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return AdamW's state of `tensor`; if there is none yet, initialise it as torch does at the first step."""
    state: dict[str, torch.Tensor] = optimizer.state[tensor]
    if not state:
        fused = optimizer.defaults.get("fused")
        state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device if fused else "cpu")
        state |= {moment: torch.zeros_like(tensor.detach()) for moment in MOMENTS}
    return state


def collect_state(slices: Iterable[StateSlice]) -> SavedState:
    """Return what this worker saves of `slices`."""
    content: SavedState = {}
    for part in slices:
        start, elements = part.copy()
        if elements.numel():
            content.setdefault(part.kind, {}).setdefault(part.name, []).append((start, elements))
    return content


class StateReader:
    """The state that all workers of a run saved in `files`, read by elements; mapped, not loaded."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = list(files)
        self._opened: list[Any] = [
            torch.load(path, map_location="cpu", mmap=True, weights_only=True) for path in self.files
        ]
        self.workers: list[dict[str, Any]] = [content["worker"] for content in self._opened]
        self.buffers: list[dict[str, torch.Tensor]] = [content["buffers"] for content in self._opened]

    def read(self, kind: str, name: str, start: int, numel: int) -> torch.Tensor:
        """Return elements `start` … `start` + `numel` of a tensor, flat. Raises CapstanError if some were not saved."""
        result, missing = torch.empty(0), numel
        for content in self._opened:
            for first, elements in content["parts"].get(kind, {}).get(name, []):
                low, high = max(start, first), min(start + numel, first + elements.numel())
                if low >= high or missing <= 0:
                    continue
                if result.numel() == 0:
                    result = torch.empty(numel, dtype=elements.dtype)
                result[low - start : high - start] = elements[low - first : high - first]
                missing -= high - low
        if missing > 0:
            raise CapstanError(f"{self.files[0].parent} has no {kind} of {name}: it was saved from another model")
        return result
