"""Precision of frozen parts, and which part of a pipeline made a NaN.

Under autocast to fp16 an autoencoder with `force_upcast` and T5 overflow. Frozen parts therefore run outside autocast,
in the precision of their weights: fp32, or bf16 for text encoders stored in bf16.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from capstan.training.family import finite


def outside_autocast(device: torch.device) -> torch.autocast:
    """Return a context in which operations run in the precision of their operands."""
    return torch.autocast(device.type, enabled=False)


def needs_upcast(vae: Any) -> bool:
    """Return whether an autoencoder overflows in half precision: diffusers' `force_upcast`, by default true."""
    return bool(vae.config.get("force_upcast", True))


@contextlib.contextmanager
def frozen_outside_autocast(pipeline: Any) -> Iterator[None]:
    """Run the text encoders of a diffusers pipeline, and its autoencoder if it needs it, outside any autocast."""
    vae: Any = getattr(pipeline, "vae", None)  # pixel models have none
    encoders = [part for name, part in _parts(pipeline) if name.startswith("text_encoder")]
    decode: Any = getattr(vae, "decode", None)

    def decode_outside(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with outside_autocast(latents.device):
            return decode(latents.to(vae.dtype), *args, **kwargs)

    with contextlib.ExitStack() as stack:
        if vae is not None and needs_upcast(vae):
            vae.decode = decode_outside
            stack.callback(delattr, vae, "decode")
        for encoder in encoders:
            encoder.forward = outside_autocast(encoder.device)(encoder.forward)
            stack.callback(delattr, encoder, "forward")
        yield


class FiniteChecks:
    """Checks of all that the parts of a pipeline compute, in order of time, without waiting for the device."""

    def __init__(self) -> None:
        self._checks: list[tuple[str, torch.Tensor]] = []

    @contextlib.contextmanager
    def watching(self, pipeline: Any) -> Iterator[None]:
        """Check the outputs of text encoders, network and decoder, and the latents that the scheduler computes."""
        with contextlib.ExitStack() as stack:
            for name, part in _parts(pipeline):
                watched = part.decoder if name == "vae" else part
                if not name.startswith("text_encoder"):
                    stack.callback(watched.register_forward_pre_hook(self._before, with_kwargs=True).remove)
                stack.callback(watched.register_forward_hook(self._after(name)).remove)
            yield

    def first_bad(self) -> str | None:
        """Return the part whose output was the first that is not finite, or None. Waits for the device."""
        if not self._checks:
            return None
        flags = torch.stack([flag.cpu() for _, flag in self._checks]).tolist()
        return next((name for (name, _), good in zip(self._checks, flags, strict=True) if not good), None)

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        latents = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
        self._checks.append(("scheduler", finite(_tensors(latents))))

    def _after(self, name: str) -> Any:
        def check(_: nn.Module, __: Any, output: Any) -> None:
            self._checks.append((name, finite(_tensors(output))))

        return check


def _parts(pipeline: Any) -> list[tuple[str, Any]]:
    return [(name, part) for name, part in pipeline.components.items() if isinstance(part, nn.Module)]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in an output: a tensor, a tuple of outputs, or a mapping."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (tensor for inner in value.values() for tensor in _tensors(inner))
    elif isinstance(value, tuple | list):
        yield from (tensor for inner in value for tensor in _tensors(inner))
