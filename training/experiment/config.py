"""The recipe's section `experiment`: plain mapping → a validated `ExperimentConfig`.

    recipe.experiment = {arms, seeds, steps, prompts, scorer, upsampler, parallel}

What an arm trains is the recipe's section `train`, but for the captions that its blend shows; `train.run` is the
experiment's folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import Field, field_validator, model_validator

from capstan.pipeline.config import Recipe, Section, validate
from capstan.pipeline.errors import RecipeError
from capstan.recaption.config import RecaptionConfig
from capstan.training.config import ORIGINAL, TrainConfig

ArmName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class Arm(Section):
    """What one arm's captions are."""

    blend: dict[str, Annotated[float, Field(ge=0)]]  # slot → weight, as in train.data.blend
    layer: str | None = None  # the caption layer; null: that of train.data.layer

    @field_validator("blend")
    @classmethod
    def _has_weight(cls, blend: dict[str, float]) -> dict[str, float]:
        if sum(blend.values()) <= 0:
            raise ValueError("gives no slot any weight; write e.g. blend: {descriptive: 0.95, original: 0.05}")
        return blend

    @property
    def shares(self) -> dict[str, float]:
        """Slot → share of the draws."""
        return {slot: weight / sum(self.blend.values()) for slot, weight in self.blend.items() if weight > 0}


def _mostly(slot: str, percent: int, layer: str | None = None) -> Arm:
    blend = {slot: percent / 100, ORIGINAL: round(1 - percent / 100, 2)}
    return Arm(blend={name: weight for name, weight in blend.items() if weight > 0}, layer=layer)


# The arms of the DALL-E 3 paper (Betker et al. 2023, section 3): original against short against descriptive captions
# (figure 4), and how much of the latter (figure 5). `truth95` is a ceiling: its layer holds what is true of images;
# beside `truthshort95` it tells length from truth, in which a captioner's short and long captions differ too.
TRUTH: Final = "truth"
STANDARD: Final[Mapping[str, Arm]] = {
    "original": Arm(blend={ORIGINAL: 1.0}),
    "short95": _mostly("short", 95),
    **{f"descriptive{percent}": _mostly("descriptive", percent) for percent in (65, 80, 90, 95, 100)},
    "truth95": _mostly("descriptive", 95, TRUTH),
    "truthshort95": _mostly("short", 95, TRUTH),
}
PAPER: Final = {name: arm for name, arm in STANDARD.items() if arm.layer != TRUTH}
MAIN: Final = ("original", "short95", "descriptive95")  # those that the paper's claim is about, the worst first


class Scorer(Section):
    """The CLIP that scores images against prompts; it should be no part of the training."""

    model: str  # an open_clip name, or a folder with open_clip_config.json
    pretrained: str | None = None  # a checkpoint file or one of open_clip's tags; null: the folder's own weights


class ExperimentConfig(Section):
    """One experiment on caption blends. A list of `arms` names standard ones; a mapping gives blends of your own."""

    arms: Annotated[dict[ArmName, Arm], Field(min_length=2)] = Field(default={**PAPER})
    # of weights, order and noise; each trains every arm
    seeds: Annotated[list[int], Field(min_length=1)] = Field(default=[0, 1, 2])
    steps: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] | None = None  # measured at; null: the end
    prompts: Annotated[int, Field(ge=2)] = 128  # in each of the two sets
    scorer: Scorer | None = None  # null: no CLIP score
    # what expands short prompts: `captions` takes the nearest caption trained on; or a section like `recaption` whose
    # engine writes text; null: no prompt is expanded
    upsampler: Literal["captions"] | dict[str, Any] | None = None
    parallel: Annotated[int, Field(ge=1)] | None = None  # arms trained at once; null: as many as there is room for
    draws: Annotated[int, Field(ge=100)] = 2000  # of the bootstrap

    @field_validator("arms", mode="before")
    @classmethod
    def _by_name(cls, arms: Any) -> Any:
        """Standard arms by their names, null for all of the paper's; in a mapping, null stands for the standard arm of
        that name."""
        if arms is None:
            return dict(PAPER)
        if isinstance(arms, list):
            if other := [name for name in arms if not isinstance(name, str)]:
                raise ValueError(f"lists names of standard arms, and {other[0]!r} is none; give blends as a mapping")
            if twice := {name for name in arms if arms.count(name) > 1}:
                raise ValueError(f"names {', '.join(sorted(map(str, twice)))} twice; name each once")
            arms = dict.fromkeys(arms)
        if not isinstance(arms, dict):
            return arms
        unknown = [name for name, arm in arms.items() if arm is None and name not in STANDARD]
        if unknown:
            known = ", ".join(STANDARD)
            raise ValueError(f"knows no arm {unknown[0]!r}; name one of {known}, or give its blend: {{slot: weight}}")
        return {name: STANDARD[name] if arm is None else arm for name, arm in arms.items()}

    @field_validator("upsampler", mode="before")
    @classmethod
    def _writes_text(cls, upsampler: Any) -> Any:
        if isinstance(upsampler, dict | None) or upsampler == "captions":
            return upsampler
        raise ValueError("must be captions, a section like recaption with an engine that writes text, or null")

    @model_validator(mode="after")
    def _is_sound(self) -> ExperimentConfig:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds names a seed twice; name each once")
        if self.steps is not None and self.steps != sorted(set(self.steps)):
            raise ValueError("steps must rise, e.g. steps: [1000, 2000, 4000]")
        return self

    @property
    def writer(self) -> RecaptionConfig | None:
        """The engine that expands prompts, where the recipe names one. Raises RecipeError."""
        if not isinstance(self.upsampler, dict):
            return None
        writer = validate(RecaptionConfig, self.upsampler, "experiment.upsampler")
        if writer.engine == "coca":
            hint = "use transformers or openai, or write upsampler: captions"
            raise RecipeError("experiment.upsampler.engine", "coca writes no text", hint)
        return writer

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> ExperimentConfig:
        """The validated section `experiment`, held against `train`. Raises RecipeError."""
        if recipe.experiment is None:
            hint = "add the section, e.g. experiment: {arms: [original, short95, descriptive95], seeds: [0, 1, 2]}"
            raise RecipeError("experiment", "is missing", hint)
        config, train = validate(cls, recipe.experiment, "experiment"), TrainConfig.from_recipe(recipe)
        _ = config.writer
        if train.model != "diffusion":
            raise RecipeError("train.model", f"{train.model} draws no images from prompts", "name diffusion")
        if "://" in train.run:
            hint = "name a folder that every worker sees; each run's own copy goes to train.checkpoint.upload"
            raise RecipeError("train.run", "is a bucket, and an experiment keeps its measurements in a folder", hint)
        if config.steps is not None and config.steps[-1] != train.steps:
            problem = f"ends at {config.steps[-1]}, and train.steps is {train.steps}"
            raise RecipeError("experiment.steps", problem, "let the last of them be train.steps")
        if config.steps is not None and len(config.steps) > 1 and train.schedule != "constant":
            problem = f"{train.schedule} leads to another rate at every step where a run may end"
            hint = "write schedule: constant, or measure at the end only (experiment.steps: null)"
            raise RecipeError("train.schedule", problem, hint)
        return config

    def points(self, train: TrainConfig) -> list[int]:
        """The steps at which arms are measured, rising; the last is the end."""
        return self.steps or [train.steps]
