"""Python, the packages' versions, and what torch was built for."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from capstan.cluster.doctor.finding import Finding, size

PACKAGES: Final = (
    *("torch", "torchvision", "ray", "accelerate", "deepspeed", "diffusers", "transformers"),
    *("open_clip_torch", "webdataset", "s3fs", "pyarrow", "duckdb"),
)
# Package → (first, last, what is wrong with these, which to install).
_BAD: Final = {
    "deepspeed": ((0, 17, 6), (0, 18, 2), "this one computes wrong ZeRO-2 gradients", "deepspeed>=0.19.6"),
}
_DRIVER: Final = Path("/proc/driver/nvidia/version")


def python_and_packages() -> Iterator[Finding]:
    """Versions against what is known to work."""
    version = sys.version.split()[0]
    yield Finding("python", sys.version_info >= (3, 11), version, "use Python 3.11 or newer")
    for package in PACKAGES:
        try:
            seen = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(package, False, "not installed", "pip install -c constraints.txt -e .")
            continue
        yield judged(package, seen)


def judged(package: str, version: str) -> Finding:
    """Whether this version of a package is one that is known to be bad."""
    first, last, wrong, wanted = _BAD.get(package, ((), (), "", ""))
    bad = bool(first) and first <= _numbers(version) <= last
    return Finding(package, not bad, version, f"pip install '{wanted}': {wrong}" if bad else "")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


def accelerators() -> Iterator[Finding]:
    """torch, CUDA and NCCL; the GPUs and their memory."""
    import torch

    built = torch.version.cuda
    usable = torch.cuda.is_available()
    if _DRIVER.exists() and not usable:
        problem = f"there is an NVIDIA driver, and torch {torch.__version__} (CUDA {built}) cannot use it"
        hint = "install a torch that was built for CUDA, and a driver new enough for it: see `nvidia-smi`"
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
        hint = "end the other processes on it (`nvidia-smi` names them)"
        yield Finding(f"gpu {number}", free > 0.8 * total, f"{facts.name}, {size(free)} of {size(total)} free", hint)


def _nccl(torch: Any) -> Finding:
    if not torch.distributed.is_nccl_available():
        return Finding("nccl", False, "torch was built without it", "install torch from the registry's own wheels")
    return Finding("nccl", True, ".".join(map(str, torch.cuda.nccl.version())))
