"""Drawing with the family `audiovideo`: clips with their sound"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Unpack

import numpy as np
import torch

from capstan.pipeline.errors import CapstanError
from capstan.training.data.sounds import Form
from capstan.training.drawing.drawer import Drawer, Drawn, Kind, Options, refuse_options
from capstan.training.models.audiovideo.modeling_audiovideo import AudioVideoModel, Made
from capstan.training.models.oobleck.model import reconstruct, settle
from capstan.training.models.own_model import load_own


class FilmDrawer(Drawer):
    """An opened model, and its default sampling settings."""

    kind: ClassVar[Kind] = "film"

    def __init__(self, product: Path, device: torch.device) -> None:
        self.model = load_own(AudioVideoModel, product, "RUN").to(device)
        settle(self.model.oobleck)
        self.device, config = device, self.model.config
        self.form = Form(config.rate, int(config.oobleck["audio_channels"]), config.values)

    def settings(self, *, steps: int | None = None, guidance: float | None = None) -> dict[str, Any]:
        config = self.model.config
        return {"steps": steps or config.steps, "guidance": config.guidance if guidance is None else guidance}

    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], *, batch: int = 16, **options: Unpack[Options]
    ) -> Drawn:
        refuse_options({"size": options.get("size")})
        made = []
        for start in range(0, len(prompts), batch):
            part = slice(start, start + batch)
            made.append(
                self.model.generate(
                    list(prompts[part]),
                    list(seeds[part]),
                    steps=options.get("steps"),
                    guidance=options.get("guidance"),
                    negative=options.get("negative") or "",
                )
            )
        frames, sounds = (torch.cat(parts).numpy() for parts in zip(*made, strict=True))
        if not np.isfinite(sounds).all():
            raise CapstanError("sample: the sounds are not finite. Fix: use an earlier state of the run")
        return Drawn("film", frames, fps=self.model.config.fps, rate=self.form.rate, sounds=sounds)

    def ceiling(self, images: np.ndarray, batch: int) -> np.ndarray:
        """Return true films [N], (frames, sound) each, after both autoencoders."""
        made = np.empty(len(images), dtype=object)
        for number, (frames, sound) in enumerate(images):
            pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).to(self.device) / 127.5 - 1
            with torch.no_grad():
                latents = self.model.vae.encode(pixels).latent_dist.mode() * self.model.vae.config.scaling_factor
            heard = reconstruct(self.model.oobleck, torch.from_numpy(sound.T.copy())[None], 1)
            empty = torch.zeros(1, self.model.config.oobleck["decoder_input_channels"], 1, device=self.device)
            shown: Made = self.model.decode(latents.transpose(0, 1)[None], empty)
            made[number] = (shown.frames[0].numpy(), heard[0].T.numpy())
        return made
