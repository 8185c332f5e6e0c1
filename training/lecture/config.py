"""The recipe's section `lecture`: systems, time, prompts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from capstan.pipeline.config import Recipe, Section, validate
from capstan.pipeline.errors import RecipeError

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$")]
Minutes = Annotated[float, Field(gt=0)]


class System(Section):
    """One system: a recipe whose `train` is run, with the runs in `train.before`; or a finished run."""

    name: Name
    """Name on the page and of its folder."""
    recipe: str | None = None
    """A recipe file, relative to this one; of its sections only `train` is used."""
    run: str | None = None
    """A finished run to measure as it is, in place of `recipe`; its time is not that of the others."""
    set: dict[str, Any] = Field(default={})
    """Keys of the recipe that change here, e.g. train.batch: 32."""
    first: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the minutes for the runs in `train.before`, together."""
    paper: str = ""
    """The paper, for the page."""
    claim: str = ""
    """What the paper says that it shows, for the page."""

    @model_validator(mode="after")
    def _has_one_source(self) -> System:
        if (self.recipe is None) == (self.run is None):
            raise ValueError(f"{self.name} needs either recipe: FILE or run: FOLDER")
        return self


class Played(Section):
    """A finished run that draws clips, sounds or both, for the page to play."""

    name: Name
    """Name on the page and of its folder."""
    run: str
    """The run, of a model that draws clips or sounds, as video, svd or audio do."""
    prompts: list[str] = Field(default=[])
    """What it draws, with the seeds 0, 1, …."""
    images: list[str] = Field(default=[])
    """Image files that it continues, with the same seeds, in place of prompts (svd)."""
    paper: str = ""
    """The paper, for the page."""
    claim: str = ""
    """What the paper says that it shows, for the page."""

    @model_validator(mode="after")
    def _starts_from_something(self) -> Played:
        if bool(self.prompts) == bool(self.images):
            raise ValueError(f"{self.name} needs either prompts or images")
        return self


class LectureConfig(Section):
    """A comparison of systems on the recipe's dataset, which is the captioned world."""

    run: Annotated[str, Field(min_length=1, examples=["./out/lecture"])]
    """Folder of all runs, measurements, and the page."""
    systems: Annotated[list[System], Field(min_length=1)]
    """The systems, in the order of the page; more may be added later."""
    media: list[Played] = []  # noqa: RUF012
    """Finished runs whose clips and sounds the page plays, with what `capstan evaluate` measured."""
    minutes: Minutes = 10.0
    """Training time of each system, its runs in `train.before` included."""
    clock: Literal["wall", "cpu"] = "wall"
    """What minutes are: of the clock, or of the processors, which other work on the machine does not change."""
    points: Annotated[int, Field(ge=1)] = 4
    """Number of measurements, evenly over the time of the last run."""
    threads: Annotated[int, Field(ge=1)] | None = 1
    """CPU threads of each run (train.engine.threads); null: the recipes' own."""
    seeds: Annotated[list[int], Field(min_length=1)] = [0]  # noqa: RUF012
    """Seeds of weights, order and noise; each system is trained with each."""
    prompts: Annotated[int, Field(ge=2)] = 128
    """Number of held-out prompts."""
    shown: Annotated[int, Field(ge=1)] = 8
    """Number of prompts whose images are on the page."""
    draws: Annotated[int, Field(ge=100)] = 2000
    """Number of bootstrap samples of the intervals."""
    command: str = "capstan experiment lecture RECIPE"
    """The command that makes the page, for the page."""

    @model_validator(mode="after")
    def _names_are_unique(self) -> LectureConfig:
        for field in ("systems", "media"):
            names = [one.name for one in getattr(self, field)]
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{field} has {', '.join(twice)} twice; rename one")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds has a seed twice; remove one")
        return self

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> LectureConfig:
        """Return the validated section `lecture`. Raises RecipeError."""
        hint = "add the section, e.g. lecture: {run: ./out/lecture, systems: [{name: ddpm, recipe: ddpm.yaml}]}"
        return recipe.section("lecture", lambda raw: cls._checked(raw, recipe), hint)

    @classmethod
    def _checked(cls, raw: dict[str, Any], recipe: Recipe) -> LectureConfig:
        config = validate(cls, raw, "lecture")
        if recipe.source is None or recipe.source.format != "world":
            hint = "set source: {format: world, world: {…}}"
            raise RecipeError("source.format", "a lecture is measured by the captioned world's oracle", hint)
        return config
