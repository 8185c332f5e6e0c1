"""The recipe's section `experiment`: arms, seeds, steps, prompts.

Each arm trains the recipe's section `train` with its own caption blend; `train.run` is the experiment's folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import Field, field_validator, model_validator

from capstan.pipeline.config import Recipe, Section, validate
from capstan.pipeline.errors import RecipeError
from capstan.recaption.config import RecaptionConfig
from capstan.training.config import ORIGINAL, TrainConfig
from capstan.training.config.families import traits_of

ArmName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class Arm(Section):
    """The captions of one arm."""

    blend: dict[str, Annotated[float, Field(ge=0)]]
    """Slot → weight, as in train.data.blend."""
    layer: str | None = None
    """Caption layer of the arm; null: that of train.data.layer."""

    @field_validator("blend")
    @classmethod
    def _has_weight(cls, blend: dict[str, float]) -> dict[str, float]:
        if sum(blend.values()) <= 0:
            raise ValueError("all weights are 0; set e.g. blend: {descriptive: 0.95, original: 0.05}")
        return blend

    @property
    def shares(self) -> dict[str, float]:
        """Slot → probability of being drawn."""
        return {slot: weight / sum(self.blend.values()) for slot, weight in self.blend.items() if weight > 0}


def _mostly(slot: str, percent: int, layer: str | None = None) -> Arm:
    blend = {slot: percent / 100, ORIGINAL: round(1 - percent / 100, 2)}
    return Arm(blend={name: weight for name, weight in blend.items() if weight > 0}, layer=layer)


# The arms of the DALL-E 3 paper (Betker et al. 2023, section 3): original against short against descriptive captions
# (figure 4), and the share of descriptive ones (figure 5). `truth95` is an upper bound: its layer has true captions.
# With `truthshort95` it separates length from accuracy, in which a captioner's short and long captions differ too.
TRUTH: Final = "truth"
STANDARD: Final[Mapping[str, Arm]] = {
    "original": Arm(blend={ORIGINAL: 1.0}),
    "short95": _mostly("short", 95),
    **{f"descriptive{percent}": _mostly("descriptive", percent) for percent in (65, 80, 90, 95, 100)},
    "truth95": _mostly("descriptive", 95, TRUTH),
    "truthshort95": _mostly("short", 95, TRUTH),
}
PAPER: Final = {name: arm for name, arm in STANDARD.items() if arm.layer != TRUTH}
MAIN: Final = ("original", "short95", "descriptive95")  # the arms of the paper's claim, the worst first


class Scorer(Section):
    """The CLIP that scores images against prompts; it should not be used in the training."""

    model: str
    """An open_clip name, or a folder with open_clip_config.json."""
    pretrained: str | None = None
    """A checkpoint file or an open_clip tag; null: the folder's own weights."""


