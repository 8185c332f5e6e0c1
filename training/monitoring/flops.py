"""FLOPs of a step, counted once per batch shape; peak FLOP/s of devices; MFU.

    MFU = FLOPs of the steps / (seconds they took × workers × peak FLOP/s of a device)

Counted are the matrix products, convolutions and attentions of the real step, forward and backward, as
torch.utils.flop_counter counts them: a multiplication and an addition are two. Frozen parts count only for the passes
that they run. Recomputation by gradient checkpointing does not count (Chowdhery et al. 2022, PaLM, app. B).
"""

from __future__ import annotations

import contextlib
import functools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

# Dense TFLOP/s (bf16 or fp16, fp32) from the makers' data sheets; the first name contained in the device's name wins.
PEAK_TFLOPS: Final[dict[str, tuple[float, float]]] = {
    "GB200": (2500, 80),
    "B200": (2250, 75),
    "H200": (989, 67),
    "H100 PCIe": (756, 51),
    "H100 NVL": (835, 60),
    "H100": (989, 67),
    "H800": (989, 67),
    "A100": (312, 19.5),
    "A800": (312, 19.5),
    "A40": (149.7, 37.4),
    "A10G": (70, 35),
    "A10": (125, 31.2),
    "L40S": (362, 91.6),
    "L40": (181, 90.5),
    "L4": (121, 30.3),
    "V100": (125, 15.7),
    "T4": (65, 8.1),
    "RTX 5090": (209.5, 104.8),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71, 35.6),
    "MI300X": (1307, 163.4),
    "MI250X": (383, 95.7),
}


def peak_flops(device: str, precision: str, tf32: bool = False) -> float | None:
    """Return the peak FLOP/s of a device by its name, or None if unknown; `tf32`: fp32 products run in TF32.

    >>> peak_flops("NVIDIA H100 80GB HBM3", "bf16"), peak_flops("NVIDIA H100 PCIe", "fp32"), peak_flops("x", "bf16")
    (989000000000000.0, 51000000000000.0, None)
    """
    for name, (half, full) in PEAK_TFLOPS.items():
        if re.search(rf"\b{name}\b", device):
            teraflops = half if precision != "fp32" else half / 2 if tf32 else full
            return teraflops * 1e12
    return None


class FlopCount:
    """FLOPs per sample by batch shape; `known` is filled as shapes are first seen."""

    def __init__(self) -> None:
        self.known: dict[str, float] = {}

    @contextlib.contextmanager
    def counting(self, batch: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Count the forward and backward pass of `batch` inside the block; changes no result."""
        shape = shape_of(batch)
        if shape in self.known:
            yield
            return
        with _eager(), _counter() as counter:
            yield
        self.known[shape] = counter.get_total_flops() / len(next(iter(batch.values())))

    def of(self, batch: Mapping[str, torch.Tensor]) -> float:
        """Return the FLOPs of this batch, whose shape must have been counted."""
        return self.known[shape_of(batch)] * len(next(iter(batch.values())))


def shape_of(batch: Mapping[str, torch.Tensor]) -> str:
    """Return the shape of a sample, on which its number of operations depends.

    >>> shape_of({"pictures": torch.zeros(8, 3, 16, 32), "ids": torch.zeros(8, 77)})
    'ids 77 pictures 3×16×32'
    """
    return " ".join(f"{name} {'×'.join(map(str, tensor.shape[1:]))}" for name, tensor in sorted(batch.items())).strip()


@contextlib.contextmanager
def _counter() -> Iterator[FlopCounterMode]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FlopCounterMode does not have")
        # Without skip_unsupported, kernels without a formula would not be computed at all.
        with FlopCounterMode(display=False, custom_mapping=_formulas(), skip_unsupported=True) as counter:
            yield counter


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    """Run without torch.compile: fused kernels cannot be counted."""
    with torch.compiler.set_stance("force_eager"):
        yield


@functools.cache
def _formulas() -> dict[Any, Callable[..., int]]:
    """Return torch's formulas, changed to return 0 while a checkpointed part of the model is recomputed."""

    def unless_again(formula: Callable[..., int]) -> Callable[..., int]:
        def count(*args: Any, **kwargs: Any) -> int:
            return 0 if _in_backward() and torch.is_grad_enabled() else formula(*args, **kwargs)

        count._get_raw = True  # type: ignore[attr-defined]  # the formula reads shapes from tensors itself
        return count

    return {operator: unless_again(formula) for operator, formula in flop_registry.items()}


def _in_backward() -> bool:
    """Return whether autograd runs backward in this thread; its operations record no gradient, recomputed ones do."""
    return bool(torch._C._current_graph_task_id() != -1)
