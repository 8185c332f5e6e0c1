"""The recipe's section `train.text2scene`: vocabularies, network, losses, drawing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from capstan.pipeline.config import Section
from capstan.pipeline.errors import RecipeError
from capstan.training.config.families import FamilySettings

if TYPE_CHECKING:
    from capstan.training.config import TrainConfig

Positive = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0)]
Byte = Annotated[int, Field(ge=0, le=255)]


class Coverage(Section):
    """The loss that spreads attention over the words that name something."""

    objects: Weight = 0.1
    """Weight of the term of the attention that chooses things."""
    attributes: Weight = 0.1
    """Weight of the term of the attention that describes them."""
    words: Literal["content", "all"] = "content"
    """Which words count: those that name labels or attributes, or all, as the paper prints it."""


class SceneSampling(Section):
    """Defaults of `capstan sample` and `capstan evaluate`."""

    temperature: Weight = 0.0
    """Temperature of every choice; 0: the likeliest, so that seeds do not matter."""


class Text2sceneSettings(FamilySettings):
    """`train.text2scene`. The dataset has a column `objects`: labels, boxes, attributes (docs/formats.md)."""

    draws: ClassVar[str | None] = "scene"

    words: Positive = 4000
    """Largest number of words that are known, the most frequent."""
    labels: Positive = 200
    """Largest number of labels that are known, the most frequent; things of others are left out."""
    values: Positive = 64
    """Largest number of values of an attribute, the most frequent; others count as none."""
    most: Positive = 8
    """Largest number of things in a scene, the background included; later ones are left out."""
    length: Positive = 64
    """Words that are read; longer texts are cut."""
    width: Annotated[int, Field(ge=8)] = 64
    """Channels of the network."""
    heads: Positive = 4
    """Heads of the attention to words; the paper has one."""
    cells: Positive = 8
    """Cells of the network's state per side; the canvas has twice as many."""
    grid: Positive = 32
    """Places per side, in which the centres of things are chosen; a multiple of cells."""
    sizes: Positive = 24
    """Sizes of things per side, of equal steps up to the whole canvas."""
    order: Literal["given", "area"] = "given"
    """Order in which things are put down: that of the column, or the largest first."""
    background: str | None = "background"
    """Column with the canvas's colour, which is then drawn first; null, or a dataset without it: none."""
    coverage: Coverage = Coverage()
    """Weights of the attention-coverage loss."""
    parts: str | None = None
    """Folder of images, each named after a label and its attributes (red circle.png), of which scenes are made; only
    things that have one are learnt. null: outlines."""
    palette: dict[str, tuple[Byte, Byte, Byte]] = Field(default={})
    """Colour name → red, green, blue, of things and backgrounds; beyond those of the captioned world."""
    size: Positive | None = None
    """Pixels of both sides of drawings; null: the stored images' shorter side."""
    sampling: SceneSampling = SceneSampling()
    """Defaults of drawing."""

    @model_validator(mode="after")
    def _fits(self) -> Text2sceneSettings:
        if self.grid % self.cells:
            raise ValueError(f"grid {self.grid} is not a multiple of cells {self.cells}")
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} does not divide by 2 × heads ({2 * self.heads})")
        return self

    def check(self, train: TrainConfig) -> None:
        if self.parts is not None and not Path(self.parts).is_dir():
            hint = "name a folder of PNG files, each named after a label, e.g. circle.png"
            raise RecipeError("train.text2scene.parts", f"{self.parts} is not a folder", hint)
