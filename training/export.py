"""A finished diffusion run → a folder that diffusers opens (`capstan export`)

from diffusers import DiffusionPipeline
DiffusionPipeline.from_pretrained(DIR)("a red circle").images[0]
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any, Final, Literal

from capstan.pipeline.errors import CapstanError, RecipeError
from capstan.training.models.diffusion.schedulers import SamplerName
from capstan.training.product import FACTS, find_product, read_facts
from capstan.training.sample import open_sampler

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "fp16", "bf16"]
_TORCH: Final = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def export(
    run: str | Path, folder: str | Path, *, precision: Precision = "fp32", sampler: SamplerName | None = None
) -> dict[str, Any]:
    """Write the pipeline of `run` into `folder`, whole or not at all; return a summary.

    The folder holds the UNet or transformer, autoencoder and text encoders as safetensors in `precision`, the
    tokenizers, the scheduler of the recipe or of `sampler`, and model_index.json. Replaces an earlier export. Raises
    RecipeError if the folder holds anything else.
    """
    import torch

    target = Path(folder)
    if target.is_dir() and any(target.iterdir()) and not (target / "model_index.json").is_file():
        raise RecipeError("DIR", f"{target} is not empty and is not an earlier export", "name a new folder")
    product = find_product(run)
    if target.resolve() == product.resolve():
        raise RecipeError("DIR", f"{target} is the model itself", "name another folder")
    if (chunks := read_facts(product).get("text_chunks", 1)) > 1:
        problem = f"{product} reads prompts in {chunks} chunks, and a diffusers pipeline reads one"
        raise RecipeError("RUN", problem, "use capstan sample, or train with train.diffusion.text.chunks: 1")
    pipeline = open_sampler(run, device="cpu", sampler=sampler).pipeline
    _check_weights(pipeline, precision)
    pipeline.to(dtype=getattr(torch, _TORCH[precision]))
    partial = target.with_name(f".partial-{target.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        pipeline.save_pretrained(partial, safe_serialization=True)
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
    return {"folder": str(target), "bytes": size, "precision": precision, "pipeline": type(pipeline).__name__}


def _check_weights(pipeline: Any, precision: Precision) -> None:
    """Raise CapstanError for weights that are not finite, RecipeError for those that `precision` cannot hold."""
    import torch

    largest = torch.finfo(getattr(torch, _TORCH[precision])).max
    for name, part in pipeline.components.items():
        weights = part.state_dict() if isinstance(part, torch.nn.Module) else {}
        for key, weight in weights.items():
            if not weight.is_floating_point():
                continue
            if not weight.isfinite().all():
                raise CapstanError(f"export: {name} has weights that are not finite ({key}). Fix: use an earlier state")
            if overflowing := int((weight.abs() > largest).sum()):
                problem = (
                    f"{precision} cannot hold {overflowing} weights of {name} ({key}: up to {weight.abs().max():.3g})"
                )
                raise RecipeError("--precision", problem, "use bf16 or fp32")
