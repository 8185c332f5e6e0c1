"""Drawing clips by the pipeline of the family `video`"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from capstan.training.drawing.drawer import Drawn, Kind
from capstan.training.models.diffusion.drawer import LatentDrawer
from capstan.training.product import read_facts

_FRAMES, _FPS = 16, 8.0  # of models of other tools: AnimateDiffPipeline's own


class ClipDrawer(LatentDrawer):
    """An AnimateDiffPipeline, the number of frames that it was trained on, and their rate."""

    kind: ClassVar[Kind] = "clip"

    def __init__(self, product: Path, device: torch.device) -> None:
        super().__init__(product, device)
        facts = read_facts(product)
        self.frames, self.fps = int(facts.get("frames", _FRAMES)), float(facts.get("fps", _FPS))

    def arguments(self, prompts: list[str], negative: str | None, guidance: float | None) -> dict[str, Any]:
        return super().arguments(prompts, negative, guidance) | {"num_frames": self.frames}

    def drawn(self, made: np.ndarray) -> Drawn:
        return Drawn("clip", made, fps=self.fps)

    def ceiling(self, images: np.ndarray, batch: int) -> np.ndarray:
        """Return true clips, uint8 [N, frames, H, W, 3], after the autoencoder."""
        return super().ceiling(images.reshape(-1, *images.shape[-3:]), batch).reshape(images.shape)
