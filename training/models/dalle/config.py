"""The recipe's section `train.dalle`: first stage, text, transformer, sampling."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from capstan.pipeline.config import Section
from capstan.pipeline.errors import RecipeError
from capstan.training.config import TrainConfig
from capstan.training.config.families import Crop, FamilySettings
from capstan.training.config.monitoring import ClipSettings

Positive = Annotated[int, Field(ge=1)]


class TokenTextSettings(Section):
    """The captions, read by a tokenizer learnt from them."""

    vocab_size: Annotated[int, Field(ge=514)] = 16_384
    """Largest size of the vocabulary; smaller if the captions yield less."""
    length: Annotated[int, Field(ge=3)] = 256
    """Longest caption in tokens, with start and end; longer ones are truncated."""


class TokenSampling(Section):
    """Defaults of `capstan sample` and `capstan evaluate`."""

    guidance: Annotated[float, Field(ge=1)] = 1.5
    """Scale of classifier-free guidance on the logits; 1: off."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of the tokens' distribution."""
    top_k: Positive | None = None
    """Draw each token from this many of the likeliest; null: from all."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Draw each token from the likeliest that reach this probability together; null: from all."""
    candidates: Positive = 1
    """Images drawn per prompt and seed, of which `clip` chooses the best."""
    clip: ClipSettings | None = None
    """The CLIP that chooses among candidates by the cosine of image and prompt; null: only one is drawn."""

    @model_validator(mode="after")
    def _chosen(self) -> TokenSampling:
        if self.candidates > 1 and self.clip is None:
            raise ValueError(f"candidates {self.candidates} need clip, which chooses among them")
        return self


class DalleSettings(FamilySettings):
    """`train.dalle`. Defaults: a transformer of 300 M parameters; the paper's has 12 billion."""

    draws: ClassVar[str | None] = "image"

    first_stage: str
    """The first stage whose codes are the tokens: a run of dvae, vqgan or vitvqgan, or a diffusers VQModel."""
    size: Positive | None = None
    """Side of the square images in pixels, that of the first stage; null: the stored images' shorter side."""
    crop: Crop = "center"
    """How an image is made square: its center, or a random part."""
    text: TokenTextSettings = TokenTextSettings()
    """The captions' tokens."""
    width: Positive = 1024
    """Width of the transformer; a multiple of heads."""
    layers: Positive = 24
    """Number of layers."""
    heads: Positive = 16
    """Attention heads per layer."""
    mlp: Positive | None = None
    """Width of the layers' MLPs; null: 8/3 of width, in steps of 64."""
    text_weight: Annotated[float, Field(ge=0, lt=1)] = 0.125
    """Weight of the text tokens' loss; the image tokens have the rest."""
    drop_text: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of captions whose tokens are emptied, for classifier-free guidance."""
    sampling: TokenSampling = TokenSampling()
    """How images are drawn."""

    @model_validator(mode="after")
    def _fits(self) -> DalleSettings:
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} does not divide by 2 × heads; rotary positions turn pairs")
        return self

    def models(self) -> dict[str, str]:
        return {"first_stage": self.first_stage}

    def check(self, train: TrainConfig) -> None:
        if train.data.latents is not None and self.crop != "center":
            problem = "tokens are precomputed from the center of images, whatever crop is"
            raise RecipeError("train.dalle.crop", problem, "set crop: center, or remove train.data.latents")

    @property
    def mlp_width(self) -> int:
        """Width of the layers' MLPs."""
        return self.mlp or max(64, round(self.width * 8 / 3 / 64) * 64)
