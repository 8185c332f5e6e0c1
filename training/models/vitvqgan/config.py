"""The recipe's section `train.vitvqgan`"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from capstan.pipeline.config import Section
from capstan.training.models.autoencoder.config import Positive
from capstan.training.models.vqgan.config import CodebookSettings


class TowerSettings(Section):
    """A stack of transformer blocks. Defaults: the paper's base size."""

    width: Positive = 768
    """Channels of every token."""
    layers: Positive = 12
    """Number of transformer blocks."""
    heads: Positive = 12
    """Attention heads of every block; must divide width."""
    mlp: Annotated[float, Field(gt=0)] = 4.0
    """Channels of the hidden layer of every block, as a multiple of width."""

    @model_validator(mode="after")
    def _heads_divide(self) -> TowerSettings:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide by heads {self.heads}")
        return self


class VitvqganSettings(CodebookSettings):
    """`train.vitvqgan`. Defaults: the paper's base model for ImageNet (8× smaller, 8192 codes of 32 values)."""

    patch_size: Positive = 8
    """Side in pixels of the patch that becomes one token."""
    encoder: TowerSettings = TowerSettings()
    """The transformer from patches to latents."""
    decoder: TowerSettings = TowerSettings()
    """The transformer from codes to patches."""
    codes: Annotated[int, Field(ge=2)] = 8192
    """Number of codes in the codebook."""
    code_channels: Positive = 32
    """Values per code: few, so that the codes are looked up in a space of their own; its vectors have length 1."""
    reconstruction: Literal["l1", "l2"] = "l2"
    """Reconstruction loss: mean absolute error (l1) or mean squared error (l2)."""
