"""train.engine's checkpointing, compile and channels_last

They change how a model computes, not what. `checkpointing` recomputes activations in the backward pass instead of
storing them (Chen et al. 2016, arXiv:1604.06174). `compile` is torch.compile. `channels_last` stores images as
[B, H, W, C] in memory for convolutions.
"""

from __future__ import annotations

import os
import shutil
from typing import Any, Final

import torch

from capstan.pipeline.errors import RecipeError
from capstan.training.config import TrainConfig

# diffusers, transformers, open_clip. Reentrant checkpoints would lose gradients if no input requires one.
_METHODS: Final[dict[str, dict[str, Any]]] = {
    "enable_gradient_checkpointing": {},
    "gradient_checkpointing_enable": {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "set_grad_checkpointing": {},
}


def apply(model: torch.nn.Module, train: TrainConfig, device: torch.device) -> None:
    """Apply the options to an unwrapped model, in place: its parameters keep their names.

    Raises RecipeError if the model has no gradient checkpointing, or the machine no compiler.
    """
    engine = train.engine
    if engine.channels_last:
        model.to(memory_format=torch.channels_last)
    if engine.checkpointing and not sum(_checkpoint(child) for child in _outermost(model)):
        hint = "remove it; diffusers, transformers and open_clip models support it"
        raise RecipeError("train.engine.checkpointing", f"{type(model).__name__} has no gradient checkpointing", hint)
    if engine.compile:
        _refuse_without_compiler(device)
        model.compile(dynamic=False)


def place(batch: dict[str, torch.Tensor], train: TrainConfig, device: torch.device) -> dict[str, torch.Tensor]:
    """Move the batch to the device, its images [B, C, H, W] in the model's memory format."""
    last = train.engine.channels_last
    return {
        name: tensor.to(
            device,
            non_blocking=True,
            memory_format=torch.channels_last if last and tensor.ndim == 4 else torch.preserve_format,
        )
        for name, tensor in batch.items()
    }


def _outermost(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the outermost modules of a model that support gradient checkpointing."""
    if any(hasattr(model, method) for method in _METHODS):
        return [model]
    return [module for child in model.children() for module in _outermost(child)]


def _checkpoint(model: Any) -> int:
    for method, options in _METHODS.items():
        if hasattr(model, method):
            try:
                getattr(model, method)(**options)
            except ValueError:  # raised by diffusers and transformers if a class does not support it
                return 0
            return 1
    return 0


def _refuse_without_compiler(device: torch.device) -> None:
    """Raise RecipeError without a compiler: torch.compile needs C++ (on GPUs C) and would fail in the first step."""
    wanted = (os.environ.get("CXX"), "g++", "clang++") if device.type == "cpu" else (os.environ.get("CC"), "gcc", "cc")
    if not any(shutil.which(name) for name in wanted if name):
        names = " or ".join(name for name in wanted[1:] if name)
        raise RecipeError(
            "train.engine.compile", f"requires {names}, which is not installed", "install it, or remove the key"
        )
