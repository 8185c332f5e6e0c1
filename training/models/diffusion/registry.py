"""`train.diffusion` → its backbone, by preset, config or unet."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from capstan.pipeline.errors import RecipeError
from capstan.training.models.diffusion import presets, unet
from capstan.training.models.diffusion.backbone import Backbone
from capstan.training.models.diffusion.config import DiffusionSettings
from capstan.training.models.diffusion.dit import DiT
from capstan.training.models.diffusion.mmdit import MMDiT
from capstan.training.models.diffusion.unet import UNet, XlUNet

_FIELD: Final = "train.diffusion.config"
_CLASSES: Final = {presets.DIT: DiT, presets.MMDIT: MMDiT}  # by diffusers' names
_PARTS: Final = ("unet", "transformer")  # subfolders of a pipeline that can hold its network


def backbone_of(settings: DiffusionSettings) -> Backbone:
    """Return the recipe's backbone, not built yet. Raises RecipeError if the configuration names an unknown network."""
    if settings.preset is None and settings.config is None:
        return UNet(unet.configuration(settings.unet))
    config = presets.configuration(settings.preset) if settings.preset else {}
    config |= _read(settings.config) if isinstance(settings.config, str) else settings.config or {}
    return _by_class(config)


def _by_class(config: Mapping[str, Any]) -> Backbone:
    name = config.get("_class_name")
    if name == presets.UNET:
        kind = config.get("addition_embed_type")
        if kind not in (None, "text_time"):
            problem = f"is {kind}, which no text-to-image pipeline supports"
            raise RecipeError(f"{_FIELD}.addition_embed_type", problem, "use text_time (SDXL), or null")
        return XlUNet({"addition_time_embed_dim": 256} | dict(config)) if kind else UNet(config)
    if name not in _CLASSES:
        hint = f"use one of {', '.join(sorted((presets.UNET, *_CLASSES)))}"
        raise RecipeError(f"{_FIELD}._class_name", f"no backbone {name!r}", hint)
    return _CLASSES[name](config)


def _read(path: str) -> dict[str, Any]:
    """Read a config.json given by its path, its folder, or the pipeline folder around it."""
    named = Path(path)
    tried = [named, named / "config.json", *(named / part / "config.json" for part in _PARTS)]
    file = next((file for file in tried if file.is_file()), None)
    hint = "set a diffusers config.json, or a folder with one"
    if file is None:
        raise RecipeError(_FIELD, f"no configuration at {named}", hint)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(_FIELD, f"cannot read {file} ({error})", hint) from None
    if not isinstance(config, dict):
        raise RecipeError(_FIELD, f"{file} is not a configuration", hint)
    return config
