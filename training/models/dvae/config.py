"""The recipe's section `train.dvae`"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from capstan.pipeline.config import Section
from capstan.training.models.autoencoder.config import Positive, StageSettings
from capstan.training.models.vqgan.config import CodesSettings


class TemperatureSettings(Section):
    """Temperature τ of the relaxation, by step."""

    start: Annotated[float, Field(gt=0)] = 1.0
    """τ at the first step."""
    end: Annotated[float, Field(gt=0)] = 0.0625
    """τ from step `steps` on; the smaller, the closer to a choice of one code."""
    steps: Positive = 150_000
    """Steps in which τ falls from start to end, along a cosine."""

    @model_validator(mode="after")
    def _falls(self) -> TemperatureSettings:
        if self.end > self.start:
            raise ValueError(f"end {self.end} is above start {self.start}; the temperature falls")
        return self


class KlSettings(Section):
    """Weight β of the KL divergence, by step."""

    start: Annotated[float, Field(ge=0)] = 0.0
    """β at the first step."""
    end: Annotated[float, Field(ge=0)] = 6.6
    """β from step `steps` on; 1 is the evidence lower bound."""
    steps: Positive = 5_000
    """Steps in which β goes from start to end, along a cosine."""


class DvaeSettings(CodesSettings, StageSettings):
    """`train.dvae`. Defaults: the discrete VAE of DALL-E (8× smaller, 8192 codes) over diffusers' network."""

    block_out_channels: Annotated[tuple[Positive, ...], Field(min_length=1)] = (128, 128, 256, 256)
    """Channels at each level; every level but the first halves the image."""
    latent_channels: Positive = 256
    """Number of channels of the latents before they are replaced by codes."""
    code_channels: Positive | None = None
    """Values per code; null: latent_channels."""
    codes: Annotated[int, Field(ge=2)] = 8192
    """Number of codes in the codebook."""
    reconstruction: Literal["laplace", "l1", "l2"] = "laplace"  # type: ignore[assignment]
    """Reconstruction loss: logit-Laplace likelihood, mean absolute error (l1) or mean squared error (l2)."""
    temperature: TemperatureSettings = TemperatureSettings()
    """Temperature of the Gumbel-softmax relaxation."""
    kl: KlSettings = KlSettings()
    """Weight of the KL divergence between a latent's codes and the uniform distribution."""
