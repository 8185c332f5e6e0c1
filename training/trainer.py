"""The training loop: recipe → a trained product, in every worker

It is independent of the model (see training.family) and of the cluster (see training.launch).

    fit(recipe), in every worker:   data → family → engine → (load) → step, step, … → (save) → product

Runs under any launcher that sets torch's environment: `capstan train`,
`accelerate launch -m capstan.training.trainer RECIPE`, `torchrun -m capstan.training.trainer RECIPE`, or alone as
`python -m capstan.training.trainer RECIPE`.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from capstan.pipeline import extras
from capstan.pipeline.errors import CapstanError

if __name__ == "__main__":
    try:
        extras.require(extras.TRAIN, "capstan.training.trainer")
    except CapstanError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)

import torch

from capstan.pipeline.config import Recipe, validate
from capstan.pipeline.storage.local import disk_errors
from capstan.pipeline.text.printable import PrintableFormatter
from capstan.pipeline.text.recipe_file import read_recipe
from capstan.training.config import Shape, TrainConfig
from capstan.training.config.families import family_class
from capstan.training.data.bad_samples import FILE, BadSamples
from capstan.training.data.dataset import TrainingData
from capstan.training.data.loader import LoadedBatch, Loader
from capstan.training.data.mixture import MixedData
from capstan.training.data.order import hash64
from capstan.training.distributed.checkpoint import Checkpoints
from capstan.training.distributed.ema import Ema
from capstan.training.distributed.engine import Engine
from capstan.training.distributed.model_options import place
from capstan.training.distributed.step import Step
from capstan.training.draws import draws_of
from capstan.training.family import Batch, Family
from capstan.training.monitoring.divergence import DivergenceMonitor
from capstan.training.monitoring.metrics_logger import MetricsLogger
from capstan.training.monitoring.validation import Validation
from capstan.training.product import find_product, name_family
from capstan.training.run import Run, last_record, logging_to
from capstan.training.run_data import open_data, pin
from capstan.training.signals import Interrupts
from capstan.training.upload import Upload

logger = logging.getLogger("capstan.training.trainer")  # not __name__: under `python -m` this module is __main__

_STOPPING = "stopping after this step; run the same command again to resume"


def fit(recipe: Recipe) -> dict[str, Any]:
    """Train as one worker of the run; return the summary {run, model, steps, samples, loss, product, stopped}.

    A stopped run resumes from its last checkpoint. A finished one is not trained again.
    """
    train = TrainConfig.from_recipe(recipe)
    engine, run, upload = Engine(train), Run(train), None
    with disk_errors(run.folder), contextlib.ExitStack() as held:
        held.callback(engine.close)
        if engine.is_main:
            run.open(recipe.model_dump(mode="json"))
            held.enter_context(run.locked())
            if train.bucket is not None:
                upload = held.enter_context(Upload(run, train.bucket, recipe.storage))
                upload.fetch()
            held.enter_context(logging_to(run.train_log))
        engine.wait()
        summary = run.finished() or _Fit(recipe, train, engine, upload).run()
        if upload is not None:
            upload.drain()
            if not summary["stopped"]:
                upload.finish()
        return summary


def learning_rate(train: TrainConfig, step: int) -> float:
    """Return the learning rate of step `step` (0, 1, …): linear warm-up, then `train.schedule`."""
    if isinstance(train.schedule, str):
        return train.lr * _rate(train, train.schedule, step, train.steps, start=0.0)
    restart = train.schedule.restart
    if step < restart:
        return train.lr * _rate(train, train.schedule.before, step, restart, start=0.0)
    start = _rate(train, train.schedule.before, restart, restart, start=0.0)
    return train.lr * _rate(train, train.schedule.then, step - restart, train.steps - restart, start=start)


def _rate(train: TrainConfig, shape: Shape, step: int, steps: int, start: float) -> float:
    """Return the rate of step `step` of a cycle of `steps`, as a fraction of lr: from `start` to 1, then by `shape`."""
    if step < train.warmup:
        return start + (1 - start) * (step + 1) / train.warmup
    if shape == "constant":
        return 1.0
    share = min(1.0, (step - train.warmup) / max(1, steps - train.warmup))
    fall = (1 + math.cos(math.pi * share)) / 2 if shape == "cosine" else 1 - share
    return train.final_lr + (1 - train.final_lr) * fall


class _Fit:
    """One worker's part of a run."""

    def __init__(self, recipe: Recipe, train: TrainConfig, engine: Engine, upload: Upload | None) -> None:
        self.recipe, self.train, self.engine, self.disk = recipe, train, engine, Run(train)
        self.upload = upload
        self.data = self._open_data()
        self.bad = BadSamples(self.disk.folder / FILE, train.data.bad.skip if train.data.bad else 0)
        self.family = self._build_family()
        # An unsharded copy on the CPU; the averaged weights are written from it.
        self.bare = copy.deepcopy(self.family.model) if engine.is_main else None
        self.family.to(engine.device)
        self.model = engine.prepare(self.family.model)
        self.ema = Ema(engine, train.ema)
        self.adversary = self.family.adversary
        if self.adversary is not None:
            self.adversary.attach(engine)
        in_use = (lambda path: False) if upload is None else upload.is_sending
        self.checkpoints = Checkpoints(train, engine, self.ema, self.adversary, in_use)
        self.metrics = MetricsLogger(engine, self.disk, self.family.name)
        self.monitor = DivergenceMonitor(engine, self.disk)
        self.validation = Validation(recipe, train, engine, self.metrics, self.data.layer, self._write_average)

    def _open_data(self) -> TrainingData | MixedData:
        if self.engine.is_main:
            pin(self.recipe, self.train, self.disk)
        self.engine.wait()
        return open_data(self.recipe, self.train, self.disk, self.engine.world)

    def _build_family(self) -> Family:
        train, chosen, assets = self.train, family_class(self.train.model), self.disk.assets
        if self.engine.is_main and not assets.is_dir():
            self.disk.publish(assets, lambda folder: chosen.make_assets(train, self.data, folder))
        self.engine.wait()
        torch.manual_seed(train.seed)
        family: Family = chosen(train, assets)
        if train.init is not None:
            family.start_from(find_product(train.init, "train.init"))
        if self.engine.is_main:
            family.inspect(self.data)
            facts = " · ".join(f"{name} {value}" for name, value in family.describe().items())
            logger.info("train %s: %s · %d samples an epoch", chosen.name, facts, len(self.data))
        return family

    # The loop --------------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train to the last step, or until a stop is requested; publish the product."""
        train = self.train
        step = self._resume()
        with Interrupts(_STOPPING) as interrupts, self._loader(step) as loader:
            if self._validate(step, interrupts, saved=True):  # work interrupted by a stop
                return self._stopped(step)
            for loaded in self.metrics.timed(loader):
                self._step(loaded)
                step = loaded.step + 1
                saving = step == train.steps or step % train.checkpoint.every == 0
                everything = saving or self.validation.due(step)
                stop = self.monitor.check(interrupts.seen or self._stop_requested(), everything=everything)
                if step % train.log_every == 0 or step == train.steps:
                    self.metrics.log(step, self._facts(step))
                if saving or stop:
                    self._save(step)
                stop = stop or self._validate(step, interrupts, saved=saving)
                if stop and (step < train.steps or any(self.validation.left(step))):
                    return self._stopped(step)
        return self._publish(step)

    def _loader(self, start: int) -> Loader:
        train, engine = self.train, self.engine
        return Loader(
            self.data,
            self.family.prepare,
            batch=train.batch,
            start=start,
            stop=train.steps,
            rank=engine.rank,
            world=engine.world,
            prefetch=train.data.prefetch,
            threads=train.data.threads,
            bad=self.bad,
        )

    def _step(self, loaded: LoadedBatch) -> None:
        """Make an optimizer step on this worker's share of the batch; randomness comes from (seed, step, sample)."""
        train, engine, step = self.train, self.engine, loaded.step
        engine.set_lr(learning_rate(train, step))
        if self.adversary is not None:
            self.adversary.set_step(step, learning_rate(train, step))
        dropout = hash64(train.seed, "dropout", step, engine.rank) >> 1
        whole = Step(train.accumulate, engine.rank, engine.world, dropout, step)
        parts = [place(part, train, engine.device) for part in _split(loaded.batch, train.accumulate)]
        with engine.computing():
            self.family.begin_step(self.model, parts, whole)
        losses, norm, finite = [], None, dict[str, torch.Tensor]()
        rows = train.batch // whole.shares
        for part, batch in enumerate(parts):
            first = (engine.rank * train.accumulate + part) * rows
            draw = draws_of(engine.device, train.seed, step, range(first, first + rows))
            whole.reseed(part)
            with self.metrics.counting(batch):
                with engine.computing():
                    loss, metrics = self.family.loss(self.model, batch, draw)
                norm = engine.backward(loss, last=part == train.accumulate - 1)
            if self.adversary is not None:
                metrics = {**metrics, **self.adversary.step(last=part == train.accumulate - 1)}
            losses.append(loss.detach())
            for name, flag in self.family.finite.items():
                finite[name] = flag & finite.get(name, flag)
            self.metrics.add({"loss": losses[-1], **metrics})
        engine.clamp(self.family.bounds)
        self.ema.update(step)
        if norm is not None and not engine.skipped:
            self.metrics.add({"grad_norm": norm})
        self.metrics.step(loaded.slots)
        self.monitor.add(step, loaded.keys, torch.stack(losses).mean(), norm, finite)

    def _validate(self, step: int, interrupts: Interrupts, saved: bool) -> bool:
        """Make the sample grids and evaluations that are due; return whether a stop was requested.

        If so, the checkpoint of this step has been saved.
        """
        pending = [] if saved else [lambda: self._save(step)]

        def save() -> None:
            if pending:
                pending.pop()()

        stop = self.validation.after(step, lambda: interrupts.seen or self._stop_requested(), save)
        if stop:
            save()
        return stop

    def _facts(self, step: int) -> dict[str, float]:
        samples, skipped = step * self.train.batch, self.bad.count(step)
        facts = {"lr": learning_rate(self.train, step - 1), "samples": samples, **self.data.progress(samples)}
        return {**facts, "skipped": skipped} if skipped else facts

    def _stop_requested(self) -> bool:
        return self.engine.is_main and self.disk.stop.exists()

    # Stopping and resuming --------------------------------------------------------------------------------------------

    def _resume(self) -> int:
        step, worker, shared = self.checkpoints.load()
        if shared and shared["data"] != self.data.identity() and self.engine.is_main:
            logger.warning("the dataset has changed since step %d: samples after it differ", step)
        if shared and self.engine.is_main:
            self._warn_of_another_end(step, shared.get("train_steps"))
        if "health" in shared:
            self.monitor.divergence.restore(shared["health"])
        self.metrics.start(step, worker, shared)
        return step

    def _warn_of_another_end(self, step: int, steps: int | None) -> None:
        """Report a learning rate that jumps, because train.steps was `steps` when this checkpoint was written."""
        train = self.train
        if steps is None or steps == train.steps or not isinstance(train.schedule, str):
            return
        rates = [learning_rate(train.model_copy(update={"steps": end}), step) for end in (steps, train.steps)]
        if not math.isclose(*rates, rel_tol=1e-6):
            logger.warning(
                "train.steps was %d and is %d: on schedule %s the learning rate of step %d would have been %.3g and is "
                "%.3g. Fix: set train.schedule: {before: %s, restart: %d, then: cosine} for a new cycle, or then: "
                "constant to hold lr",
                *(steps, train.steps, train.schedule, step + 1, *rates, train.schedule, steps),
            )

    def _save(self, step: int) -> None:
        data = {"data": self.data.identity(), "progress": self.data.progress(step * self.train.batch)}
        shared = {
            **data,
            "train_steps": self.train.steps,
            "health": self.monitor.divergence.state(),
            **self.metrics.shared_state(),
        }
        saved = self.checkpoints.save(step, self.metrics.state(), shared)
        if self.upload is not None:
            self.upload.send(saved)

    def _stopped(self, step: int) -> dict[str, Any]:
        if self.engine.is_main:
            self.disk.stop.unlink(missing_ok=True)
            logger.info("train %s: stopped after step %d; run the same command again to resume", self.family.name, step)
        self.metrics.close()
        return self._summary(step, stopped=True)

    def _publish(self, step: int) -> dict[str, Any]:
        """Write the product with the averaged weights; return the summary."""
        self._write_average(self.disk.product)
        self.metrics.close()
        if self.engine.is_main:
            self.disk.finish(self._summary(step))
            logger.info("train %s: finished after %d steps: %s", self.family.name, step, self.disk.product)
        self.engine.wait()
        return self._summary(step)

    def _write_average(self, folder: Path) -> None:
        """Publish a product with the averaged weights. Call it on every worker: each holds a shard of them."""
        weights, buffers = self.ema.gather(), self.engine.buffers()
        if self.bare is not None and weights is not None:
            bare = self.bare.eval()
            with torch.no_grad():
                for name, parameter in bare.named_parameters():
                    if name in weights:
                        parameter.copy_(weights[name])
                for name, buffer in bare.named_buffers():
                    buffer.copy_(buffers[name])

            def fill(partial: Path) -> None:
                self.family.save(bare, partial)
                name_family(partial, self.train.model)

            self.disk.publish(folder, fill)
            self.family.to(self.engine.device)  # saving may have moved frozen modules to the CPU

    def _summary(self, step: int, stopped: bool = False) -> dict[str, Any]:
        record = last_record(self.disk.log) or {}
        return {
            "run": self.disk.where,
            "model": self.family.name,
            "steps": step,
            "samples": step * self.train.batch,
            "loss": record.get("loss"),
            "product": None if stopped else f"{self.disk.where}/product",
            "stopped": stopped,
        }


def _split(batch: Batch, parts: int) -> Iterator[Batch]:
    """Split the batch into `parts` equal parts, along the first dimension."""
    pieces = {name: tensor.chunk(parts) for name, tensor in batch.items()}
    for part in range(parts):
        yield {name: chunks[part] for name, chunks in pieces.items()}


def main(arguments: list[str]) -> int:
    """Run one worker under any launcher: `python -m capstan.training.trainer RECIPE [a.b=value ...]`."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    logging.getLogger().handlers[0].setFormatter(PrintableFormatter("%(message)s"))
    try:
        recipe = validate(Recipe, read_recipe(arguments[0], arguments[1:]))
        Run(TrainConfig.from_recipe(recipe)).stop.unlink(missing_ok=True)  # left over from a killed launcher
        summary = fit(recipe)
    except CapstanError as error:
        logger.error("error: %s", error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 130 if summary["stopped"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
