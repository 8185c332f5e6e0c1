"""Recipe: YAML → a validated, frozen `Recipe`

Unknown keys are errors that name the field and the fix. The sections `recaption`, `train` and `experiment` belong to
the floors above: they are mappings here, which those floors parse once (`Recipe.section`; `cluster.recipe.load` does).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, PrivateAttr, model_validator

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
    random_access: bool = False  # Energon's index of samples by key: about 320 bytes a sample, by one process


class Unit(Section):
    rows: Annotated[int, Field(ge=1)] = 10_000


class Resources(Section):
    executor: Literal["auto", "processes", "ray"] = "auto"  # auto: processes of this machine for small runs, else Ray
    cpus: Annotated[int, Field(ge=1)] | None = None
    gpus: Annotated[int, Field(ge=0)] | None = None
    model_workers: Annotated[int, Field(ge=1)] | None = None
    metrics_port: Annotated[int, Field(ge=1, le=65535)] | None = None  # Ray's Prometheus exporter; null: a free port


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

    dataset: str
    storage: dict[str, Any] = Field(default={})  # fsspec options; secrets only from the environment
    source: Source | None = None
    fetch: Fetch = Fetch()
    image: Image = Image()
    score: Score = Score()
    select: list[Condition] = Field(default=[])
    dedup: Dedup = Dedup()
    blocklist: Blocklist = Blocklist()
    keep_staged: bool = True  # false: remove staged images once they are packed
    shards: Shards = Shards()
    unit: Unit = Unit()
    resources: Resources = Resources()
    trackers: list[Literal["mlflow", "wandb"]] = Field(default=[])  # of summaries of build, score, select, recaption
    recaption: dict[str, Any] | None = None
    train: dict[str, Any] | None = None
    experiment: dict[str, Any] | None = None
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
