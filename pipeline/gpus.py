"""GPUs of this machine, counted without loading torch"""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path
from typing import Final

from capstan.pipeline.config import Resources
from capstan.pipeline.errors import RecipeError

_NVML: Final = "libnvidia-ml.so.1"  # unlike CUDA itself, it does not keep child processes off the GPUs
_AMD: Final = Path("/dev/kfd")


def count_gpus() -> int | None:
    """Return the number of GPUs that CUDA sees on this machine; None where it cannot be told, as for AMD's."""
    if _AMD.exists():
        return None
    devices = 0
    with contextlib.suppress(OSError, AttributeError):
        nvml, found = ctypes.CDLL(_NVML), ctypes.c_uint()
        if nvml.nvmlInit_v2() == 0:
            if nvml.nvmlDeviceGetCount_v2(ctypes.byref(found)) == 0:
                devices = found.value
            nvml.nvmlShutdown()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return devices if visible is None else min(devices, visible_of(visible)) if devices else 0


def visible_of(listed: str) -> int:
    """Return how many devices a value of CUDA_VISIBLE_DEVICES names; CUDA stops at the first that it cannot read.

    >>> visible_of("0,1"), visible_of(""), visible_of("0,-1,1"), visible_of("MIG-4ad,GPU-8f")
    (2, 0, 1, 2)
    """
    count = 0
    for name in listed.split(","):
        if not name.strip() or name.strip().startswith("-"):
            break
        count += 1
    return count


def on_cluster() -> bool:
    """Return whether work runs on the cluster that RAY_ADDRESS names, whose machines are not this one."""
    return bool(os.environ.get("RAY_ADDRESS"))


def usable_gpus(resources: Resources) -> int | None:
    """Return the GPUs that a job may use here; None where that is not known before it runs."""
    if resources.gpus == 0:
        return 0
    return None if on_cluster() else count_gpus()


def check_gpus(resources: Resources) -> None:
    """Raise RecipeError if `resources.gpus` is more than this machine has."""
    here = usable_gpus(resources)
    if here is not None and (resources.gpus or 0) > here:
        hint = f"{'remove it' if not here else f'set it to at most {here}'}, or run on a cluster (capstan submit)"
        raise RecipeError("resources.gpus", f"is {resources.gpus}, but {this_machine_has(here)}", hint)


def check_precision(precision: str, field: str, resources: Resources) -> None:
    """Raise RecipeError for fp16 where there is no GPU; `field` is the key that asks for it."""
    here = usable_gpus(resources)
    if precision == "fp16" and here == 0:
        why = "resources.gpus is 0" if resources.gpus == 0 else this_machine_has(here)
        raise RecipeError(field, f"fp16 needs a GPU, and {why}", "use bf16 or fp32")


def this_machine_has(gpus: int) -> str:
    """Return a number of GPUs in words.

    >>> this_machine_has(0), this_machine_has(1), this_machine_has(2)
    ('this machine has no GPU', 'this machine has 1 GPU', 'this machine has 2 GPUs')
    """
    return f"this machine has {gpus or 'no'} GPU{'s' * (gpus > 1)}"
