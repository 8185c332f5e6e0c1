"""A recipe → all systems trained and measured → the page; resumable (`capstan experiment lecture`)

    lecture.run/lecture.json        what must not change between starts; systems may be added
    lecture.run/systems/            the runs (lecture.systems), each an ordinary run
    lecture.run/measured/           scores and first images (lecture.measure)
    lecture.run/played/             clips and sounds of finished runs (lecture.media)
    lecture.run/results.json, strip.png, index.html

A system is trained to its first point, measured with its averaged weights, then resumed up to the next one. Every
system is finished before the next begins, and the page is written again after each.
"""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path
from typing import Any, Final

from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage import Storage
from capstan.training.config import TrainConfig
from capstan.training.experiment.measure import SHOWN, Measurements
from capstan.training.experiment.prompts import Prompt, world_prompts
from capstan.training.launch import train_one
from capstan.training.lecture.clock import Spent, spent, train_for
from capstan.training.lecture.config import LectureConfig
from capstan.training.lecture.systems import LOG_EVERY, Plan, Stage, plan
from capstan.training.metrics.samples import world_of

logger = logging.getLogger(__name__)

_IDENTITY: Final = ("minutes", "clock", "points", "prompts", "threads")
_SET: Final = "descriptive"  # of the prompts: true descriptions of unseen scenes


def run_lecture(recipe: Recipe, beside: Path, only: str | None = None) -> dict[str, Any]:
    """Train and measure what is not done yet, write the page, and return the summary.

    `beside` is the folder to which recipe files of systems are relative; `only` names one system to work on. Raises
    CapstanError, and KeyboardInterrupt if it was stopped; the same call then resumes.
    """
    lecture = Lecture(recipe, beside)
    if only is not None and only not in {one.system.name for one in lecture.plans}:
        known = ", ".join(dict.fromkeys(one.system.name for one in lecture.plans))
        raise RecipeError("--only", f"no system {only}", f"use one of {known}")
    lecture.prepare_folder()
    for one in lecture.plans:
        if (only is None or only == one.system.name) and not lecture.finished(one):
            lecture.work(one)
            lecture.report()
    if only is None:
        lecture.play()
    return lecture.report()


class Lecture:
    """The lecture of a recipe, and its folder."""

    def __init__(self, recipe: Recipe, beside: Path) -> None:
        self.recipe, self.config = recipe, LectureConfig.from_recipe(recipe)
        self.storage = Storage(self.config.run, field="lecture.run")
        self.measurements = Measurements(self.storage)
        pairs = itertools.product(self.config.seeds, self.config.systems)
        self.plans = [plan(system, seed, self.config, beside) for seed, system in pairs]
        world = world_of(recipe)
        assert world is not None, "checked with the section"
        self.prompts: list[Prompt] = list(itertools.islice(world_prompts(world, _SET), self.config.prompts))

    def prepare_folder(self) -> None:
        """Create the folder, or check that it holds this lecture. Raises RecipeError."""
        world = world_of(self.recipe)
        now = self.config.model_dump(mode="json", include=set(_IDENTITY))
        now |= {"world": None if world is None else world.model_dump(mode="json")}
        now["images"] = [shard.sha256 for shard in Dataset(Storage(self.recipe.dataset)).manifest.shards]
        if self.storage.exists("lecture.json"):
            before = json.loads(self.storage.read("lecture.json"))
            if changed := sorted(name for name in now if before.get(name) != now[name]):
                problem = f"{self.config.run} holds a lecture with other {', '.join(changed)}"
                raise RecipeError("lecture.run", problem, "restore them, or set another folder")
        else:
            self.storage.check_writable()
            self.storage.write("lecture.json", json.dumps(now, indent=1).encode())

    def points(self, one: Plan) -> int:
        """Return the number of measurements of a system; a finished run has one."""
        return self.config.points if one.stages else 1

    def finished(self, one: Plan) -> bool:
        """Return whether a system was measured at its last point."""
        return self.measurements.read(one.name, self.points(one)) is not None

    def work(self, one: Plan) -> None:
        """Train a system to each of its points, and measure it there."""
        if not one.stages:
            self._measure(one, 1, _spent_by(one.product))
            return
        before = Spent()
        for stage in one.stages[:-1]:
            used = self._train(stage, 60 * stage.minutes)
            before = Spent(0, before.wall_s + used.wall_s, before.cpu_s + used.cpu_s)
        last = one.stages[-1]
        for point in range(1, self.config.points + 1):
            if self.measurements.read(one.name, point) is None:
                used = self._train(last, 60 * last.minutes * point / self.config.points)
                whole = Spent(used.steps, before.wall_s + used.wall_s, before.cpu_s + used.cpu_s)
                self._measure(one, point, whole)

    def play(self) -> None:
        """Draw the clips and sounds of finished runs."""
        from capstan.training.lecture.media import draw_media

        for one in self.config.media:
            draw_media(self.storage, one)

    def _train(self, stage: Stage, seconds: float) -> Spent:
        batch = TrainConfig.from_section(stage.section | {"steps": 1}).batch

        def measured() -> Spent:
            return spent(stage.folder, batch)

        def train_to(steps: int) -> None:
            train_one(stage.recipe(self.recipe, -(-steps // LOG_EVERY) * LOG_EVERY))

        return train_for(seconds, self.config.clock, measured, train_to)

    def _measure(self, one: Plan, point: int, used: Spent) -> None:
        from capstan.training.lecture.measure import SHOWN_SET, measure

        field = f"lecture.systems.{one.system.name}"
        facts, images = measure(one.product, self.prompts, used, field)
        self.measurements.write(one.name, point, facts, {SHOWN_SET: images[:SHOWN]})
        logger.info(
            "lecture: %s measured after %d steps, %.1f CPU minutes, %.1f minutes; %.3f s per image",
            *(one.name, used.steps, used.cpu_s / 60, used.wall_s / 60, facts["seconds"] / facts["pictures"]),
        )

    def report(self) -> dict[str, Any]:
        """Write results.json, the strip and the page of all systems that are finished; return the summary."""
        from capstan.training.lecture.page import write_page
        from capstan.training.lecture.results import found, sentence

        done = []
        for system in self.config.systems:
            plans = [one for one in self.plans if one.system.name == system.name and self.finished(one)]
            runs = {
                one.seed: [self.measurements.read(one.name, n) or {} for n in range(1, self.points(one) + 1)]
                for one in plans
            }
            if runs:
                done.append(found(system, runs, self.config.clock, self.config.draws))
        path = write_page(self.storage, self.config, done, self.prompts, self.measurements)
        seen = {one.system.name: sentence(one) for one in done}
        return {"run": self.config.run, "systems": len(done), "seen": seen, "page": path}


def _spent_by(run: Path) -> Spent:
    """Return what the steps of a finished run took; nothing if it has no log, as a product alone."""
    file = run / "recipe.json"
    if not file.is_file():
        return Spent()
    train = TrainConfig.from_section(json.loads(file.read_text(encoding="utf-8"))["recipe"]["train"])
    return spent(run, train.batch)
