"""Checks of Python, of the packages' versions, and of what torch was built for"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from capstan.cluster.doctor.finding import Finding, size
from capstan.pipeline import extras

# Distributions of the core and, by extra, of the optional parts.
CORE: Final = ("ray", "s3fs", "pyarrow", "duckdb")
OPTIONAL: Final = {
    extras.RECAPTION: ("torch", "torchvision", "transformers", "open_clip_torch"),
    extras.TRAIN: ("accelerate", "deepspeed", "diffusers"),
}
# Package → (first, last, what is wrong with these, which to install).
_BAD: Final = {
    "deepspeed": ((0, 17, 6), (0, 18, 2), "this version computes wrong ZeRO-2 gradients", "deepspeed>=0.19.6"),
}
_DRIVER: Final = Path("/proc/driver/nvidia/version")
_MISSING: Final = "not installed"


def python_and_packages() -> Iterator[Finding]:
    """Compare versions with those known to be bad. Packages of extras may be missing; a recipe may need them."""
    version = sys.version.split()[0]
    yield Finding("python", (3, 11) <= sys.version_info[:2] <= (3, 13), version, "use Python 3.11, 3.12 or 3.13")
    for package in CORE:
        yield _installed(package, "pip install --force-reinstall capstan-t2i")
    for extra, packages in OPTIONAL.items():
        for package in packages:
            found = _installed(package, "")
            yield Finding(package, True, f"{_MISSING} (extra {extra})") if found.seen == _MISSING else found


def _installed(package: str, hint: str) -> Finding:
    try:
        return judged(package, importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return Finding(package, False, _MISSING, hint)


def judged(package: str, version: str) -> Finding:
    """Return whether this version of a package is known to be bad."""
    first, last, wrong, wanted = _BAD.get(package, ((), (), "", ""))
    bad = bool(first) and first <= _numbers(version) <= last
    return Finding(package, not bad, version, f"pip install '{wanted}': {wrong}" if bad else "")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


def accelerators() -> Iterator[Finding]:
    """Check torch, CUDA and NCCL, the GPUs and their memory; nothing if torch is not installed."""
    if extras.missing(extras.RECAPTION) == "torch":
        return
    import torch

    built = torch.version.cuda
    usable = torch.cuda.is_available()
    if _DRIVER.exists() and not usable:
        problem = f"there is an NVIDIA driver, but torch {torch.__version__} (CUDA {built}) cannot use it"
        hint = "install a torch built for CUDA, and a driver new enough for it: see `nvidia-smi`"
        yield Finding("cuda", False, problem, hint)
    else:
        yield Finding("cuda", True, f"torch built for CUDA {built or '–'}, {'in use' if usable else 'no GPU'}")
    if not usable:
        yield Finding("gpus", True, "none: training runs on gloo, on the CPU")
        return
    yield _nccl(torch)
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        hint = "stop the other processes on it (`nvidia-smi` lists them)"
        yield Finding(f"gpu {number}", free > 0.8 * total, f"{facts.name}, {size(free)} of {size(total)} free", hint)


def _nccl(torch: Any) -> Finding:
    if not torch.distributed.is_nccl_available():
        return Finding("nccl", False, "torch was built without it", "install torch from the registry's own wheels")
    return Finding("nccl", True, ".".join(map(str, torch.cuda.nccl.version())))
