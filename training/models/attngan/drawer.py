"""Drawing with the family `attngan`: images, images with shuffled attention, and what each word attends to"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, Unpack

import numpy as np
import torch

from capstan.training.drawing.drawer import Drawer, Drawn, Kind, Options, refuse_options
from capstan.training.drawing.grid import grid
from capstan.training.models.damsm.modeling_attngan import AttnGANModel, split
from capstan.training.models.own_model import load_own

_WORDS: Final = 7  # of a prompt, whose attention is shown
_PROMPTS: Final = 6


class AttnganDrawer(Drawer):
    """An opened AttnGAN."""

    kind: ClassVar[Kind] = "image"

    def __init__(self, product: Path, device: torch.device) -> None:
        self.model, self.device = load_own(AttnGANModel, product, "RUN").to(device), device

    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], *, batch: int = 16, **options: Unpack[Options]
    ) -> Drawn:
        refuse_options(options)
        return Drawn("image", self._drawn(prompts, seeds, batch, shuffled=False))

    def ablated(self, prompts: Sequence[str], seeds: Sequence[int], batch: int) -> Mapping[str, np.ndarray]:
        """Return the images with each word's attention given to another word of its prompt."""
        return {"shuffled_attention": self._drawn(prompts, seeds, batch, shuffled=True)}

    def explained(self, prompts: Sequence[str], seeds: Sequence[int]) -> Any:
        """Return a sheet: an image per row, then the words that hold most of one place, bright where they do."""
        prompts, seeds = prompts[:_PROMPTS], seeds[:_PROMPTS]
        made = self.model.made(prompts, seeds)
        images = self.model.pixels(made.images[-1])
        side, cells, labels = images.shape[1], [], []
        for row, prompt in enumerate(prompts):
            words = split(prompt)[: self.model.config.words]
            maps = made.attention[-1][row, : len(words)].float().cpu()
            cells.append(images[row])
            labels.append(prompt)
            for word in maps.amax((1, 2)).argsort(descending=True, stable=True)[:_WORDS].tolist():
                cells.append(_bright(maps[word].numpy(), side))
                labels.append(f"{words[word]} ({float(maps[word].max()):.2f})")
            missing = (row + 1) * (1 + _WORDS) - len(cells)  # of a prompt with few words
            cells += [np.full_like(images[0], 255)] * missing
            labels += [""] * missing
        return grid(np.stack(cells), labels, columns=1 + _WORDS, cell=128)

    def _drawn(self, prompts: Sequence[str], seeds: Sequence[int], batch: int, *, shuffled: bool) -> np.ndarray:
        drawn = []
        for start in range(0, len(prompts), batch):
            part = slice(start, start + batch)
            made = self.model.made(prompts[part], seeds[part], shuffled=shuffled)
            drawn.append(self.model.pixels(made.images[-1]))
        return np.concatenate(drawn)


def _bright(weights: np.ndarray, side: int) -> np.ndarray:
    """Return attention weights [h, w] as a grey image [side, side, 3], white at the largest."""
    grey = (255 * weights / max(float(weights.max()), 1e-9)).astype(np.uint8)
    grown = grey.repeat(side // len(grey), 0).repeat(side // grey.shape[1], 1)
    return np.repeat(grown[:, :, None], 3, axis=2)
