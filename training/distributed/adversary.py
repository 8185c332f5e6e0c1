"""A second model with its own optimizer to train against: a discriminator

    family.loss(model, …)    the adversary judges the first model's output
    engine.backward(loss)    the first model learns
    Adversary.step()         then the adversary learns, from the same output

A DeepSpeed engine holds one model, so such a run uses DDP. Every worker holds the whole adversary. Its gradients are
averaged here, not by a second DDP wrapper, which allows one forward pass per backward pass: an adversary has three per
step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from capstan.training.distributed.engine import Engine
    from capstan.training.family import Metrics


class Adversary(ABC):
    """A model with its optimizer, active from step `start` on, after `attach`.

    `lr` is its learning rate as a fraction of the first model's at the same step.
    """

    def __init__(
        self, model: torch.nn.Module, *, start: int = 0, lr: float = 1.0, betas: tuple[float, float] = (0.5, 0.9)
    ) -> None:
        self.model, self.start, self.lr, self.betas = model, start, lr, betas
        self.active = False
        self.engine: Engine | None = None
        self.optimizer: torch.optim.Optimizer

    @abstractmethod
    def loss(self) -> tuple[torch.Tensor, Metrics]:
        """Return the adversary's mean loss on the last output it judged (scalar, with gradient), and scalars to log."""

    def attach(self, engine: Engine) -> None:
        """Move to the engine's device and create the optimizer. Every worker must have built the same weights."""
        self.engine = engine
        self.model.to(engine.device).train()
        fused = engine.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.0, betas=self.betas, fused=fused)

    def set_step(self, step: int, lr: float) -> None:
        """Prepare for step `step`, in which the first model has learning rate `lr`."""
        self.active = self.engine is not None and step >= self.start
        for group in self.optimizer.param_groups:
            group["lr"] = lr * self.lr

    def step(self, *, last: bool) -> Metrics:
        """Add the gradient of a part of the step; with the `last` part, average over workers, clip and update weights.

        Returns scalars to log.
        """
        if not self.active or self.engine is None:
            return {}
        train = self.engine.train
        with self.engine.computing():
            loss, metrics = self.loss()
        (loss / train.accumulate).backward()
        if not last:
            return metrics
        self._average_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), train.clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {**metrics, "rival_grad_norm": norm}

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Return the mean of `value` over the workers."""
        if self.engine is None or self.engine.world == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total / self.engine.world

    def _average_gradients(self) -> None:
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        averaged = self.mean(torch.cat([gradient.flatten() for gradient in gradients]))
        pieces = averaged.split([gradient.numel() for gradient in gradients])
        for gradient, piece in zip(gradients, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))

    def state(self) -> dict[str, Any]:
        """Return weights and optimizer state: equal on all workers, but for running statistics, which no step reads."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned, on any number of workers."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
