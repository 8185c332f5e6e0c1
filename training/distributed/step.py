"""An optimizer step as a family sees it: the parts of all workers, and sums over them

Each worker processes its share of the batch in `parts` parts. The engine averages the gradients of the parts' losses
over parts and workers, so a loss that is not a mean over equally many things must know the whole step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Step:
    """Where this worker stands in a step; the default is one worker that processes the batch in one part."""

    parts: int = 1
    rank: int = 0
    world: int = 1
    seed: int = 0  # of torch's global generator, which dropout draws from, on this worker
    number: int = 0  # 0, 1, …: for weights and temperatures that change during a run

    @property
    def shares(self) -> int:
        """Return the number of losses that are averaged: parts × workers."""
        return self.parts * self.world

    def reseed(self, part: int) -> None:
        """Seed torch's global generator for a part, so that a second pass over it drops the same values."""
        torch.manual_seed((self.seed + part) % 2**63)

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of the workers' tensors, on their device; the same on all workers."""
        if self.world == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the workers' tensors [N, ...], joined by rank along the first dimension, without gradient."""
        if self.world == 1:
            return tensor.detach()
        shares = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(shares, tensor.detach().contiguous())
        return torch.cat(shares)
