"""The recipe's section `train.video`: the image run, its motion modules, which frames of a clip are seen."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from capstan.pipeline.config import Section
from capstan.pipeline.errors import RecipeError
from capstan.training.config import TrainConfig
from capstan.training.config.families import FamilySettings
from capstan.training.models.diffusion.config import SamplingSettings
from capstan.training.models.noise.settings import DdpmSettings, FlowSettings, check_sampler

Positive = Annotated[int, Field(ge=1)]


class MotionSettings(Section):
    """The motion modules: attention over the frames at each place, after each layer of the image model."""

    heads: Positive = 8
    """Attention heads per motion module; all channel counts must be multiples of it."""
    layers: Positive = 1
    """Transformer layers per motion module."""
    positions: Annotated[int, Field(ge=2)] = 32
    """Largest number of frames that the model can draw."""


class VideoSettings(FamilySettings):
    """`train.video`. The clips are those of the dataset (`source.parts: [mp4]`); a sample without one is an image."""

    draws: ClassVar[str | None] = "clip"
    reads: ClassVar[tuple[str, ...]] = ("jpg", "mp4")

    after: str
    """The image run that training starts from, or its product: model diffusion with a UNet."""
    frames: Annotated[int, Field(ge=2)] = 16
    """Frames of a clip in training and drawing."""
    fps: Annotated[float, Field(gt=0)] | None = None
    """Frames per second at which clips are seen; null: each clip's own."""
    part: Literal["center", "random"] = "center"
    """Which part of a clip that is longer is seen."""
    size: Positive | None = None
    """Side of the square frames in pixels; null: the stored images' shorter side."""
    trained: Annotated[list[Literal["motion", "text", "image"]], Field(min_length=1)] = ["motion"]  # noqa: RUF012
    """What is trained: the new motion modules; the text encoder too, if the image run's captions name no motion; all
    of the image model."""
    motion: MotionSettings = MotionSettings()
    """Shape of the motion modules."""
    objective: Literal["flow", "ddpm"] = "flow"
    """What the network learns, as in the image run."""
    flow: FlowSettings = FlowSettings()
    """Settings of objective flow."""
    ddpm: DdpmSettings = DdpmSettings()
    """Settings of objective ddpm."""
    drop_text: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of captions replaced by the empty one, for classifier-free guidance."""
    sampling: SamplingSettings = SamplingSettings()
    """Steps, guidance and sampler of `capstan sample` and `capstan evaluate`, unless they are set there."""

    @model_validator(mode="after")
    def _fits(self) -> VideoSettings:
        if "motion" not in self.trained:
            raise ValueError("trained lacks motion, whose modules are new; add it")
        if len(set(self.trained)) < len(self.trained):
            raise ValueError("trained names a part twice; remove one")
        if self.frames > self.motion.positions:
            raise ValueError(f"frames {self.frames} are more than motion.positions {self.motion.positions}; raise them")
        check_sampler(self.objective, self.sampling.sampler)
        return self

    def models(self) -> dict[str, str]:
        return {"after": self.after}

    def check(self, train: TrainConfig) -> None:
        if train.data.latents is not None and self.part != "center":
            problem = "latents are precomputed from the frames in the middle of clips, whatever part is"
            raise RecipeError("train.video.part", problem, "set part: center, or remove train.data.latents")
