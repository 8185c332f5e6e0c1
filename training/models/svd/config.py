"""The recipe's section `train.svd`: the image run, the frames of a clip, noise, conditions."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from capstan.pipeline.config import Section
from capstan.training.config.families import FamilySettings

Positive = Annotated[int, Field(ge=1)]


class LogNormal(Section):
    """A level σ whose logarithm is normal."""

    mean: float
    """Mean of log σ."""
    std: Annotated[float, Field(gt=0)]
    """Standard deviation of log σ."""


class ImageEncoderSettings(Section):
    """The CLIP that describes the first frame: a frozen one, or a small one that is trained with the model."""

    pretrained: str | None = None
    """Folder of a frozen CLIPVisionModelWithProjection; null: train one."""
    width: Positive = 256
    """Width of a trained encoder; a multiple of heads."""
    layers: Positive = 4
    """Number of layers of a trained encoder."""
    heads: Positive = 4
    """Attention heads per layer of a trained encoder."""
    patch: Literal[14, 16, 28, 32, 56, 112] = 32
    """Side of a trained encoder's patches, in pixels of an image of 224."""

    @model_validator(mode="after")
    def _fits(self) -> ImageEncoderSettings:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide by heads")
        return self


class ClipSampling(Section):
    """Defaults of `capstan sample` and `capstan evaluate`, and the range of noise levels."""

    steps: Positive = 25
    """Number of sampling steps."""
    guidance: Annotated[float, Field(ge=1)] = 3.0
    """Scale of classifier-free guidance at the last frame; it rises from `first_guidance`."""
    first_guidance: Annotated[float, Field(ge=1)] = 1.0
    """Scale of classifier-free guidance at the first frame."""
    motion: Annotated[int, Field(ge=0, le=255)] = 127
    """Motion bucket."""
    level: Annotated[float, Field(ge=0, le=1)] = 0.02
    """Deviation of the noise on the image that is continued."""
    sigma_min: Annotated[float, Field(gt=0)] = 0.002
    """Lowest noise level, as a multiple of the latents' deviation."""
    sigma_max: Annotated[float, Field(gt=1)] = 700.0
    """Highest noise level, at which drawing starts."""

    @model_validator(mode="after")
    def _fits(self) -> ClipSampling:
        if self.first_guidance > self.guidance:
            raise ValueError(f"first_guidance {self.first_guidance:g} is more than guidance {self.guidance:g}")
        return self


class SvdSettings(FamilySettings):
    """`train.svd`. The clips are those of the dataset (`source.parts: [mp4]`)."""

    captions: ClassVar[bool] = False
    draws: ClassVar[str | None] = "clip"
    reads: ClassVar[tuple[str, ...]] = ("mp4",)

    after: str
    """The image run that training starts from, or its product: model diffusion with a UNet."""
    frames: Annotated[int, Field(ge=2)] = 14
    """Frames of a clip, the image that is continued included."""
    fps: Annotated[float, Field(gt=0)] | None = None
    """Frames per second at which clips are seen; null: each clip's own."""
    part: Literal["center", "random"] = "center"
    """Which part of a clip that is longer is seen."""
    size: Positive | None = None
    """Side of the square frames in pixels; null: the stored images' shorter side."""
    fastest: Annotated[float, Field(gt=0)] | None = None
    """Motion of bucket 255, in pixels per second at a side of 64; null: that of which 5 clips in 100 have more."""
    noise: LogNormal = LogNormal(mean=1.0, std=1.6)
    """Noise levels in training, as multiples of the latents' deviation."""
    augment: LogNormal = LogNormal(mean=-3.0, std=0.5)
    """Levels of the noise on the image that is continued."""
    drop_image: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of samples without the image, for classifier-free guidance."""
    image_encoder: ImageEncoderSettings = ImageEncoderSettings()
    """The CLIP that describes the image."""
    condition_width: Annotated[int, Field(ge=2, multiple_of=2)] = 256
    """Width in which each of frame rate, motion and noise level is given to the network."""
    sampling: ClipSampling = ClipSampling()
    """Defaults of drawing, and the range of noise levels."""

    def models(self) -> dict[str, str]:
        return {"after": self.after}
