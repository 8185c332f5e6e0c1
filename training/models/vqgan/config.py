"""The recipe's section `train.vqgan`, and what other first stages with a codebook share with it"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from capstan.pipeline.errors import RecipeError
from capstan.training.config import TrainConfig
from capstan.training.models.autoencoder.config import ImageStageSettings, Positive, StageSettings


class CodesSettings(ImageStageSettings):
    """The settings of all codebooks, whichever loss they learn by."""

    codes: Annotated[int, Field(ge=2)] = 1024
    """Number of codes in the codebook."""
    revival: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the loss that pulls unused codes to latents; 0: off."""
    start: Literal["latents", "uniform"] = "latents"
    """Initial codes: latents of images, or random values around 0."""

    def check(self, train: TrainConfig) -> None:
        super().check(train)
        if train.engine.strategy == "deepspeed" and train.engine.zero == 3:
            problem = "3 shards the codebook over the workers, and every latent is compared with all of it"
            raise RecipeError("train.engine.zero", problem, "set zero: 2, or strategy: ddp")


class CodebookSettings(CodesSettings):
    """The settings of a codebook that learns by a loss of its own."""

    codebook: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the codebook's loss."""
    commitment: Annotated[float, Field(ge=0)] = 0.25
    """Weight, relative to `codebook`, of the term that pulls latents towards their codes (β in the paper)."""


class VqganSettings(CodebookSettings, StageSettings):
    """`train.vqgan`. Defaults: taming-transformers' VQGAN for ImageNet (16× smaller, 1024 codes)."""

    block_out_channels: Annotated[tuple[Positive, ...], Field(min_length=1)] = (128, 128, 256, 256, 512)
    """Channels at each level; every level but the first halves the image."""
    latent_channels: Positive = 256
    """Number of channels of the latents before they are replaced by codes."""
    code_channels: Positive | None = None
    """Values per code; null: latent_channels."""
