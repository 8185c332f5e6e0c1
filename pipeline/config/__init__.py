"""Recipe: YAML → a validated, frozen `Recipe`

Unknown keys are errors that name the field and the fix. The sections `recaption`, `train`, `experiment` and `lecture`
belong to the floors above: they are mappings here, which those floors parse once (`Recipe.section`;
`cluster.recipe.load` does).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, PrivateAttr, model_validator

from capstan.pipeline.config.cut import Cut
from capstan.pipeline.config.score import (
    CaptionScore,
    ClipScore,
    HeadScore,
    ImageScore,
    LanguageScore,
    NsfwScore,
    Score,
    TextInImage,
)
from capstan.pipeline.config.section import Section, fingerprint, validate
from capstan.pipeline.config.select import Blocklist, Condition, CopyDetection, Dedup
from capstan.pipeline.config.source import Fetch, Image, OneLicense, Source, WorldSource
from capstan.pipeline.errors import RecipeError

__all__ = [
    "Blocklist",
    "CaptionScore",
    "ClipScore",
    "Condition",
    "CopyDetection",
    "Cut",
    "Dedup",
    "Fetch",
    "HeadScore",
    "Image",
    "ImageScore",
    "LanguageScore",
    "NsfwScore",
    "OneLicense",
    "Recipe",
    "Resources",
    "Score",
    "Section",
    "Shards",
    "Source",
    "TextInImage",
    "Unit",
    "WorldSource",
    "fingerprint",
    "validate",
]

Typed = TypeVar("Typed")


class Shards(Section):
    samples: Annotated[int, Field(ge=1)] = 10_000
    """Samples per shard; the last shard may have fewer."""
    random_access: bool = False
    """Whether to write Energon's index of samples by key: about 320 bytes per sample, by one process."""


class Unit(Section):
    rows: Annotated[int, Field(ge=1)] = 10_000
    """Rows per unit; a unit is fetched, scored and committed as a whole."""


class Resources(Section):
    executor: Literal["auto", "processes", "ray"] = "auto"
    """What runs the work: processes of this machine, or Ray; auto: processes for small runs, Ray otherwise."""
    cpus: Annotated[int, Field(ge=1)] | None = None
    """Number of CPU cores to use; null: all."""
    gpus: Annotated[int, Field(ge=0)] | None = None
    """Number of GPUs to use; 0: none; null: all."""
    model_workers: Annotated[int, Field(ge=1)] | None = None
    """Number of model workers, which hold a copy of the model each; null: one per GPU, or one without GPUs."""
    metrics_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Port of Ray's Prometheus exporter; null: a free port."""


class _Parsed:
    """Typed sections of a recipe, kept after first use. No part of its value: equal to any other, pickled empty."""

    def __init__(self) -> None:
        self.sections: dict[str, tuple[Any, Any]] = {}  # name → (the section's mapping, the section)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Parsed)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return _Parsed, ()


class Recipe(Section):
    """A recipe: it drives every stage, and each stage reads its own sections."""

    dataset: str = Field(examples=["./out/ds"])
    """The dataset's folder, or its fsspec URL such as s3://bucket/ds."""
    storage: dict[str, Any] = Field(default={})
    """Options of fsspec for the dataset's storage, e.g. endpoint_url; secrets only from the environment."""
    source: Source | None = None
    """Where the rows (URL or image, and caption) come from."""
    fetch: Fetch = Fetch()
    """How images are downloaded."""
    image: Image = Image()
    """How images are resized and stored."""
    cut: Cut = Cut()
    """How `capstan cut` turns videos into clips; `capstan build` does not read it."""
    score: Score = Score()
    """Scorers, each of which adds columns to the ledger; null: off."""
    select: list[Condition] = Field(default=[])
    """Steps of the selection, in order; each is one step of the funnel."""
    dedup: Dedup = Dedup()
    """How duplicates are found; of each group the largest image is kept."""
    blocklist: Blocklist = Blocklist()
    """Lists of rows that must not be in the dataset."""
    keep_staged: bool = True
    """Whether staged images are kept once they are packed; false saves half of the disk space."""
    shards: Shards = Shards()
    """Size of the tar shards."""
    unit: Unit = Unit()
    """Size of the pieces of work that are committed one by one."""
    resources: Resources = Resources()
    """Limits on the CPUs and GPUs that are used; by default all of the machine or cluster."""
    trackers: list[Literal["mlflow", "wandb"]] = Field(default=[])
    """Where summaries of build, score, select and recaption are sent to."""
    recaption: dict[str, Any] | None = None
    """The model that writes captions (`capstan recaption`) and how; null: none."""
    train: dict[str, Any] | None = None
    """The model to train (`capstan train`) and how; null: none."""
    experiment: dict[str, Any] | None = None
    """Which caption blends `capstan experiment blend` compares; null: none."""
    lecture: dict[str, Any] | None = None
    """Which systems `capstan experiment lecture` compares, for equal time; null: none."""
    _parsed: _Parsed = PrivateAttr(default_factory=_Parsed)

    def section(self, name: str, parse: Callable[[dict[str, Any]], Typed], hint: str) -> Typed:
        """Return the section `name` of a floor above, parsed by that floor once and kept.

        Raises RecipeError with `hint` if the recipe does not have it, and whatever `parse` raises.
        """
        raw = getattr(self, name)
        if raw is None:
            raise RecipeError(name, "is missing", hint)
        known = self._parsed.sections.get(name)
        if known is None or known[0] is not raw:
            known = self._parsed.sections[name] = (raw, parse(raw))
        found: Typed = known[1]
        return found

    @model_validator(mode="after")
    def _names_are_unique(self) -> Recipe:
        names = [condition.name for condition in self.select]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"select names a condition twice: {', '.join(sorted(twice))}")
        if "removed" in names:
            raise ValueError("select names a condition `removed`, which is reserved for rows that are blocked")
        return self
