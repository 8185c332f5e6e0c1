"""A system of a lecture → its runs, in their order, each a recipe of its own

    RUN/systems/ddpm-s0              the run of the system's recipe
    RUN/systems/ddpm-s0-first-0      the runs of its `train.before`

Everything is the recipe's own but the dataset, the folders, the seed, a constant learning rate (so that any step can be
the last) and, if the lecture says so, the number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from capstan.pipeline.config import Recipe
from capstan.pipeline.errors import RecipeError
from capstan.training.config import TrainConfig
from capstan.training.config.families import reads_captions, traits_of
from capstan.training.lecture.config import LectureConfig, System

LOG_EVERY: Final = 5
_ENGINE: Final = {"strategy": "ddp", "launcher": "local", "workers": 1}


@dataclass(frozen=True)
class Stage:
    """One run of a system, with its share of the minutes."""

    section: dict[str, Any]  # `train`
    minutes: float

    @property
    def folder(self) -> Path:
        return Path(self.section["run"])

    def recipe(self, whole: Recipe, steps: int) -> Recipe:
        """Return the recipe of this run up to `steps`."""
        return whole.model_copy(update={"train": self.section | {"steps": steps}, "lecture": None})


@dataclass(frozen=True)
class Plan:
    """A system with a seed: its stages; empty for a run that was finished elsewhere."""

    system: System
    seed: int
    stages: tuple[Stage, ...]

    @property
    def name(self) -> str:
        return f"{self.system.name}-s{self.seed}"

    @property
    def product(self) -> Path:
        """Return the run to measure."""
        return self.stages[-1].folder if self.stages else Path(str(self.system.run))


def plan(system: System, seed: int, config: LectureConfig, beside: Path) -> Plan:
    """Return the runs of a system. `beside` is the folder to which recipe files are relative. Raises RecipeError."""
    if system.recipe is None:
        return Plan(system, seed, ())
    field, file = f"lecture.systems.{system.name}", beside / system.recipe
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise RecipeError(f"{field}.recipe", f"cannot read {file} ({error})", "name a recipe file") from None
    section = raw.get("train") if isinstance(raw, dict) else None
    if not isinstance(section, dict):
        raise RecipeError(f"{field}.recipe", f"{file} has no section train", "name a recipe that trains")
    section = _changed(section, system.set, field)
    home = Path(config.run) / "systems"
    earlier = section.pop("before", [])
    moved = {str(one["run"]): str(home / f"{system.name}-s{seed}-first-{n}") for n, one in enumerate(earlier)}
    moved[str(section["run"])] = str(home / f"{system.name}-s{seed}")
    runs = [_fixed(_moved(one, moved), seed, config) for one in (*earlier, section)]
    first = config.minutes * system.first / len(earlier) if earlier else 0.0
    last = config.minutes - first * len(earlier)
    minutes = [first] * len(earlier) + [last]
    made = Plan(system, seed, tuple(Stage(run, share) for run, share in zip(runs, minutes, strict=True)))
    _check(made, field)
    return made


def _check(made: Plan, field: str) -> None:
    for stage in made.stages:
        train = TrainConfig.from_section(stage.section | {"steps": 1})
    if traits_of(train.model).draws not in (None, "image", "scene"):
        raise RecipeError(field, f"{train.model} draws no images", "remove it")
    if traits_of(train.model).draws is not None and not reads_captions(train):
        hint = "give it text in its recipe or here, e.g. set: {train.ddpm.text: {…}}"
        raise RecipeError(field, f"{train.model} takes no prompts with these settings", hint)


def _changed(section: Mapping[str, Any], changes: Mapping[str, Any], field: str) -> dict[str, Any]:
    """Return `train` with the keys of `set`, which are dotted and start with train."""
    whole: dict[str, Any] = {"train": dict(section)}
    for name, value in changes.items():
        *path, last = name.split(".")
        if path[:1] != ["train"]:
            raise RecipeError(f"{field}.set", f"{name} is not a key of train", "write e.g. train.batch: 32")
        inside = whole
        for key in path:
            inside[key] = dict(inside.get(key) or {})
            inside = inside[key]
        inside[last] = value
    return dict(whole["train"])


def _moved(value: Any, moved: Mapping[str, str]) -> Any:
    """Return plain data in which the paths of runs, and of files in them, lie in the lecture's folder."""
    if isinstance(value, dict):
        return {key: _moved(inner, moved) for key, inner in value.items()}
    if isinstance(value, list):
        return [_moved(inner, moved) for inner in value]
    if isinstance(value, str):
        for before, after in moved.items():
            if value == before or value.startswith(f"{before}/"):
                return after + value.removeprefix(before)
    return value


def _fixed(section: dict[str, Any], seed: int, config: LectureConfig) -> dict[str, Any]:
    engine = (section.get("engine") or {}) | _ENGINE | ({} if config.threads is None else {"threads": config.threads})
    engine.pop("zero", None)
    fixed = {"seed": seed, "schedule": "constant", "log_every": LOG_EVERY, "watch": {"trackers": []}}
    fixed |= {"checkpoint": {"every": 200, "keep": 1}, "engine": engine}
    return section | fixed
