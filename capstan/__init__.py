"""Captioned web images in, a trained text-to-image model out.

    import capstan

    recipe = capstan.load_recipe("recipe.yaml", ["image.size=256"])
    capstan.build(recipe)
    ds = capstan.open("out/ds")
    ds[0].image, ds[0].caption

The names below are the public API (docs/python.md). They are loaded on first use, so that `import capstan` is quick and
needs neither torch nor Ray.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

# capstan.recaption is a function of this API and also a folder: importing the folder first lets the one be both.
import capstan.recaption  # noqa: F401

if TYPE_CHECKING:
    from capstan.api import BuildSummary as BuildSummary
    from capstan.api import build as build
    from capstan.api import load_recipe as load_recipe
    from capstan.api import open as open
    from capstan.api import report as report
    from capstan.api import sample as sample
    from capstan.api import select as select
    from capstan.api import train as train
    from capstan.api import verify as verify
    from capstan.open_dataset import OpenDataset as OpenDataset
    from capstan.open_dataset import Sample as Sample
    from capstan.pipeline.config import Recipe as Recipe
    from capstan.pipeline.errors import CapstanError as CapstanError
    from capstan.pipeline.errors import RecipeError as RecipeError

_HOME = {
    **dict.fromkeys(
        ("BuildSummary", "build", "load_recipe", "open", "report", "sample", "select", "train", "verify"), "capstan.api"
    ),
    **dict.fromkeys(("OpenDataset", "Sample"), "capstan.open_dataset"),
    "Recipe": "capstan.pipeline.config",
    "CapstanError": "capstan.pipeline.errors",
    "RecipeError": "capstan.pipeline.errors",
}

__all__ = [  # noqa: RUF022 - in the order of use
    "load_recipe",
    "build",
    "select",
    "recaption",
    "train",
    "sample",
    "report",
    "verify",
    "open",
    "BuildSummary",
    "OpenDataset",
    "Sample",
    "Recipe",
    "CapstanError",
    "RecipeError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version(_distribution())
    if name not in _HOME:
        raise AttributeError(f"module 'capstan' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _distribution() -> str:
    """Return the name under which this package is installed."""
    from importlib.metadata import packages_distributions

    return packages_distributions().get("capstan", ["capstan-t2i"])[0]


class _Recaption(ModuleType):
    """The folder capstan.recaption, which can be called: `capstan.recaption(recipe)`."""

    def __call__(self, *args: Any, **options: Any) -> dict[str, Any]:
        from capstan.api import recaption

        return recaption(*args, **options)


sys.modules["capstan.recaption"].__class__ = _Recaption
