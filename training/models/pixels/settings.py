"""Settings that families of diffusion in pixels share: the network, the noise, the variance."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field, model_validator

from capstan.pipeline.config import Section
from capstan.training.config.families import Crop, FamilySettings
from capstan.training.models.noise import settings as noise_settings

CHANNELS: Final = 3  # of an image

Positive = Annotated[int, Field(ge=1)]
Variance = Literal["fixed_small", "fixed_large", "learned"]


class PixelUNet(Section):
    """diffusers' UNet2DModel, or UNet2DConditionModel with text. Defaults: Ho et al.'s for CIFAR-10, wider heads."""

    block_out_channels: Annotated[tuple[Positive, ...], Field(min_length=1)] = (128, 256, 256, 256)
    """Channels at each level; every level but the first halves the image."""
    layers_per_block: Positive = 2
    """Residual blocks at each level."""
    attention: tuple[bool, ...] | None = None
    """For each level, whether it has attention; null: all but the first, which has the most pixels."""
    head_channels: Positive = 64
    """Channels of an attention head."""
    norm_num_groups: Positive = 32
    """Groups of channels that are normalised together; must divide every number of channels."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of activations that training drops in residual blocks."""

    @model_validator(mode="after")
    def _fits(self) -> PixelUNet:
        levels = len(self.block_out_channels)
        if self.attention is not None and len(self.attention) != levels:
            raise ValueError("attention must be true or false for each of block_out_channels")
        for channels in self.block_out_channels:
            for name in ("norm_num_groups", "head_channels"):
                if channels % getattr(self, name):
                    raise ValueError(f"block_out_channels {channels} does not divide by {name}")
        return self

    @property
    def attends(self) -> tuple[bool, ...]:
        """For each level, whether it has attention."""
        levels = len(self.block_out_channels)
        return self.attention or tuple(level > 0 or levels == 1 for level in range(levels))


class PixelNoise(noise_settings.DdpmSettings):
    """The noise schedule and what the network predicts. Defaults: Ho et al. 2020, section 4."""

    schedule: Literal["linear", "scaled_linear", "cosine"] = "linear"
    """Noise by timestep: linear or scaled_linear in β, or cosine (Nichol & Dhariwal 2021, eq. 17)."""
    prediction: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    """What the network predicts: the noise, the velocity, or the image itself."""
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    """β at the first timestep, of linear and scaled_linear."""
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """β at the last timestep, of linear and scaled_linear."""
    zero_terminal_snr: bool = False
    """Rescale the schedule so that nothing of the image is left at the last timestep."""


class PixelSettings(FamilySettings):
    """The keys of a section `train.<family>` that every family of diffusion in pixels has."""

    draws: ClassVar[str | None] = "image"

    size: Positive | None = None
    """Pixels of both sides; null: the stored images' shorter side."""
    crop: Crop = "center"
    """How an image is made square."""
    flip: bool = False
    """Mirror half of the images."""
    unet: PixelUNet = PixelUNet()
    """The network."""
    noise: PixelNoise = PixelNoise()
    """The noise schedule, and what the network predicts."""
    variance: Variance = "fixed_large"
    """Variance of a reverse step: β̃, β, or between them as the network says."""
    bound: Annotated[float, Field(gt=0)] = 0.001
    """Weight λ of the variational bound; learned variance only."""
    drop_text: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of captions that are left empty in training, for classifier-free guidance."""

    @model_validator(mode="after")
    def _bound_exists(self) -> PixelSettings:
        if self.variance == "learned" and self.noise.zero_terminal_snr:
            raise ValueError("variance learned has no bound where there is only noise; set zero_terminal_snr: false")
        return self
