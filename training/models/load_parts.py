"""A product's folder → the weights of a model's parts, each in a folder of its name"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capstan.pipeline.errors import RecipeError


def load_parts(parts: Mapping[str, Any], product: Path) -> None:
    """Load each part's weights from its folder in another run's product. Raises RecipeError if they do not fit."""
    try:
        for name, module in parts.items():
            module.load_state_dict(type(module).from_pretrained(product / name).state_dict())
    except (OSError, RuntimeError, ValueError) as error:
        problem = f"{product} has a different shape ({error})"
        raise RecipeError("train.init", problem, "use the settings of that run") from None
