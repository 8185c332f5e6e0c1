"""The trainable module: a backbone's network and its trained text encoders.

Shapes: latents and prediction [B, C, h, w]; timesteps [B]; text as in text_encoders; conditions [B, 6].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from capstan.training.models.diffusion.backbone import Backbone, Given
from capstan.training.models.diffusion.text_encoders import TextEncoders, states_of


class Denoiser(nn.Module):
    """The network, under its name in the pipeline, and the text encoders if they are trained too."""

    def __init__(self, backbone: Backbone, net: nn.Module, text: TextEncoders) -> None:
        super().__init__()
        self.backbone = backbone
        self.text_slots = tuple(encoder.slot for encoder in text.encoders)
        self.add_module(backbone.part, net)
        trained = {encoder.slot.name: encoder.encoder for encoder in text.encoders} if text.own else {}
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
        """Return the prediction. `text` is ids if the text encoders are part of this module, else states.

        `kept` [B, encoders]: whether a sample sees an encoder's states; the others are set to 0.
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
        return self.backbone.predict(self.net, Given(noisy, timesteps, states, conditions))

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass: less memory, about a third more time."""
        self.net.enable_gradient_checkpointing()
        for slot in self.text_slots:
            if (encoder := getattr(self, slot.name)) is not None:
                encoder.gradient_checkpointing_enable()
