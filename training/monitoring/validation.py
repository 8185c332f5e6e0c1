"""Sample grids and evaluations during training, and the best state kept.

    samples/step-001000.png     the same prompts and noise every time
    evaluations.jsonl           one JSON object per evaluation: {step, count, measures: {…}, seconds, ceilings: {…}}
    best/step-005000/           checkpoint/ (hard links: no extra space until training deletes its own) and product/
    best.json                   {step, measure, count, …, value, folder}: the best state; written after its folder

The averaged model is written in the product's format, and every worker samples its share of the prompts with it. So the
images are those of `capstan sample`, however the weights are sharded, and no worker waits for another one to sample.
The run's random state is not changed. Work interrupted by a stop is redone on resume.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Unpack

from capstan.pipeline.config import Recipe
from capstan.pipeline.errors import DamagedFile, RecipeError
from capstan.pipeline.storage import Storage
from capstan.training.config import TrainConfig
from capstan.training.config.families import family_class, reads_captions
from capstan.training.config.monitoring import Best, Evaluate, Samples
from capstan.training.distributed.engine import Engine
from capstan.training.drawing.drawer import Drawer, Drawn, Options, joined
from capstan.training.drawing.grid import sheet
from capstan.training.metrics.ceiling import ceiling
from capstan.training.metrics.metric import Metric, check_kinds, make_metrics, random_state_kept
from capstan.training.metrics.samples import EvalSet, make_eval_set
from capstan.training.monitoring.metrics_logger import MetricsLogger
from capstan.training.run import Run, whole_lines

logger = logging.getLogger(__name__)

_DRAWN: Final = "drawing"  # the folder of the averaged model while it samples
_AT_ONCE: Final = 16  # images of a grid


class Validation:
    """The grids and evaluations of `train.watch`. Call all methods on every worker."""

    def __init__(
        self,
        recipe: Recipe,
        train: TrainConfig,
        engine: Engine,
        meter: MetricsLogger,
        layer: str | None,
        write_average: Callable[[Path], None],
    ) -> None:
        """Prepare prompts and metrics. `write_average` publishes a product with the averaged weights (all workers)."""
        self.train, self.engine, self.meter, self.run = train, engine, meter, Run(train)
        self.write_average = write_average
        self.eval_set: EvalSet | None = None
        self.continued = functools.cache(
            lambda count: make_eval_set(recipe, train, layer, count, "train.watch.samples.count")
        )
        self.metrics: list[Metric] = []
        self.ceilings: dict[str, float] | None = None  # of distances, measured with the first evaluation
        self.prompts: list[str] = []
        prompted = reads_captions(train)
        if (samples := train.watch.samples) is not None and prompted:
            self.prompts = samples.prompts or _prompts(recipe, train, layer, samples.count)
        elif samples is not None:
            if samples.prompts is not None:
                raise RecipeError("train.watch.samples.prompts", "this model takes no prompts", "set count instead")
            self.prompts = [f"seed {number}" for number in range(samples.count)]  # labels: the model ignores them
        if (wanted := train.watch.evaluate) is not None:
            field = "train.watch.evaluate"
            self.eval_set = make_eval_set(recipe, train, layer, wanted.count, f"{field}.count")
            kind = family_class(train.model).draws
            self.metrics = make_metrics(wanted, field, kind)
            check_kinds(self.metrics, kind, f"{field}.measures", prompted=prompted)
            for metric in self.metrics:
                metric.check(self.eval_set)

    def due(self, step: int) -> bool:
        """Return whether a grid or an evaluation is scheduled after `step` steps."""
        watch = self.train.watch
        return self._due(step, watch.samples) or self._due(step, watch.evaluate)

    def after(self, step: int, stopping: Callable[[], bool], save: Callable[[], None]) -> bool:
        """Run what is due after `step` steps and not done yet. Return True if a stop was requested before it was done.

        `save` writes the checkpoint of this step unless there is one.
        """
        watch = self.train.watch
        grid, evaluation = self.left(step)
        if not grid and not evaluation:
            return False
        with self.meter.paused(), random_state_kept(self.engine.device), self._drawing() as sampler:
            if grid and watch.samples is not None:
                self._draw_grid(step, watch.samples, sampler)
            if evaluation and watch.evaluate is not None:
                values = self._measure(watch.evaluate, sampler, stopping)
                if values is None:
                    return True
                if watch.best is not None:  # before the record, which marks the evaluation as done
                    self._keep_if_best(step, watch.best, watch.evaluate, values["measures"], save)
                self._record(step, watch.evaluate, values)
        return False

    def left(self, step: int) -> tuple[bool, ...]:
        """Return whether a grid, and an evaluation, is due after `step` steps and missing; same on all workers."""
        samples, evaluate = self.train.watch.samples, self.train.watch.evaluate
        return self.engine.raised(
            self._due(step, samples) and self.engine.is_main and not (self.run.folder / _grid_name(step)).exists(),
            self._due(step, evaluate) and self.engine.is_main and step not in self._evaluated(),
        )

    def _due(self, step: int, wanted: Samples | Evaluate | None) -> bool:
        return wanted is not None and step > 0 and (step % wanted.every == 0 or step == self.train.steps)

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[Drawer]:
        """Yield a sampler with the averaged weights, on every worker."""
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
        """Return this worker's share of the numbers 0 … count − 1."""
        return list(range(self.engine.rank, count, self.engine.world))

    # Samples ---------------------------------------------------------------------------------------------------------

    def _draw_grid(self, step: int, wanted: Samples, sampler: Drawer) -> None:
        mine = self._mine(len(self.prompts))
        given: Options = {}
        if sampler.continues is not None and mine:
            given["first_frames"] = self.continued(len(self.prompts)).clips(mine, *sampler.continues)[:, 0]
        prompts = [self.prompts[n] for n in mine]
        drawn = self._draw(sampler, prompts, mine, wanted, _AT_ONCE, **given) if mine else None
        shares = self.engine.collect(drawn)
        if self.engine.is_main:
            png = io.BytesIO()
            sheet(joined(shares, len(self.prompts)), self.prompts).save(png, format="PNG")
            Storage(str(self.run.folder), field="train.run").write(_grid_name(step), png.getvalue())
            self.meter.trackers.image(step, "samples", self.run.folder / _grid_name(step))
            logger.info("samples after step %d: %s", step, self.run.folder / _grid_name(step))

    def _draw(
        self,
        sampler: Drawer,
        prompts: list[str],
        seeds: list[int],
        wanted: Samples | Evaluate,
        batch: int,
        **given: Unpack[Options],
    ) -> Drawn:
        """Draw in the precision of training."""
        options: Options = {"steps": wanted.steps, "guidance": wanted.guidance, **given}
        with self.engine.computing():
            return sampler.draw(prompts, seeds, batch=batch, **options)

    # Evaluation ------------------------------------------------------------------------------------------------------

    def _measure(self, wanted: Evaluate, sampler: Drawer, stopping: Callable[[], bool]) -> dict[str, Any] | None:
        """Sample and measure, each worker its share. Return None if a stop is requested."""
        assert self.eval_set is not None
        started, mine, side = time.monotonic(), self._mine(wanted.count), 0
        share = -(-wanted.count // self.engine.world)
        with contextlib.ExitStack() as stack:
            for metric in self.metrics:
                stack.enter_context(metric.ready(self.engine.device))
            for start in range(0, share, wanted.batch):  # the same number of rounds on every worker
                if self.engine.raised(stopping())[0]:
                    return None
                if numbers := mine[start : start + wanted.batch]:
                    drawn = self._draw(sampler, self.eval_set.prompts(numbers), numbers, wanted, wanted.batch)
                    side = drawn.images.shape[-2]
                    for metric in self.metrics:
                        metric.add(self.eval_set, numbers, metric.seen(drawn))
            measures: dict[str, float] = {}
            for metric in self.metrics:
                measures |= metric.result(self.engine.total)
        if self.ceilings is None:
            self.ceilings = self._measure_ceilings(wanted, max(self.engine.collect(side)))
        seconds = round(time.monotonic() - started, 1)
        return {"measures": measures, "seconds": seconds, "ceilings": self.ceilings}

    def _measure_ceilings(self, wanted: Evaluate, side: int) -> dict[str, float]:
        """Return the values of distances between two halves of the true images, of `side` pixels."""
        assert self.eval_set is not None
        engine, ceilings = self.engine, dict[str, float]()
        kind = family_class(self.train.model).draws
        for metric in make_metrics(wanted, "train.watch.evaluate", kind):
            if not metric.uses_prompts and kind in ("image", "scene"):
                where = {"device": engine.device, "batch": wanted.batch, "rank": engine.rank, "world": engine.world}
                ceilings |= ceiling(metric, self.eval_set, side, total=engine.total, **where)
        return ceilings

    def _record(self, step: int, wanted: Evaluate, values: dict[str, Any]) -> None:
        if not self.engine.is_main:
            return
        measures = {name: _or_none(value) for name, value in values["measures"].items()}
        record = {"step": step, "count": wanted.count, "measures": measures, "seconds": values["seconds"]}
        if values["ceilings"]:
            record["ceilings"] = {name: round(value, 6) for name, value in values["ceilings"].items()}
        with self.run.evaluations.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        known = {f"evaluation/{name}": value for name, value in measures.items() if value is not None}
        self.meter.trackers.scalars(step, known)
        best = {name: f" (ceiling {value:.4g})" for name, value in values["ceilings"].items()}
        known_words = ((name, value) for name, value in measures.items() if value is not None)
        words = ", ".join(f"{name} {value:.4g}{best.get(name, '')}" for name, value in known_words)
        logger.info("evaluation after step %d: %s (%.0f s)", step, words, values["seconds"])

    def _evaluated(self) -> set[int]:
        """Return the steps that have an evaluation."""
        return {record["step"] for _, record in whole_lines(self.run.evaluations)}

    # The best --------------------------------------------------------------------------------------------------------

    def _best_before(self, pointer: Path) -> dict[str, Any] | None:
        """Return the content of best.json; None, with a warning, if it is damaged."""
        try:
            content = Storage(str(self.run.folder)).read_json(pointer.name, "")
            float(content["value"])
        except (DamagedFile, KeyError, TypeError, ValueError):
            logger.warning("%s is damaged: this evaluation counts as the best", pointer)
            return None
        return content

    def _keep_if_best(
        self, step: int, best: Best, wanted: Evaluate, measures: dict[str, float], save: Callable[[], None]
    ) -> None:
        value, pointer = measures[best.measure], self.run.folder / "best.json"
        terms = {"measure": best.measure, **wanted.terms(best.measure)}
        before = self._best_before(pointer) if self.engine.is_main and pointer.exists() else None
        if before is not None and terms != {name: before.get(name) for name in terms}:
            before = None  # the recipe changed, so the values are not comparable
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
            content = {"step": step, **terms, "value": value, "folder": f"best/{folder.name}"}
            Storage(str(self.run.folder), field="train.run").write(pointer.name, json.dumps(content).encode())
            for old in home.iterdir():
                if old != folder:
                    shutil.rmtree(old)
            logger.info("best so far: %s %.4g after step %d, kept in %s", best.measure, value, step, folder)


def _link(source: str, target: str) -> None:
    """Hard-link a file; copy it if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _grid_name(step: int) -> str:
    return f"samples/step-{step:06d}.png"


def _prompts(recipe: Recipe, train: TrainConfig, layer: str | None, count: int) -> list[str]:
    eval_set = make_eval_set(recipe, train, layer, count, "train.watch.samples.prompts")
    return eval_set.prompts(range(count))


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)
