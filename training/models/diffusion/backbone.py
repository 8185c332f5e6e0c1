"""Interface of denoising networks: diffusers class, text slots, pipeline.

A backbone is a file with a class derived from `Backbone`; registry.py returns the one that a recipe names.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from capstan.pipeline.errors import RecipeError, first_line
from capstan.training.models.diffusion.text_encoders import Slot, TextEncoder


@dataclass(frozen=True)
class LatentSpec:
    """Latents [channels, side, side] and the text encoders' widths by slot, between which a network is built."""

    channels: int
    side: int
    widths: Mapping[str, int]  # slot → width of the states
    pooled: Mapping[str, int]  # slot → width of the projected state; 0: not used
    longest: int = 0  # latents along the longest side of any bucket

    @classmethod
    def of(cls, channels: int, side: int, encoders: Iterable[TextEncoder], longest: int = 0) -> LatentSpec:
        by_name = {encoder.slot.name: encoder for encoder in encoders}
        widths = {name: encoder.width for name, encoder in by_name.items()}
        pooled = {name: encoder.pooled_width for name, encoder in by_name.items()}
        return cls(channels, side, widths, pooled, longest)


class Given(NamedTuple):
    """What a network sees in one call."""

    noisy: torch.Tensor  # [B, C, h, w]
    timesteps: torch.Tensor  # [B]
    text: Mapping[str, torch.Tensor]  # states, by the names of text_encoders
    conditions: torch.Tensor | None = None  # [B, ...], of networks that take some


class Backbone(ABC):
    """A kind of network. `config` is its diffusers configuration; keys derived from `LatentSpec` may be missing."""

    part: ClassVar[str]  # its name in the pipeline
    slots: ClassVar[tuple[Slot, ...]]  # the pipeline's text encoders
    shifts: ClassVar[bool] = False  # whether the pipeline applies the autoencoder's shift_factor
    exact_times: ClassVar[bool] = False  # whether it takes FlowMatchEulerDiscreteScheduler
    field: ClassVar[str] = "train.diffusion.config"  # of the recipe, for errors
    conditioned: ClassVar[bool] = False  # whether it takes original size, crop and size (SDXL's micro-conditions)

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = {name: value for name, value in config.items() if not name.startswith("_")}

    def number(self, name: str, default: int) -> int:
        """Return a key of the configuration. Raises RecipeError unless it is a whole number from 1."""
        value = self.config.get(name, default)
        if type(value) is not int or value < 1:
            raise RecipeError(f"{self.field}.{name}", f"{value!r} is not a whole number from 1", f"set e.g. {default}")
        return value

    @property
    def patch(self) -> int:
        """Latents along one side of a patch; images must be whole patches."""
        return self.number("patch_size", 1)

    @property
    def divisor(self) -> int:
        """The number of latents that both sides of training images must be multiples of."""
        return self.patch

    @abstractmethod
    def network(self) -> Any:
        """Return the diffusers class."""

    @abstractmethod
    def derived_config(self, spec: LatentSpec) -> dict[str, Any]:
        """Return the configuration keys that follow from `spec`."""

    @abstractmethod
    def predict(self, net: nn.Module, given: Given) -> torch.Tensor:
        """Return the network's output [B, C, h, w], called as in the pipeline."""

    @abstractmethod
    def pipeline(self, parts: Mapping[str, Any]) -> Any:
        """Build the diffusers pipeline from its parts by name: vae, scheduler, this network, encoders, tokenizers."""

    def check(self, spec: LatentSpec) -> None:  # noqa: B027 - few backbones need it
        """Raise RecipeError if the network does not fit `spec`."""

    def initialize(self, net: nn.Module) -> None:  # noqa: B027 - UNets do not need it
        """Initialise weights as the paper does where diffusers leaves torch's defaults."""

    def build(self, spec: LatentSpec) -> Any:
        """Return a new network, initialised from torch's global generator. Raises RecipeError for bad keys."""
        self.check(spec)
        network, derived = self.network(), self.derived_config(spec)
        known = inspect.signature(network.__init__).parameters
        if unknown := sorted(self.config.keys() - known.keys()):
            raise RecipeError(f"{self.field}.{unknown[0]}", f"is not a key of {network.__name__}", "remove it")
        for name, value in derived.items():
            given = self.config.get(name)
            if given is not None and given != value and name not in ("sample_size", "out_channels"):
                problem = f"is {given}, but the autoencoder and the text encoders require {value}"
                raise RecipeError(f"{self.field}.{name}", problem, "remove it, or use other encoders")
        try:
            net = network(**(self.config | derived))
        except Exception as error:  # diffusers checks few values: a wrong one fails anywhere in its code
            problem = f"{network.__name__} rejects it ({first_line(error)})"
            raise RecipeError(self.field, problem, "see the diffusers documentation") from error
        self.initialize(net)
        return net


def fit_pipeline(pipeline: Any, backbone: Backbone, parts: Mapping[str, Any], **others: Any) -> Any:
    """Return `pipeline` built from `parts`, with None in every empty text slot."""
    empty = {name: None for slot in backbone.slots for name in (slot.name, slot.tokenizer)}
    return pipeline(**(empty | dict(parts)), **others)
