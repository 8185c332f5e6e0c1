"""`capstan doctor`: looks at the machine and a recipe before they are needed; every finding comes with its mend."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.config import load
from pipeline.errors import CapstanError
from pipeline.storage import Storage

PACKAGES = (
    *("torch", "torchvision", "ray", "accelerate", "deepspeed", "diffusers", "transformers"),
    *("open_clip_torch", "webdataset", "s3fs", "pyarrow", "duckdb"),
)
_GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One thing looked at: what, whether it is well, what was seen, and what to do about it."""

    name: str
    ok: bool
    seen: str
    mend: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine(recipe: Path | None = None) -> list[Finding]:
    """Everything that doctor looks at, in the order in which a run would need it."""
    findings = [*_python(), *_machine(), *_extensions()]
    if recipe is not None:
        findings += _recipe(recipe)
    return findings


def show(findings: list[Finding]) -> None:
    """One line a finding on stderr; the mend below what is not well."""
    for finding in findings:
        print(f"{'ok  ' if finding.ok else 'FIX '} {finding.name}: {finding.seen}", file=sys.stderr)
        if not finding.ok:
            print(f"       → {finding.mend}", file=sys.stderr)


def _python() -> Iterator[Finding]:
    version = sys.version.split()[0]
    yield Finding("python", sys.version_info >= (3, 11), version, "use Python 3.11 or newer")
    for package in PACKAGES:
        try:
            seen = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(package, False, "not installed", "pip install -c constraints.txt -e .")
            continue
        bad = package == "deepspeed" and (0, 17, 6) <= _numbers(seen) <= (0, 18, 2)
        yield Finding(
            package, not bad, seen, "pip install 'deepspeed>=0.19.6': this one computes wrong ZeRO-2 gradients"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


def _machine() -> Iterator[Finding]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("cores", True, str(os.cpu_count()))
    yield Finding("memory", memory >= 6 * _GIB, f"{memory / _GIB:.0f} GiB", "8 GiB are what the demo is made for")
    free = shutil.disk_usage(Path.cwd()).free
    yield Finding("disk", free >= 5 * _GIB, f"{free / _GIB:.0f} GiB free here", "free some space")
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    yield Finding("gpus", True, str(gpus) if gpus else "none: training runs on gloo, on the CPU")


def _extensions() -> Iterator[Finding]:
    """A build of a torch extension that was killed leaves a lock on which every later run waits for ever."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    locks = sorted(root.glob("**/lock")) if root.exists() else []
    seen = ", ".join(str(lock) for lock in locks) or "no stale lock"
    yield Finding("torch extensions", not locks, seen, "if no build is running, delete the lock")


def _recipe(path: Path) -> Iterator[Finding]:
    try:
        recipe = load(path)
        yield Finding("recipe", True, str(path))
        Storage(recipe.dataset, recipe.storage).check_writable()
        yield Finding("dataset", True, f"{recipe.dataset} can be written")
    except CapstanError as error:
        yield Finding("recipe", False, str(error), getattr(error, "mend", "see above"))
