"""Drawing with the family `text2scene`: scenes, and what they look like"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Unpack

import numpy as np
import torch

from capstan.training.drawing.drawer import Drawer, Drawn, Kind, Options, refuse_options
from capstan.training.models.own_model import load_own
from capstan.training.models.text2scene.modeling_text2scene import Text2SceneModel
from capstan.training.product import read_facts


class SceneDrawer(Drawer):
    """An opened model that composes scenes; each is also drawn."""

    kind: ClassVar[Kind] = "scene"

    def __init__(self, product: Path, device: torch.device) -> None:
        self.model = load_own(Text2SceneModel, product, "RUN").to(device)
        self.device, self.temperature = device, float(read_facts(product)["sampling"]["temperature"])

    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], *, batch: int = 16, **options: Unpack[Options]
    ) -> Drawn:
        refuse_options(options)
        scenes: list[dict[str, Any]] = []
        for start in range(0, len(prompts), batch):
            part = slice(start, start + batch)
            scenes += self.model.compose(list(prompts[part]), list(seeds[part]), self.temperature)
        listed = np.empty(len(scenes), dtype=object)
        listed[:] = scenes
        drawings = np.stack([np.asarray(self.model.picture(scene)) for scene in scenes])
        return Drawn("scene", listed, drawings=drawings, svgs=[self.model.svg(scene) for scene in scenes])

    def settings(self, *, steps: int | None = None, guidance: float | None = None) -> dict[str, Any]:
        return {"temperature": self.temperature}
