"""What a network between noise and prediction must say of itself: its diffusers class, its text slots, its pipeline.

A backbone is a file with a class derived from `Backbone`; training.diffusion.backbones says which one a recipe means.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from capstan.pipeline.errors import RecipeError
from capstan.training.models.diffusion.text_encoders import Slot, TextEncoder

_FIELD = "train.diffusion.config"


@dataclass(frozen=True)
class LatentSpec:
    """What the network is fastened to: latents [channels, side, side], and text encoders of these widths by slot."""

    channels: int
    side: int
    widths: Mapping[str, int]  # of the states
    pooled: Mapping[str, int]  # of the projected state; 0: none
    longest: int = 0  # latents along the longest side of any bucket

    @classmethod
    def of(cls, channels: int, side: int, towers: Iterable[TextEncoder], longest: int = 0) -> LatentSpec:
        by_name = {tower.slot.name: tower for tower in towers}
        widths = {name: tower.width for name, tower in by_name.items()}
        pooled = {name: tower.pooled_width for name, tower in by_name.items()}
        return cls(channels, side, widths, pooled, longest)


class Backbone(ABC):
    """One kind of network. `config` is its diffusers configuration; what follows from `LatentSpec` may be left out."""

    part: ClassVar[str]  # its name in the pipeline
    slots: ClassVar[tuple[Slot, ...]]  # the pipeline's text encoders
    shifts: ClassVar[bool] = False  # whether the pipeline applies the autoencoder's shift_factor
    exact_times: ClassVar[bool] = False  # whether it takes FlowMatchEulerDiscreteScheduler
    conditioned: ClassVar[bool] = False  # whether it is told original size, crop and size (SDXL's micro-conditions)

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = {name: value for name, value in config.items() if not name.startswith("_")}

    @property
    def patch(self) -> int:
        """Latents along a side of a patch: those of an image are whole patches."""
        return int(self.config.get("patch_size", 1))

    @property
    def divisor(self) -> int:
        """By how many latents both sides of what is trained on must divide."""
        return self.patch

    @abstractmethod
    def network(self) -> Any:
        """The diffusers class."""

    @abstractmethod
    def follows(self, ends: LatentSpec) -> dict[str, Any]:
        """The keys of the configuration that follow from `ends`."""

    @abstractmethod
    def predict(
        self,
        net: nn.Module,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        text: Mapping[str, torch.Tensor],
        conditions: torch.Tensor | None,
    ) -> torch.Tensor:
        """The network's output [B, C, h, w], called as the pipeline calls it; `text` as `TextEncoders.states` gives."""

    @abstractmethod
    def pipeline(self, parts: Mapping[str, Any]) -> Any:
        """The diffusers pipeline of its parts by name: vae, scheduler, this network, encoders and tokenizers."""

    def check(self, ends: LatentSpec) -> None:  # noqa: B027 - few need it
        """Raises RecipeError where the network does not go with `ends`."""

    def initialise(self, net: nn.Module) -> None:  # noqa: B027 - UNets do not need it
        """Make good what diffusers leaves at torch's defaults and the paper does not."""

    def build(self, ends: LatentSpec) -> Any:
        """A new network, drawn from torch's global generator. Raises RecipeError where the configuration is none."""
        self.check(ends)
        network, follows = self.network(), self.follows(ends)
        known = inspect.signature(network.__init__).parameters
        if unknown := sorted(self.config.keys() - known.keys()):
            raise RecipeError(f"{_FIELD}.{unknown[0]}", f"is no key of {network.__name__}", "remove it")
        for name, value in follows.items():
            given = self.config.get(name)
            if given is not None and given != value and name not in ("sample_size", "out_channels"):
                problem = f"is {given}, and the autoencoder and the text encoders make it {value}"
                raise RecipeError(f"{_FIELD}.{name}", problem, "leave it out, or name others")
        try:
            net = network(**(self.config | follows))
        except (TypeError, ValueError, NotImplementedError, AttributeError) as error:
            raise RecipeError(_FIELD, f"{network.__name__} refuses it ({error})", "see diffusers' own pages") from None
        self.initialise(net)
        return net


def fit_pipeline(pipeline: Any, backbone: Backbone, parts: Mapping[str, Any], **others: Any) -> Any:
    """`pipeline` made of `parts`, with None in every text slot that is empty."""
    empty = {name: None for slot in backbone.slots for name in (slot.name, slot.tokenizer)}
    return pipeline(**(empty | dict(parts)), **others)
