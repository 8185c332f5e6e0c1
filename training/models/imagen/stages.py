"""The stages of a cascade, each a diffusers pipeline in a folder of its own

base/       IFPipeline                   text → image, with the T5
super/      IFSuperResolutionPipeline    text and image → larger image; takes the T5's states
super_2/    …
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Final

from capstan.pipeline.errors import RecipeError
from capstan.training.product import find_product, read_facts

INDEX: Final = "model_index.json"
_PIPELINES: Final = ("IFPipeline", "IFSuperResolutionPipeline")


def stage_name(number: int) -> str:
    """Return the folder of a stage: base, super, super_2, …"""
    return ("base", "super")[number] if number < 2 else f"super_{number}"


def stages_of(product: Path) -> list[Path]:
    """Return the folders of a cascade's stages, in order; one, if the product is itself the folder of a pipeline."""
    if (product / INDEX).is_file():
        return [product]
    found: list[Path] = []
    while (folder := product / stage_name(len(found))).is_dir():
        found.append(folder)
    return found


def stages_before(run: str, field: str) -> list[Path]:
    """Return the stages of the run that a stage follows. Raises RecipeError naming `field` if it has none."""
    product = find_product(run, field)
    found = stages_of(product)
    kinds = [_read(folder / INDEX).get("_class_name") for folder in found if (folder / INDEX).is_file()]
    if not found or kinds != [_PIPELINES[min(number, 1)] for number in range(len(found))]:
        raise RecipeError(
            field, f"{product} is not a cascade of pipelines on pixels", "name a run of the family imagen"
        )
    return found


def side_of(stage: Path) -> int:
    """Return the side in pixels of the images that a stage draws."""
    return int(_read(stage / "unet" / "config.json")["sample_size"])


def copy_stages(stages: list[Path], folder: Path) -> None:
    """Copy the stages of another product into `folder`, under their names."""
    for number, stage in enumerate(stages):
        shutil.copytree(stage, folder / stage_name(number))


def sampling_of(product: Path) -> list[dict[str, Any]]:
    """Return each stage's sampling settings; of a product from another tool, none."""
    return list(read_facts(product).get("stages", []))


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
