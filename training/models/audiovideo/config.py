"""The recipe's section `train.audiovideo`: the image run, the first stage of sounds, and what couples them."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from capstan.pipeline.config import Section
from capstan.training.config.families import FamilySettings
from capstan.training.models.noise.settings import FlowSettings
from capstan.training.models.video.config import MotionSettings

Positive = Annotated[int, Field(ge=1)]


class CouplingSettings(Section):
    """The transformer over the tokens of all frames, the sound and the text."""

    width: Annotated[int, Field(ge=4, multiple_of=4)] = 512
    """Channels of every token."""
    layers: Positive = 8
    """Number of transformer blocks."""
    heads: Positive = 8
    """Attention heads of every block; must divide width."""
    patch: Positive = 4
    """Side of the patch of a frame's latents that becomes one token."""
    sound_patch: Positive = 1
    """Latents of the sound that become one token."""

    @model_validator(mode="after")
    def _heads_divide(self) -> CouplingSettings:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide by heads {self.heads}")
        return self


class FilmSampling(Section):
    """Defaults of `capstan sample` and `capstan evaluate`."""

    steps: Positive = 25
    """Number of sampling steps."""
    guidance: Annotated[float, Field(ge=1)] = 4.0
    """Scale of classifier-free guidance, of frames and sound alike; 1: off."""


class AudiovideoSettings(FamilySettings):
    """`train.audiovideo`. The clips and sounds are those of the dataset (`source.parts: [mp4, flac]`)."""

    draws: ClassVar[str | None] = "film"
    reads: ClassVar[tuple[str, ...]] = ("jpg", "mp4", "flac")
    objective: ClassVar[str] = "flow"

    after: str
    """The image run that training starts from, or its product: model diffusion with a UNet, objective flow."""
    autoencoder: str
    """The first stage of sounds: a run of the family oobleck, its product, or a diffusers AutoencoderOobleck."""
    frames: Annotated[int, Field(ge=2)] = 16
    """Frames of a clip in training and drawing."""
    fps: Annotated[float, Field(gt=0)] | None = None
    """Frames per second at which clips are seen; null: that of the first clip."""
    part: Literal["center", "random"] = "center"
    """Which part of a clip that is longer is seen and heard."""
    size: Positive | None = None
    """Side of the square frames in pixels; null: the stored images' shorter side."""
    trained: list[Literal["text", "image"]] = ["text", "image"]  # noqa: RUF012
    """What of the image run is trained further, next to the motion modules and the coupling."""
    motion: MotionSettings = MotionSettings()
    """Shape of the motion modules."""
    coupling: CouplingSettings = CouplingSettings()
    """Shape of the coupling."""
    flow: FlowSettings = FlowSettings()
    """How times are drawn."""
    sound: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the sound's loss, next to that of the frames."""
    drop_text: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of captions replaced by the empty one, for classifier-free guidance."""
    sampling: FilmSampling = FilmSampling()
    """Steps and guidance of `capstan sample` and `capstan evaluate`, unless they are set there."""

    @model_validator(mode="after")
    def _fits(self) -> AudiovideoSettings:
        if self.frames > self.motion.positions:
            raise ValueError(f"frames {self.frames} are more than motion.positions {self.motion.positions}; raise them")
        return self

    def models(self) -> dict[str, str]:
        return {"after": self.after, "autoencoder": self.autoencoder}
