"""The recipe's section `train.ddpm`: network, text, noise, variance."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from capstan.pipeline.config import Section
from capstan.training.config.families import Crop, FamilySettings
from capstan.training.models.diffusion.config import TextSettings
from capstan.training.models.noise import settings as noise_settings

Positive = Annotated[int, Field(ge=1)]
PixelSampler = Literal["ddim", "ddpm", "dpm++"]


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


class PixelSampling(Section):
    """Defaults of `capstan sample` and `capstan evaluate`."""

    steps: Positive = 50
    """Steps of drawing an image; the paper: 1000, with sampler ddpm."""
    guidance: Annotated[float, Field(ge=1)] = 3.0
    """Weight of classifier-free guidance, of a model with text; 1: off."""
    sampler: PixelSampler | None = None
    """How images are drawn; null: ddpm if the variance is learned, else ddim."""


class DdpmSettings(FamilySettings):
    """`train.ddpm`. Without `text` the model draws whatever the dataset has, and takes no prompts."""

    draws: ClassVar[str | None] = "image"

    size: Positive | None = None
    """Pixels of both sides; null: the stored images' shorter side."""
    crop: Crop = "center"
    """How an image is made square."""
    flip: bool = False
    """Mirror half of the images."""
    unet: PixelUNet = PixelUNet()
    """The network."""
    text: TextSettings | None = None
    """The text encoder; null: unconditional."""
    noise: PixelNoise = PixelNoise()
    """The noise schedule, and what the network predicts."""
    variance: Literal["fixed_small", "fixed_large", "learned"] = "fixed_large"
    """Variance of a reverse step: β̃, β, or between them as the network says."""
    bound: Annotated[float, Field(gt=0)] = 0.001
    """Weight λ of the variational bound; learned variance only."""
    drop_text: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of captions that are left empty in training, for classifier-free guidance."""
    sampling: PixelSampling = PixelSampling()
    """Defaults of drawing: steps, guidance and sampler."""

    @model_validator(mode="after")
    def _variance_is_sampled(self) -> DdpmSettings:
        if self.variance == "learned" and self.sampling.sampler not in (None, "ddpm"):
            problem = f"variance learned is used by sampler ddpm alone, not by {self.sampling.sampler}"
            raise ValueError(f"{problem}; use ddpm")
        if self.text is not None and (self.text.chunks or 1) > 1:
            raise ValueError("text.chunks is for the family diffusion; remove it")
        if self.variance == "learned" and self.noise.zero_terminal_snr:
            raise ValueError("variance learned has no bound where there is only noise; set zero_terminal_snr: false")
        return self

    def reads_captions(self) -> bool:
        return self.text is not None

    @property
    def sampler(self) -> PixelSampler:
        """The sampler that products are saved with."""
        return self.sampling.sampler or ("ddpm" if self.variance == "learned" else "ddim")
