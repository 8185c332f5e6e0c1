"""The recipe's section `train.damsm`"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from capstan.training.config.families import Crop, FamilySettings

Positive = Annotated[int, Field(ge=1)]


class DamsmSettings(FamilySettings):
    """`train.damsm`. Defaults: the paper's dimensions; its image tower is an Inception-v3, here one of convolutions."""

    size: Positive | None = None
    """Side of the square images in pixels; null: the shorter side of the stored images."""
    crop: Crop = "center"
    """How an image is made square: its center, or a random part."""
    flip: bool = False
    """Mirror half of the images, chosen at random; captions that name sides then become wrong."""
    vocabulary: Positive = 5000
    """Largest number of words that are known: the most frequent ones of the captions."""
    words: Positive = 18
    """Number of words that are read of a caption; the rest is cut."""
    channels: Annotated[int, Field(ge=2, multiple_of=2)] = 256
    """Channels of words and regions, which are compared; half of them for each direction of the text encoder."""
    tower: Annotated[tuple[Positive, ...], Field(min_length=2)] = (64, 128, 256, 512)
    """Channels of the image encoder at each level; every level halves the image; regions are those before the last."""
    gamma_regions: Annotated[float, Field(gt=0)] = 5.0
    """Sharpness of a word's attention to regions (γ1)."""
    gamma_words: Annotated[float, Field(gt=0)] = 5.0
    """How much the best matching words of a caption count more than others (γ2)."""
    gamma: Annotated[float, Field(gt=0)] = 10.0
    """Sharpness of the choice among the captions, and among the images, of a batch (γ3)."""