class ExperimentConfig(Section):
    """An experiment on caption blends. `arms` is a list of standard arms, or a mapping with custom blends."""

    arms: Annotated[dict[ArmName, Arm], Field(min_length=2)] = Field(default={**PAPER})
    """The arms to compare: names of standard ones, or name and blend of your own."""
    seeds: Annotated[list[int], Field(min_length=1)] = Field(default=[0, 1, 2])
    """Seeds of weights, order and noise; every arm is trained with each."""
    steps: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] | None = None
    """Steps at which the arms are measured; null: the last one."""
    prompts: Annotated[int, Field(ge=2)] = 128
    """Number of prompts in each of the two sets."""
    scorer: Scorer | None = None
    """The CLIP that scores images and prompts; null: no CLIP score."""
    upsampler: Literal["captions"] | dict[str, Any] | None = None
    """Expands short prompts: captions uses the nearest training caption; or a section like `recaption` whose engine
    writes text; null: off."""
    parallel: Annotated[int, Field(ge=1)] | None = None
    """Number of runs trained at once; null: as many as cores or GPUs allow."""
    draws: Annotated[int, Field(ge=100)] = 2000
    """Number of bootstrap samples of the intervals."""

    @field_validator("arms", mode="before")
    @classmethod
    def _by_name(cls, arms: Any) -> Any:
        """Replace names, and null values of a mapping, by the standard arms; null alone means all of the paper's."""
        if arms is None:
            return dict(PAPER)
        if isinstance(arms, list):
            if other := [name for name in arms if not isinstance(name, str)]:
                raise ValueError(f"{other[0]!r} is not the name of a standard arm; use a mapping for custom blends")
            if twice := {name for name in arms if arms.count(name) > 1}:
                raise ValueError(f"names {', '.join(sorted(map(str, twice)))} twice; remove one")
            arms = dict.fromkeys(arms)
        if not isinstance(arms, dict):
            return arms
        unknown = [name for name, arm in arms.items() if arm is None and name not in STANDARD]
        if unknown:
            known = ", ".join(STANDARD)
            raise ValueError(
                f"has no standard arm {unknown[0]!r}; use one of {known}, or set its blend: {{slot: weight}}"
            )
        return {name: STANDARD[name] if arm is None else arm for name, arm in arms.items()}

    @field_validator("upsampler", mode="before")
    @classmethod
    def _writes_text(cls, upsampler: Any) -> Any:
        if isinstance(upsampler, dict | None) or upsampler == "captions":
            return upsampler
        raise ValueError("must be captions, null, or a section like recaption with an engine that writes text")

    @model_validator(mode="after")
    def _is_sound(self) -> ExperimentConfig:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds has a seed twice; remove one")
        if self.steps is not None and self.steps != sorted(set(self.steps)):
            raise ValueError("steps must increase, e.g. steps: [1000, 2000, 4000]")
        return self

    @property
    def writer(self) -> RecaptionConfig | None:
        """The engine that expands prompts, or None. Raises RecipeError."""
        if not isinstance(self.upsampler, dict):
            return None
        writer = validate(RecaptionConfig, self.upsampler, "experiment.upsampler")
        if writer.engine == "coca":
            hint = "use transformers or openai, or set upsampler: captions"
            raise RecipeError("experiment.upsampler.engine", "coca cannot expand text", hint)
        return writer

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> ExperimentConfig:
        """Return the validated section `experiment`, checked against `train`. Raises RecipeError."""
        hint = "add the section, e.g. experiment: {arms: [original, short95, descriptive95], seeds: [0, 1, 2]}"
        return recipe.section("experiment", lambda raw: cls._checked(raw, TrainConfig.from_recipe(recipe)), hint)

    @classmethod
    def _checked(cls, raw: dict[str, Any], train: TrainConfig) -> ExperimentConfig:
        config = validate(cls, raw, "experiment")
        _ = config.writer
        if traits_of(train.model).draws != "image":
            hint = "name a model that draws, e.g. train.model: diffusion"
            raise RecipeError("train.model", f"{train.model} cannot generate images from prompts", hint)
        if "://" in train.run:
            hint = "use a folder that all workers share; runs are copied to train.checkpoint.upload"
            raise RecipeError("train.run", "is a bucket, but an experiment needs a folder", hint)
        if config.steps is not None and config.steps[-1] != train.steps:
            problem = f"ends at {config.steps[-1]}, but train.steps is {train.steps}"
            raise RecipeError("experiment.steps", problem, "make the last one equal to train.steps")
        if config.steps is not None and len(config.steps) > 1 and train.schedule != "constant":
            problem = f"{train.schedule} depends on the last step, but arms are measured at several steps"
            hint = "set schedule: constant, or measure only at the end (experiment.steps: null)"
            raise RecipeError("train.schedule", problem, hint)
        return config

    def points(self, train: TrainConfig) -> list[int]:
        """Return the steps at which arms are measured, increasing; the last one is the end."""
        return self.steps or [train.steps]
