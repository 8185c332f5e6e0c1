"""A finished run → a folder that its library opens without Capstan (`capstan export`)

from diffusers import DiffusionPipeline
DiffusionPipeline.from_pretrained(DIR)("a red circle").images[0]
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage.local import disk_errors, partial_of, sweep_folders
from capstan.training.product import FACTS, family_of, find_product

logger = logging.getLogger(__name__)

T = TypeVar("T")

Precision = Literal["fp32", "fp16", "bf16"]


def export(
    run: str | Path, folder: str | Path, *, precision: Precision = "fp32", sampler: str | None = None
) -> dict[str, Any]:
    """Write the model of `run` into `folder`, whole or not at all, as its family does; return a summary.

    A diffusers pipeline has its networks as safetensors in `precision`, the tokenizers, the scheduler of the recipe or
    of `sampler`, and model_index.json. Replaces an earlier export. Raises RecipeError if the folder holds anything
    else.
    """
    target = Path(folder)
    earlier = any((target / name).is_file() for name in ("model_index.json", FACTS))
    if target.is_dir() and any(target.iterdir()) and not earlier:
        raise RecipeError("DIR", f"{target} is not empty and is not an earlier export", "name a new folder")
    product = find_product(run)
    if target.resolve() == product.resolve():
        raise RecipeError("DIR", f"{target} is the model itself", "name another folder")
    family = family_of(product)
    if family is None:
        raise RecipeError("RUN", f"{product} is of an unknown format", "name a run of Capstan's, or its product")

    def write(folder: Path) -> str:
        written = family.export(product, folder, precision=precision, sampler=sampler)
        if (product / FACTS).is_file():
            shutil.copyfile(product / FACTS, folder / FACTS)
        return written

    try:
        with disk_errors(target.parent):
            written = _publish(target, write)
    except OSError as error:
        raise RecipeError("DIR", f"cannot write {target} ({error})", "name a writable folder") from None
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    logger.info("export: %s (%.1f MB, %s)", target, size / 1e6, precision)
    return {"folder": str(target), "bytes": size, "precision": precision, "pipeline": written}


def _publish(target: Path, fill: Callable[[Path], T]) -> T:
    """Let `fill` write a folder, then put it in the place of `target`, which is whole before and after.

    Of two processes that export at once, the later one wins.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep_folders(target.parent, target.name)
    partial, before = partial_of(target), partial_of(target)
    try:
        filled = fill(partial)
        parent = os.open(target.parent, os.O_RDONLY)
        try:
            fcntl.flock(parent, fcntl.LOCK_EX)
            _replace(target, partial, before)
        finally:
            os.close(parent)
    finally:
        for folder in (partial, before):
            shutil.rmtree(folder, ignore_errors=True)
    return filled


def _replace(target: Path, new: Path, aside: Path) -> None:
    """Put `new` in the place of `target`, and that `aside`."""
    if target.is_dir():
        target.rename(aside)
    try:
        new.rename(target)
    except OSError:
        if aside.is_dir():
            aside.rename(target)
        raise
