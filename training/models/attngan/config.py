"""The recipe's section `train.attngan`"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from capstan.pipeline.config import Section
from capstan.training.config import TrainConfig
from capstan.training.config.families import Crop, FamilySettings
from capstan.training.models.autoencoder.config import check_adversary

Positive = Annotated[int, Field(ge=1)]


class JudgeSettings(Section):
    """`discriminator`: one for each size of images. Defaults: the paper's."""

    channels: Positive = 64
    """Channels of its first layer; each further layer halves the image and doubles them, up to 8 times."""
    loss: Literal["hinge", "vanilla"] = "vanilla"
    """Adversarial loss: hinge, or vanilla (cross-entropy)."""
    penalty: Annotated[float, Field(ge=0)] = 0.0
    """Weight γ of the squared gradient at real images (R1), which steadies training; 0: off, as in the paper."""
    penalty_every: Positive = 8
    """Steps from one penalty to the next, which is then weighted by their number."""
    lr: Annotated[float, Field(gt=0)] = 1.0
    """Learning rate of the discriminators, relative to train.lr at the same step."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.5, 0.999)
    """Both betas of the discriminators' Adam."""


class AttnganSettings(FamilySettings):
    """`train.attngan`. Defaults: the paper's for 256 pixels on CUB."""

    draws: ClassVar[str | None] = "image"

    damsm: str = Field(examples=["./out/damsm"])
    """A run of model: damsm, or its product: it encodes the texts and judges the images; its size is that drawn."""
    crop: Crop = "center"
    """How an image is made square: its center, or a random part."""
    flip: bool = False
    """Mirror half of the images, chosen at random; captions that name sides then become wrong."""
    noise: Positive = 100
    """Number of random values that an image is drawn from."""
    condition: Positive = 100
    """Number of values of the augmented sentence."""
    channels: Positive = 32
    """Channels of the features at every stage."""
    stages: Annotated[int, Field(ge=2)] = 3
    """Number of stages, each twice as large as the one before; all but the first attend to words."""
    generators: Positive = 3
    """Number of stages, counted from the last, that draw an image and have a discriminator."""
    blocks: Positive = 2
    """Residual blocks of every stage with attention."""
    kl: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the KL divergence of the augmented sentence from N(0, 1)."""
    matching: Annotated[float, Field(ge=0)] = 5.0
    """Weight λ of the DAMSM loss; a large one is met by colours anywhere, without things."""
    discriminator: JudgeSettings = JudgeSettings()
    """The discriminators."""

    @model_validator(mode="after")
    def _stages_draw(self) -> AttnganSettings:
        if self.generators > self.stages:
            raise ValueError(f"generators {self.generators} is more than stages {self.stages}; use {self.stages}")
        return self

    def check(self, train: TrainConfig) -> None:
        check_adversary(train, "train.attngan.discriminator")

    def models(self) -> dict[str, str]:
        return {"damsm": self.damsm}
