"""The recipe's section `train.audio`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from capstan.pipeline.config import Section
from capstan.pipeline.errors import RecipeError
from capstan.training.config.families import FamilySettings

if TYPE_CHECKING:
    from capstan.training.config import TrainConfig

Positive = Annotated[int, Field(ge=1)]


class TransformerSettings(Section):
    """diffusers' StableAudioDiTModel. Defaults: Stable Audio Open (1.1 B parameters)."""

    layers: Positive = 24
    """Number of transformer blocks."""
    heads: Positive = 24
    """Attention heads of each block."""
    head_width: Annotated[int, Field(ge=4, multiple_of=4)] = 64
    """Width of a head; a multiple of 4, as half of it has positions."""
    condition_width: Positive = 768
    """Width in which text and timing are given to the transformer."""
    time_width: Annotated[int, Field(ge=2, multiple_of=2)] = 256
    """Width in which the noise level is given to the transformer."""

    @model_validator(mode="after")
    def _fits(self) -> TransformerSettings:
        if self.condition_width % self.head_width:
            raise ValueError(f"condition_width {self.condition_width} does not divide by head_width {self.head_width}")
        if self.heads % (self.condition_width // self.head_width):
            read = self.condition_width // self.head_width
            raise ValueError(
                f"condition_width {self.condition_width} makes {read} heads, which do not divide {self.heads}"
            )
        return self


class T5Settings(Section):
    """The text encoder: a frozen T5, or a small one that is trained with the model."""

    pretrained: str | None = None
    """Folder of a frozen T5 and its tokenizer; null: train one."""
    vocab_size: Annotated[int, Field(ge=8)] = 8192
    """Largest number of words that a trained one knows; others are spelt."""
    length: Annotated[int, Field(ge=4)] = 128
    """Longest text in tokens; longer prompts are truncated."""
    width: Positive = 256
    """Width of a trained encoder; a multiple of heads."""
    layers: Positive = 4
    """Number of layers of a trained encoder."""
    heads: Positive = 4
    """Attention heads per layer of a trained encoder."""

    @model_validator(mode="after")
    def _fits(self) -> T5Settings:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide by heads")
        return self


class SoundSampling(Section):
    """Defaults of `capstan sample` and `capstan evaluate`, and the range of noise levels."""

    steps: Positive = 100
    """Number of sampling steps."""
    guidance: Annotated[float, Field(ge=1)] = 7.0
    """Scale of classifier-free guidance; 1: off."""
    sigma_min: Annotated[float, Field(gt=0)] = 0.03
    """Lowest noise level, as a multiple of the latents' deviation."""
    sigma_max: Annotated[float, Field(gt=1)] = 500.0
    """Highest noise level, at which drawing starts."""


class AudioSettings(FamilySettings):
    """`train.audio`."""

    draws: ClassVar[str | None] = "sound"
    reads: ClassVar[tuple[str, ...]] = ("flac",)

    autoencoder: str
    """The first stage: a run of the family oobleck, its product, or a diffusers AutoencoderOobleck."""
    seconds: Annotated[float, Field(gt=0)] | None = None
    """Length of the sounds that are drawn; null: that of the first sound."""
    part: Literal["start", "random"] = "start"
    """Which piece of a longer sound is read; the model knows where it starts and how long the whole is."""
    longest: Positive = 512
    """Longest sound in seconds that timing can state."""
    transformer: TransformerSettings = TransformerSettings()
    """Shape of the transformer."""
    text: T5Settings = T5Settings()
    """The text encoder."""
    drop_text: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of samples without text and timing, for classifier-free guidance."""
    sampling: SoundSampling = SoundSampling()
    """Defaults of drawing, and the range of noise levels."""

    @model_validator(mode="after")
    def _timing_fits(self) -> AudioSettings:
        if self.seconds is not None and self.seconds > self.longest:
            raise ValueError(f"seconds {self.seconds:g} is more than longest ({self.longest}); raise longest")
        return self

    def models(self) -> dict[str, str]:
        return {"autoencoder": self.autoencoder}

    def check(self, train: TrainConfig) -> None:
        if train.data.latents is not None:
            self.check_ahead()

    def check_ahead(self) -> None:
        """Raise RecipeError if latents that are computed ahead would depend on more than a sound's start."""
        if self.part == "random":
            problem = "latents are precomputed from the start of sounds, whatever part is"
            raise RecipeError("train.audio.part", problem, "set part: start, or remove train.data.latents")
        if self.seconds is None:
            problem = "latents are precomputed in one length, which null leaves to the first sound"
            raise RecipeError("train.audio.seconds", problem, "set it, or remove train.data.latents")
