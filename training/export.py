"""A finished run → a folder that its library opens without Capstan (`capstan export`)

from diffusers import DiffusionPipeline
DiffusionPipeline.from_pretrained(DIR)("a red circle").images[0]
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any, Literal

from capstan.pipeline.errors import RecipeError
from capstan.training.product import FACTS, family_of, find_product

logger = logging.getLogger(__name__)

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
    partial = target.with_name(f".partial-{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        written = family.export(product, partial, precision=precision, sampler=sampler)
        if (product / FACTS).is_file():
            shutil.copyfile(product / FACTS, partial / FACTS)
        if target.is_dir():
            shutil.rmtree(target)
        partial.rename(target)
    except OSError as error:
        raise RecipeError("DIR", f"cannot write {target} ({error})", "name a writable folder") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    logger.info("export: %s (%.1f MB, %s)", target, size / 1e6, precision)
    return {"folder": str(target), "bytes": size, "precision": precision, "pipeline": written}
