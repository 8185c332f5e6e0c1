"""The recipe's section `train.imagen`: one stage of a cascade, its text encoder, noise and drawing."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field, model_validator

from capstan.pipeline.config import Section
from capstan.training.models.pixels.settings import CHANNELS, PixelNoise, PixelSettings, Positive, Variance

StageSampler = Literal["ddpm", "dpm++"]
_COPIED: Final = 4  # channels of a group that `begin_as_input` takes


class Enlarge(Section):
    """What makes a stage enlarge images instead of drawing them from text alone."""

    after: str
    """The run of the stage before, or its product, whose images are enlarged; its T5 is used."""
    most: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Highest level of the noise that training adds to the small image; drawn uniformly from 0 to this."""
    start: Literal["random", "image"] = "random"
    """What the network returns before it has learnt anything: noise (random), or the small image, enlarged (image)."""


class StageNoise(PixelNoise):
    """The noise schedule and what the network predicts. Defaults: Saharia et al. 2022."""

    schedule: Literal["linear", "scaled_linear", "cosine"] = "cosine"
    """Noise by timestep: linear or scaled_linear in β, or cosine (Nichol & Dhariwal 2021, eq. 17)."""
    prediction: Literal["epsilon", "v_prediction", "sample"] | None = None  # type: ignore[assignment]
    """What the network predicts; null: the noise (epsilon), or the velocity (v_prediction) in a stage that enlarges."""


class StageSampling(Section):
    """Defaults of `capstan sample` and `capstan evaluate`."""

    steps: Positive = 100
    """Steps of drawing an image."""
    guidance: Annotated[float, Field(ge=1)] = 7.0
    """Weight of classifier-free guidance; 1: off."""
    sampler: StageSampler | None = None
    """How images are drawn; null: ddpm."""
    threshold: Annotated[float, Field(gt=0, le=1)] | None = 0.995
    """Percentile of dynamic thresholding, which lets guidance be large; null: clip to the range of images."""
    level: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Level of the noise that is added to the small image, in a stage that enlarges."""


class ImagenSettings(PixelSettings):
    """`train.imagen`: one stage. Without `enlarge` it draws from text; with it, it enlarges another run's images."""

    text: str | None = None
    """Folder of a frozen T5 and its tokenizer; null: that of the stage before."""
    enlarge: Enlarge | None = None
    """The stage before, whose images this one enlarges; null: this is the first stage."""
    noise: StageNoise = StageNoise()
    """The noise schedule, and what the network predicts."""
    variance: Variance = "fixed_small"
    """Variance of a reverse step: β̃, β, or between them as the network says."""
    sampling: StageSampling = StageSampling()
    """Defaults of drawing: steps, guidance, sampler, thresholding, and the level of noise."""

    @model_validator(mode="after")
    def _one_text_encoder(self) -> ImagenSettings:
        if (self.text is None) == (self.enlarge is None):
            hint = "set text: FOLDER of a T5" if self.text is None else "remove text"
            problem = "names no text encoder" if self.text is None else "a stage that enlarges uses the T5 before it"
            raise ValueError(f"{problem}; {hint}")
        if self.enlarge is not None and self.sampling.level > self.enlarge.most:
            raise ValueError(
                f"sampling.level {self.sampling.level} is above the levels that are trained (enlarge.most)"
                f"; use {self.enlarge.most} or less"
            )
        if self.variance == "learned" and self.sampling.sampler not in (None, "ddpm"):
            raise ValueError(
                f"variance learned is used by sampler ddpm alone, not by {self.sampling.sampler}; use ddpm"
            )
        return self

    @model_validator(mode="after")
    def _can_begin_as_image(self) -> ImagenSettings:
        if self.enlarge is None or self.enlarge.start == "random":
            return self
        if self.noise.prediction != "sample":
            raise ValueError("enlarge.start image is a prediction of the image; set noise.prediction: sample")
        groups, channels = self.unet.norm_num_groups, self.unet.block_out_channels[0]
        if groups < CHANNELS or channels // groups < _COPIED:
            raise ValueError(
                f"enlarge.start image needs {CHANNELS} groups of {_COPIED} channels, and unet.norm_num_groups {groups}"
                f" makes groups of {channels // groups}; use e.g. norm_num_groups 4 with 16 channels or more"
            )
        return self

    @model_validator(mode="after")
    def _prediction_by_stage(self) -> ImagenSettings:
        if self.noise.prediction is None:
            chosen = "epsilon" if self.enlarge is None else "v_prediction"
            if chosen == "epsilon" and self.noise.zero_terminal_snr:
                raise ValueError("noise.zero_terminal_snr needs noise.prediction v_prediction or sample; set one")
            noise = self.noise.model_copy(update={"prediction": chosen})
            object.__setattr__(self, "noise", noise)  # sections are frozen
        return self

    def models(self) -> dict[str, str]:
        return {} if self.enlarge is None else {"enlarge.after": self.enlarge.after}
