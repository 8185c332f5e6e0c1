"""A frozen CLIP text encoder as `capstan encode` runs it: texts → states, the same as while training."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from training.diffusion.model import load_text_encoder


class FrozenText:
    """`train.diffusion.text.pretrained`; see `training.family.TextEncoder`."""

    def __init__(self, path: str) -> None:
        self.encoder, self.tokenizer = load_text_encoder(path, "train.diffusion.text.pretrained")
        self.encoder.eval().requires_grad_(False)

    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for name, weight in sorted(self.encoder.state_dict().items()):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(weight.cpu().float().numpy()).tobytes())
        vocabulary = hashlib.sha256(str(sorted(self.tokenizer.get_vocab().items())).encode()).hexdigest()
        return {"weights": digest.hexdigest(), "vocabulary": vocabulary, "length": self.tokenizer.model_max_length}

    def to(self, device: torch.device) -> object:
        return self.encoder.to(device)

    def __call__(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """`text_states`: the last hidden states [B, L, W]."""
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(
            list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return {"text_states": self.encoder(tokens.input_ids.to(self.encoder.device))[0]}
