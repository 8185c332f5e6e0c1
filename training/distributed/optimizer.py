"""The trainable weights of a model → AdamW over them"""

from __future__ import annotations

from typing import Any

import torch

from capstan.training.config import TrainConfig


def adamw(model: torch.nn.Module, train: TrainConfig, fused: bool) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov & Hutter 2019) with weight decay on matrices and kernels only."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if parameter.ndim > 1]
    others = [parameter for parameter in trained if parameter.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": train.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, eps=train.eps, fused=fused)
