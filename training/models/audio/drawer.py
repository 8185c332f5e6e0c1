"""Drawing with the family `audio`: sounds by diffusers' StableAudioPipeline"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Unpack

import numpy as np
import torch

from capstan.pipeline.errors import CapstanError
from capstan.training.drawing.drawer import Drawer, Drawn, Kind, Options, refuse_options
from capstan.training.models.noise.drawer import open_pipeline
from capstan.training.models.oobleck.model import reconstruct, settle
from capstan.training.models.precision import FiniteChecks, frozen_outside_autocast
from capstan.training.product import read_facts


class SoundDrawer(Drawer):
    """A StableAudioPipeline and its default sampling settings."""

    kind: ClassVar[Kind] = "sound"

    def __init__(self, product: Path, device: torch.device) -> None:
        self.pipeline, self.device = open_pipeline(product, device), device
        settle(self.pipeline.vae)
        sampling = {"steps": 100, "guidance": 7.0} | read_facts(product).get("sampling", {})
        self.steps, self.guidance = int(sampling["steps"]), float(sampling["guidance"])

    def settings(self, *, steps: int | None = None, guidance: float | None = None) -> dict[str, Any]:
        return {"steps": steps or self.steps, "guidance": self.guidance if guidance is None else guidance}

    def draw(
        self, prompts: Sequence[str], seeds: Sequence[int], *, batch: int = 16, **options: Unpack[Options]
    ) -> Drawn:
        """Draw sounds as long as the model's; each one's noise depends on its seed, not on its batch."""
        refuse_options({"size": options.get("size")})
        guidance = options.get("guidance")
        sounds = []
        for start in range(0, len(prompts), batch):
            part = list(prompts[start : start + batch])
            negative = options.get("negative")
            sounds.append(
                self._sounds(
                    prompt=part,
                    negative_prompt=None if negative is None else [negative] * len(part),
                    num_inference_steps=options.get("steps") or self.steps,
                    guidance_scale=self.guidance if guidance is None else guidance,
                    generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds[start : start + batch]],
                )
            )
        return Drawn("sound", np.concatenate(sounds), rate=int(self.pipeline.vae.config.sampling_rate))

    def _sounds(self, **arguments: Any) -> np.ndarray:
        """Return the sounds of a call, float32 [N, values, channels]. Raises CapstanError if they are not finite."""
        checks = FiniteChecks()
        with torch.no_grad(), frozen_outside_autocast(self.pipeline), checks.watching(self.pipeline):
            sounds: np.ndarray = self.pipeline(**arguments, output_type="np").audios
        bad = checks.first_bad()
        if bad is not None or not np.isfinite(sounds).all():
            problem = (
                f"sample: the sounds are not finite; the first values that are not came from the {bad or 'decoder'}"
            )
            raise CapstanError(f"{problem}. Fix: use weights in fp32 or bf16, or an earlier state of the run")
        return sounds.transpose(0, 2, 1).clip(-1, 1).astype(np.float32)

    def ceiling(self, images: np.ndarray, batch: int) -> np.ndarray:
        """Return true sounds, float32 [N, values, channels], after the autoencoder."""
        sounds = torch.from_numpy(images).permute(0, 2, 1)
        made: np.ndarray = reconstruct(self.pipeline.vae, sounds, batch).permute(0, 2, 1).numpy()
        return made
