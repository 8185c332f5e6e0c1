"""The recipe's section `train.cogvideox`: first stage, transformer, text encoder, numbers of frames."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from capstan.pipeline.config import Section
from capstan.pipeline.errors import RecipeError
from capstan.training.config import TrainConfig
from capstan.training.config.families import FamilySettings
from capstan.training.models.audio.config import T5Settings
from capstan.training.models.diffusion.config import SamplingSettings
from capstan.training.models.noise.settings import DdpmSettings, FlowSettings, check_sampler

Positive = Annotated[int, Field(ge=1)]


class TransformerSettings(Section):
    """diffusers' CogVideoXTransformer3DModel. Defaults: CogVideoX-2B."""

    layers: Positive = 30
    """Number of transformer blocks."""
    heads: Positive = 30
    """Attention heads of each block."""
    head_width: Positive = 64
    """Width of a head."""
    time_width: Annotated[int, Field(ge=2, multiple_of=2)] = 512
    """Width in which the time is given to the blocks."""
    patch: Positive = 2
    """Side of a patch in latents; a patch of one latent in time is a token."""

    @model_validator(mode="after")
    def _fits(self) -> TransformerSettings:
        if (self.heads * self.head_width) % 16:
            raise ValueError(
                f"heads × head_width is {self.heads * self.head_width}, no multiple of 16, as positions need"
            )
        return self


class CogvideoxSettings(FamilySettings):
    """`train.cogvideox`. A sample without a clip is an image, a video of one frame."""

    buckets: ClassVar[bool] = True
    draws: ClassVar[str | None] = "clip"
    reads: ClassVar[tuple[str, ...]] = ("jpg", "mp4")

    autoencoder: str
    """The first stage: a run of the family video_autoencoder, its product, or a diffusers AutoencoderKLCogVideoX."""
    frames: Annotated[int, Field(ge=2)] | Annotated[tuple[Annotated[int, Field(ge=2)], ...], Field(min_length=1)] = 17
    """Frames of a clip in training and drawing; of several numbers a clip is seen with the largest that it has."""
    fps: Annotated[float, Field(gt=0)] | None = None
    """Frames per second at which clips are seen; null: each clip's own."""
    part: Literal["center", "random"] = "center"
    """Which part of a clip that is longer is seen."""
    size: Positive | None = None
    """Side of the square frames in pixels; null: the stored images' shorter side."""
    transformer: TransformerSettings = TransformerSettings()
    """Shape of the transformer."""
    text: T5Settings = T5Settings(length=226)
    """The text encoder."""
    objective: Literal["flow", "ddpm"] = "flow"
    """What the network learns: rectified flow, or DDPM."""
    flow: FlowSettings = FlowSettings()
    """Settings of objective flow."""
    ddpm: DdpmSettings = DdpmSettings()
    """Settings of objective ddpm."""
    drop_text: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of captions replaced by the empty one, for classifier-free guidance."""
    sampling: SamplingSettings = SamplingSettings()
    """Steps, guidance and sampler of `capstan sample` and `capstan evaluate`, unless they are set there."""

    @model_validator(mode="after")
    def _sampler_fits_objective(self) -> CogvideoxSettings:
        check_sampler(self.objective, self.sampling.sampler)
        return self

    @property
    def lengths(self) -> tuple[int, ...]:
        """The numbers of frames, the largest last."""
        return (self.frames,) if isinstance(self.frames, int) else tuple(sorted(set(self.frames)))

    def models(self) -> dict[str, str]:
        return {"autoencoder": self.autoencoder}

    def check(self, train: TrainConfig) -> None:
        if train.data.latents is not None and self.part != "center":
            problem = "latents are precomputed from the frames in the middle of clips, whatever part is"
            raise RecipeError("train.cogvideox.part", problem, "set part: center, or remove train.data.latents")
