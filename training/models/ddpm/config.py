"""The recipe's section `train.ddpm`: network, text, noise, variance."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from capstan.pipeline.config import Section
from capstan.training.models.diffusion.config import TextSettings
from capstan.training.models.pixels.settings import PixelSettings, Positive

PixelSampler = Literal["ddim", "ddpm", "dpm++"]


class PixelSampling(Section):
    """Defaults of `capstan sample` and `capstan evaluate`."""

    steps: Positive = 50
    """Steps of drawing an image; the paper: 1000, with sampler ddpm."""
    guidance: Annotated[float, Field(ge=1)] = 3.0
    """Weight of classifier-free guidance, of a model with text; 1: off."""
    sampler: PixelSampler | None = None
    """How images are drawn; null: ddpm if the variance is learned, else ddim."""


class DdpmSettings(PixelSettings):
    """`train.ddpm`. Without `text` the model draws whatever the dataset has, and takes no prompts."""

    text: TextSettings | None = None
    """The text encoder; null: unconditional."""
    sampling: PixelSampling = PixelSampling()
    """Defaults of drawing: steps, guidance and sampler."""

    @model_validator(mode="after")
    def _variance_is_sampled(self) -> DdpmSettings:
        if self.variance == "learned" and self.sampling.sampler not in (None, "ddpm"):
            problem = f"variance learned is used by sampler ddpm alone, not by {self.sampling.sampler}"
            raise ValueError(f"{problem}; use ddpm")
        if self.text is not None and (self.text.chunks or 1) > 1:
            raise ValueError("text.chunks is for the family diffusion; remove it")
        return self

    def reads_captions(self) -> bool:
        return self.text is not None

    @property
    def sampler(self) -> PixelSampler:
        """The sampler that products are saved with."""
        return self.sampling.sampler or ("ddpm" if self.variance == "learned" else "ddim")
