"""The image run that a model of clips starts from: a StableDiffusionPipeline's folder"""

from __future__ import annotations

import json
from pathlib import Path

from capstan.pipeline.errors import RecipeError
from capstan.training.product import find_product


def find_image_run(path: str, field: str, needed: str) -> Path:
    """Return the folder of the image run's pipeline at `path`, which the recipe's key `field` names.

    Raises RecipeError if it is of another kind; `needed` says what for, as in "motion modules need".
    """
    product = find_product(path, field)
    index = product / "model_index.json"
    kind = json.loads(index.read_text(encoding="utf-8")).get("_class_name", "") if index.is_file() else ""
    if kind != "StableDiffusionPipeline":
        found = f"a {kind}" if kind else "no pipeline"
        problem = f"{product} is {found}; {needed} a StableDiffusionPipeline"
        raise RecipeError(field, problem, "name a run of model: diffusion with train.diffusion.unet")
    return product
