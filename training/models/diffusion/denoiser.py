"""The denoiser: noisy latents, timesteps and text → a prediction; a backbone's network and the text encoders it trains.

Shapes: latents and prediction [B, C, h, w]; timesteps [B]; text as in training.diffusion.text; conditions [B, 6].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from capstan.training.models.diffusion.backbone import Backbone
from capstan.training.models.diffusion.text_encoders import TextEncoders, states_of


class Denoiser(nn.Module):
    """The network under the name that its pipeline gives it, and the text encoders if those are trained too."""

    def __init__(self, backbone: Backbone, net: nn.Module, text: TextEncoders) -> None:
        super().__init__()
        self.backbone = backbone
        self.text_slots = tuple(tower.slot for tower in text.towers)
        self.add_module(backbone.part, net)
        trained = {tower.slot.name: tower.encoder for tower in text.towers} if text.own else {}
        for slot in backbone.slots:
            self.register_module(slot.name, trained.get(slot.name))

    @property
    def net(self) -> Any:
        return getattr(self, self.backbone.part)

    def forward(
        self,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        text: Mapping[str, torch.Tensor],
        conditions: torch.Tensor | None = None,
        kept: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`text` is ids where the text encoders are part of this module, else states.

        `kept` [B, encoders]: whose states are seen at all; the others' are 0.
        """
        states = dict(text)
        for slot in self.text_slots:
            if (encoder := getattr(self, slot.name)) is not None:
                states |= states_of(slot, encoder, text)
        if kept is not None:
            for slot, mine in zip(self.text_slots, kept.unbind(1), strict=True):
                for name in (slot.states, slot.pooled):
                    if name in states:
                        shape = (-1, *[1] * (states[name].dim() - 1))
                        states[name] = states[name] * mine.to(states[name].dtype).view(shape)
        return self.backbone.predict(self.net, noisy, timesteps, states, conditions)

    def enable_gradient_checkpointing(self) -> None:
        """Compute activations again on the way back rather than keep them: less memory, about a third more time."""
        self.net.enable_gradient_checkpointing()
        for slot in self.text_slots:
            if (encoder := getattr(self, slot.name)) is not None:
                encoder.gradient_checkpointing_enable()
