"""Images with the averaged weights while a run trains: sample grids, evaluations, and the best state kept.

    samples/step-001000.png     the same prompts and noise every time
    evaluations.jsonl           one JSON object an evaluation: {step, count, measures: {name: value}, seconds}
    best/step-005000/           checkpoint/ (links: no room until training drops its own) and product/, as drawn with
    best.json                   {step, measure, count, …, value, folder}: which one; written once it is whole

The averaged model is written as the product will be, and every worker draws its share of the prompts with it: what is
seen is what `capstan sample` gives, whatever shards the weights, and no worker waits for another to draw. Nothing here
touches the run's randomness. What a stop cuts off is made up for when the run goes on.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from capstan.pipeline.config import Recipe
from capstan.pipeline.storage import Storage
from capstan.training.config import TrainConfig
from capstan.training.config.monitoring import Best, Evaluate, Samples
from capstan.training.distributed.engine import Engine
from capstan.training.metrics.metric import Metric, judges_of, undisturbed
from capstan.training.metrics.samples import EvalSet, subjects_of
from capstan.training.monitoring.metrics_logger import MetricsLogger
from capstan.training.run import Run

logger = logging.getLogger(__name__)

_DRAWN: Final = "drawing"  # the folder of the averaged model while it draws
_AT_ONCE: Final = 16  # images of a grid


class Validation:
    """What `train.watch` asks for besides numbers of the steps; all methods are called on every worker."""

    def __init__(
        self,
        recipe: Recipe,
        train: TrainConfig,
        engine: Engine,
        meter: MetricsLogger,
        layer: str | None,
        write_average: Callable[[Path], None],
    ) -> None:
        """`write_average` publishes a product with the averaged weights; called on every worker."""
        self.train, self.engine, self.meter, self.run = train, engine, meter, Run(train)
        self.write_average = write_average
        self.subjects: EvalSet | None = None
        self.judges: list[Metric] = []
        self.prompts: list[str] = []
        if (samples := train.watch.samples) is not None:
            self.prompts = samples.prompts or _prompts(recipe, train, layer, samples.count)
        if (wanted := train.watch.evaluate) is not None:
            field = "train.watch.evaluate"
            self.subjects = subjects_of(recipe, train, layer, wanted.count, f"{field}.count")
            self.judges = judges_of(wanted, field)
            for judge in self.judges:
                judge.check(self.subjects)

    def due(self, step: int) -> bool:
        """Whether something may be drawn after `step` steps."""
        watch = self.train.watch
        return self._due(step, watch.samples) or self._due(step, watch.evaluate)

    def after(self, step: int, stopping: Callable[[], bool], save: Callable[[], None]) -> bool:
        """Do what is due after `step` steps and has not been done. True: told to stop, and left it for later.

        `save` writes the checkpoint of this step, if there is none yet.
        """
        watch = self.train.watch
        grid, evaluation = self.left(step)
        if not grid and not evaluation:
            return False
        with self.meter.paused(), undisturbed(self.engine.device), self._drawing() as sampler:
            if grid and watch.samples is not None:
                self._draw_grid(step, watch.samples, sampler)
            if evaluation and watch.evaluate is not None:
                values = self._measure(watch.evaluate, sampler, stopping)
                if values is None:
                    return True
                if watch.best is not None:  # before the record, which says that nothing is left to do
                    self._keep_if_best(step, watch.best, watch.evaluate, values["measures"], save)
                self._record(step, watch.evaluate, values)
        return False

    def left(self, step: int) -> tuple[bool, ...]:
        """Whether a grid is due after `step` steps and not there, and an evaluation; the same on all workers."""
        samples, evaluate = self.train.watch.samples, self.train.watch.evaluate
        return self.engine.raised(
            self._due(step, samples) and self.engine.is_main and not (self.run.folder / _grid_name(step)).exists(),
            self._due(step, evaluate) and self.engine.is_main and step not in self._evaluated(),
        )

    def _due(self, step: int, wanted: Samples | Evaluate | None) -> bool:
        return wanted is not None and step > 0 and (step % wanted.every == 0 or step == self.train.steps)

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[Any]:
        """A sampler with the averaged weights on every worker."""
        from capstan.training.sample import open_sampler

        folder = self.run.folder / _DRAWN
        self.write_average(folder)
        self.engine.wait()
        sampler = open_sampler(folder, device=str(self.engine.device))
        self.engine.wait()
        try:
            yield sampler
        finally:
            if self.engine.is_main:
                shutil.rmtree(folder, ignore_errors=True)

    def _mine(self, count: int) -> list[int]:
        """This worker's share of the numbers 0 … count − 1."""
        return list(range(self.engine.rank, count, self.engine.world))

    # Samples ---------------------------------------------------------------------------------------------------------

    def _draw_grid(self, step: int, wanted: Samples, sampler: Any) -> None:
        from capstan.training.sample import grid

        mine = self._mine(len(self.prompts))
        images = self._draw(sampler, [self.prompts[n] for n in mine], mine, wanted, _AT_ONCE) if mine else None
        shares = self.engine.collect(images)
        if self.engine.is_main:
            world, png = self.engine.world, io.BytesIO()
            whole = np.stack([shares[n % world][n // world] for n in range(len(self.prompts))])
            grid(whole, self.prompts).save(png, format="PNG")
            Storage(str(self.run.folder), field="train.run").write(_grid_name(step), png.getvalue())
            self.meter.trackers.image(step, "samples", self.run.folder / _grid_name(step))
            logger.info("samples after step %d: %s", step, self.run.folder / _grid_name(step))

    def _draw(
        self, sampler: Any, prompts: list[str], seeds: list[int], wanted: Samples | Evaluate, batch: int
    ) -> np.ndarray:
        """Images uint8 [N, H, W, 3], in the precision that training computes in."""
        with self.engine.computing():
            images: np.ndarray = sampler.draw(prompts, seeds, steps=wanted.steps, guidance=wanted.guidance, batch=batch)
        return images

    # Evaluation ------------------------------------------------------------------------------------------------------

    def _measure(self, wanted: Evaluate, sampler: Any, stopping: Callable[[], bool]) -> dict[str, Any] | None:
        """Draw and judge, each worker its share; None when told to stop on the way."""
        assert self.subjects is not None
        began, mine = time.monotonic(), self._mine(wanted.count)
        share = -(-wanted.count // self.engine.world)
        with contextlib.ExitStack() as held:
            for judge in self.judges:
                held.enter_context(judge.ready(self.engine.device))
            for start in range(0, share, wanted.batch):  # as many rounds on every worker
                if self.engine.raised(stopping())[0]:
                    return None
                if numbers := mine[start : start + wanted.batch]:
                    images = self._draw(sampler, self.subjects.prompts(numbers), numbers, wanted, wanted.batch)
                    for judge in self.judges:
                        judge.add(self.subjects, numbers, images)
            measures: dict[str, float] = {}
            for judge in self.judges:
                measures |= judge.result(self.engine.total)
        return {"measures": measures, "seconds": round(time.monotonic() - began, 1)}

    def _record(self, step: int, wanted: Evaluate, values: dict[str, Any]) -> None:
        if not self.engine.is_main:
            return
        told = {name: _or_none(value) for name, value in values["measures"].items()}
        record = {"step": step, "count": wanted.count, "measures": told, "seconds": values["seconds"]}
        with self.run.evaluations.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        known = {f"evaluation/{name}": value for name, value in told.items() if value is not None}
        self.meter.trackers.scalars(step, known)
        words = ", ".join(f"{name} {value:.4g}" for name, value in told.items() if value is not None)
        logger.info("evaluation after step %d: %s (%.0f s)", step, words, values["seconds"])

    def _evaluated(self) -> set[int]:
        """The steps after which there was an evaluation."""
        if not self.run.evaluations.exists():
            return set()
        return {int(json.loads(line)["step"]) for line in self.run.evaluations.read_text().splitlines()}

    # The best --------------------------------------------------------------------------------------------------------

    def _keep_if_best(
        self, step: int, best: Best, wanted: Evaluate, measures: dict[str, float], save: Callable[[], None]
    ) -> None:
        value, pointer = measures[best.measure], self.run.folder / "best.json"
        judged = {"measure": best.measure, **wanted.terms(best.measure)}
        before = json.loads(pointer.read_text()) if self.engine.is_main and pointer.exists() else None
        if before is not None and judged != {name: before.get(name) for name in judged}:
            before = None  # the recipe has changed its mind, and the values do not compare
        better = not math.isnan(value) and (before is None or best.sign * (value - before["value"]) > 0)
        if not self.engine.raised(self.engine.is_main and better)[0]:
            return
        save()
        if self.engine.is_main:
            home = self.run.folder / "best"
            folder = home / f"step-{step:06d}"

            def fill(partial: Path) -> None:
                checkpoint = self.run.folder / "checkpoints" / folder.name
                shutil.copytree(checkpoint, partial / "checkpoint", copy_function=_link)
                (self.run.folder / _DRAWN).rename(partial / "product")

            self.run.publish(folder, fill)
            told = {"step": step, **judged, "value": value, "folder": f"best/{folder.name}"}
            Storage(str(self.run.folder), field="train.run").write(pointer.name, json.dumps(told).encode())
            for old in home.iterdir():
                if old != folder:
                    shutil.rmtree(old)
            logger.info("best so far: %s %.4g after step %d, kept in %s", best.measure, value, step, folder)


def _link(source: str, target: str) -> None:
    """A second name for a file; a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _grid_name(step: int) -> str:
    return f"samples/step-{step:06d}.png"


def _prompts(recipe: Recipe, train: TrainConfig, layer: str | None, count: int) -> list[str]:
    subjects = subjects_of(recipe, train, layer, count, "train.watch.samples.prompts")
    return subjects.prompts(range(count))


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)
