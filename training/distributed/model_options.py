"""Switches of `train.engine` that change how a model computes and not what: memory for time, and time for a compiler.

`checkpointing` computes activations again in the backward pass in place of keeping them (Chen et al. 2016,
arXiv:1604.06174); `compile` is torch.compile; `channels_last` lets convolutions see images as [B, H, W, C] in memory.
"""

from __future__ import annotations

import os
import shutil
from typing import Any, Final

import torch

from capstan.pipeline.errors import RecipeError
from capstan.training.config import TrainConfig

# diffusers, transformers, open_clip. Reentrant checkpoints would lose gradients where no input asks for one.
_WAYS: Final[dict[str, dict[str, Any]]] = {
    "enable_gradient_checkpointing": {},
    "gradient_checkpointing_enable": {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "set_grad_checkpointing": {},
}


def apply(model: torch.nn.Module, train: TrainConfig, device: torch.device) -> None:
    """Throw the switches on a bare model, in place: its parameters keep their names.

    Raises RecipeError where the model has no gradient checkpointing, or the machine no compiler.
    """
    engine = train.engine
    if engine.channels_last:
        model.to(memory_format=torch.channels_last)
    if engine.checkpointing and not sum(_checkpoint(child) for child in _outermost(model)):
        hint = "remove it; diffusers, transformers and open_clip models have it"
        raise RecipeError("train.engine.checkpointing", f"{type(model).__name__} has no gradient checkpointing", hint)
    if engine.compile:
        _refuse_without_compiler(device)
        model.compile(dynamic=False)


def place(batch: dict[str, torch.Tensor], train: TrainConfig, device: torch.device) -> dict[str, torch.Tensor]:
    """The batch on the device, its images [B, C, H, W] in the memory format that the model computes in."""
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
    """The largest parts of a model that know gradient checkpointing."""
    if any(hasattr(model, way) for way in _WAYS):
        return [model]
    return [found for child in model.children() for found in _outermost(child)]


def _checkpoint(model: Any) -> int:
    for way, options in _WAYS.items():
        if hasattr(model, way):
            try:
                getattr(model, way)(**options)
            except ValueError:  # diffusers and transformers say so of a class that cannot
                return 0
            return 1
    return 0


def _refuse_without_compiler(device: torch.device) -> None:
    """torch.compile writes C++ (for GPUs C that starts its kernels), and would fail in the midst of the first step."""
    wanted = (os.environ.get("CXX"), "g++", "clang++") if device.type == "cpu" else (os.environ.get("CC"), "gcc", "cc")
    if not any(shutil.which(name) for name in wanted if name):
        names = " or ".join(name for name in wanted[1:] if name)
        raise RecipeError("train.engine.compile", f"needs {names}, and there is none", "install it, or remove the key")
