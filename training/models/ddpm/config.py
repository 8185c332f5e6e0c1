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

    block_out_channels: Annotated[tuple[Positive, ...], Field(min_length=1)] = (128, 256, 256, 256)  # one per level
    layers_per_block: Positive = 2
    attention: tuple[bool, ...] | None = None  # per level; null: all but the first, which has the most pixels
    head_channels: Positive = 64  # channels of an attention head
    norm_num_groups: Positive = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1

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

    schedule: Literal["linear", "scaled_linear", "cosine"] = "linear"  # of β; cosine: Nichol & Dhariwal 2021, eq. 17
    prediction: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 1e-4  # of linear and scaled_linear
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.02
    zero_terminal_snr: bool = False


class PixelSampling(Section):
    """Defaults of `capstan sample` and `capstan evaluate`."""

    steps: Positive = 50  # the paper: 1000, with sampler ddpm
    guidance: Annotated[float, Field(ge=1)] = 3.0  # of a model with text; 1: off
    sampler: PixelSampler | None = None  # null: ddpm if the variance is learned, else ddim


class DdpmSettings(FamilySettings):
    """`train.ddpm`. Without `text` the model draws whatever the dataset has, and takes no prompts."""

    draws: ClassVar[str | None] = "image"

    size: Positive | None = None  # pixels, both sides; null: the stored images' shorter side
    crop: Crop = "center"  # how an image is made square
    flip: bool = False  # mirror half of the images
    unet: PixelUNet = PixelUNet()
    text: TextSettings | None = None  # null: unconditional
    noise: PixelNoise = PixelNoise()
    variance: Literal["fixed_small", "fixed_large", "learned"] = "fixed_large"  # β̃, β, or between them by the network
    bound: Annotated[float, Field(gt=0)] = 0.001  # λ: weight of the variational bound; learned variance only
    drop_text: Annotated[float, Field(ge=0, lt=1)] = 0.1  # share of empty captions, for classifier-free guidance
    sampling: PixelSampling = PixelSampling()

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
