"""A recipe → all runs of its experiment → measurements, results, report; resumable.

    train.run/experiment.json    identity: a different experiment is refused, but arms and seeds may be added
    train.run/start, arms        the runs (experiment.arms), each an ordinary run
    train.run/measured           scores of their images (experiment.measure)
    train.run/references.json    scores of true images and of images of other prompts
    train.run/captions.json      accuracy of the captions
    train.run/upsampled.json     the expanded prompts
    train.run/prompts.json       statistics of the prompts
    train.run/results.json, report.html, figures/

A run is trained to its first point, measured there with its averaged weights, then resumed up to the next point:
`train.steps` may grow between starts. Runs are trained at the same time in threads, each waiting for its own workers.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import yaml

from capstan.pipeline.config import Recipe, fingerprint
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import CapstanError, RecipeError
from capstan.pipeline.storage import Storage
from capstan.recaption.store import layer_recipe
from capstan.training.config import ORIGINAL, TrainConfig
from capstan.training.data.sources import find_layer
from capstan.training.experiment import arms, prompts, upsample
from capstan.training.experiment.arms import Trial
from capstan.training.experiment.caption_accuracy import caption_accuracy, prompt_statistics, shown_captions
from capstan.training.experiment.config import ExperimentConfig
from capstan.training.experiment.measure import Clock, Measurements, measure, open_scorer, references, with_upsampled
from capstan.training.launch import train
from capstan.training.run import Run

logger = logging.getLogger(__name__)

_POLL_S = 0.5


def run_blend(recipe: Recipe) -> dict[str, Any]:
    """Train and measure what is not done yet, write the report, and return the summary.

    Raises CapstanError, and KeyboardInterrupt if it was stopped; the same call then resumes.
    """
    experiment = Experiment(recipe)
    experiment.prepare_folder()
    experiment.prompts_and_scorer()  # checks everything that measuring needs before anything is trained
    with _quiet_trainer():
        for seed in experiment.config.seeds:
            experiment.start(seed)
        if experiment.train.engine.launcher == "ray":
            from capstan.pipeline.units import start_ray

            start_ray(recipe.resources)  # in the main thread, once for all runs
        todo = [trial for trial in arms.trials(experiment.config) if not experiment.finished(trial)]
        experiment.announce(todo)
        _side_by_side(todo, experiment)
    return experiment.report()


@contextlib.contextmanager
def _quiet_trainer() -> Iterator[None]:
    """Silence the trainers' step lines, which would be mixed; each run has them in its own train.log."""
    trainer = logging.getLogger("capstan.training.launch")
    before = trainer.level
    trainer.setLevel(logging.WARNING)
    try:
        yield
    finally:
        trainer.setLevel(before)


class Experiment:
    """The experiment of a recipe, and its folder."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.config = recipe, ExperimentConfig.from_recipe(recipe)
        self.train = TrainConfig.from_recipe(recipe)
        self.folder, self.points = self.train.folder, self.config.points(self.train)
        self.storage = Storage(str(self.folder), field="train.run")
        self.measurements, self.stopping = Measurements(self.storage), threading.Event()
        self._measuring = threading.Lock()  # one measurement at a time: it uses the threads that the trainers leave
        self._prompts_and_scorer: tuple[prompts.Prompts, Any] | None = None
        self.parallel = runs_at_once(self.config, self.train, *_machine(recipe, self.train))

    # Before the runs -------------------------------------------------------------------------------------------------

    def prepare_folder(self) -> None:
        """Create the folder, or check that it holds this experiment. Raises RecipeError."""
        if self.train.data.layer is None:
            self.layer = None
        elif self.storage.exists("experiment.json"):  # "latest" must stay the same layer during an experiment
            self.layer = json.loads(self.storage.read("experiment.json"))["layer"]
        else:
            self.layer = find_layer(Storage(self.recipe.dataset, self.recipe.storage), _any_blend(self.train))
        self.layers = arms.layers(self.recipe, self.config, self.train, self.layer)
        identity = self._identity()
        if self.storage.exists("experiment.json"):
            before = json.loads(self.storage.read("experiment.json"))["identity"]
            _refuse_another(before, identity, self.folder)
            identity["arms"] = before["arms"] | identity["arms"]
        else:
            self.storage.check_writable()
        content = {"identity": identity, "layer": self.layer, "recipe": self.recipe.model_dump(mode="json")}
        self.storage.write("experiment.json", json.dumps(content, indent=1).encode())

    def prompts_and_scorer(self) -> tuple[prompts.Prompts, Any]:
        """Return the sets of prompts, including the expanded one, and the scorer. Raises RecipeError."""
        if self._prompts_and_scorer is None:
            sets = prompts.prompt_sets(self.recipe, self.config, self.train, self.layer)
            clip = open_scorer(self.config.scorer)
            first = next(iter(sets.values()))
            if clip is None and first[0].wanted is None:
                problem = "is null, but only images of the captioned world can be measured without a CLIP"
                raise RecipeError("experiment.scorer", problem, "set a CLIP, e.g. scorer: {model: ./clip}")
            sets = self._expanded(sets)
            if not self.storage.exists("references.json"):
                self.storage.write("references.json", json.dumps(references(sets, clip)).encode())
            if not self.storage.exists("captions.json"):
                accuracy = caption_accuracy(self.recipe, self.layer)
                self.storage.write("captions.json", json.dumps(accuracy, indent=1).encode())
            if not self.storage.exists("prompts.json"):
                holdout = self.train.data.holdout
                shown = (shown_captions(self.recipe, layer, holdout) for layer in set(self.layers.values()))
                statistics = prompt_statistics(sets, itertools.chain.from_iterable(shown))
                self.storage.write("prompts.json", json.dumps(statistics, indent=1).encode())
            self._prompts_and_scorer = sets, clip
        return self._prompts_and_scorer

    def _expanded(self, sets: prompts.Prompts) -> prompts.Prompts:
        """Return the sets, plus the first one with expanded prompts if there is an upsampler; expands only once."""
        if self.config.upsampler is None:
            return sets
        name, texts = "upsampled.json", [prompt.text for prompt in sets[prompts.SETS[0]]]
        if not self.storage.exists(name):
            expanded = upsample.expanded(self.recipe, self.config, self.layer, texts, self.train.data.holdout)
            self.storage.write(name, json.dumps(expanded, indent=1).encode())
        return with_upsampled(sets, prompts.UPSAMPLED, prompts.SETS[0], json.loads(self.storage.read(name)))

    def start(self, seed: int) -> None:
        """Train the one-step run from which all arms of a seed start, unless the recipe sets train.init."""
        if self.train.init is None:
            layer, slots = self.layer or next((known for known in self.layers.values() if known), None), [ORIGINAL]
            if layer is not None:
                slots += layer_recipe(Storage(self.recipe.dataset, self.recipe.storage), layer)["slots"]
            train(arms.start_recipe(self.recipe, slots, layer, self.folder, seed))

    def announce(self, todo: Sequence[Trial]) -> None:
        """Log what is left to do."""
        left = [
            (trial, point)
            for trial in todo
            for point in self.points
            if self.measurements.read(trial.name, point) is None
        ]
        self._expected, self._done, self._since = len(left), 0, time.monotonic()
        logger.info(
            "experiment: %d runs left, %d at a time; %d measurements left", len(todo), self.parallel, self._expected
        )

    # One run ---------------------------------------------------------------------------------------------------------

    def recipe_of(self, trial: Trial, steps: int) -> Recipe:
        arm = self.config.arms[trial.arm]
        return arms.arm_recipe(self.recipe, arm, self.layers[trial.arm], self.folder, trial, steps)

    def finished(self, trial: Trial) -> bool:
        """Return whether the run has been measured at its last point."""
        return self.measurements.read(trial.name, self.points[-1]) is not None

    def run(self, trial: Trial) -> None:
        """Train to each point and measure there. Raises KeyboardInterrupt if a stop is requested."""
        whole = self.recipe_of(trial, self.points[-1]).model_dump(mode="json")
        text = yaml.safe_dump(whole, sort_keys=False, allow_unicode=True)
        Storage(str(arms.trial_folder(self.folder, trial))).write("recipe.yaml", text.encode())
        for point in self.points:
            if self.measurements.read(trial.name, point) is not None:
                continue
            if self.stopping.is_set():
                raise KeyboardInterrupt
            trained = train(self.recipe_of(trial, point))
            if trained["steps"] != point:
                problem = f"experiment: {trial.name} is past step {point} but was not measured there"
                raise CapstanError(f"{problem}. Fix: remove {arms.trial_folder(self.folder, trial)} to train it again")
            with self._measuring:
                self._measure(trial, point)

    def _measure(self, trial: Trial, point: int) -> None:
        import torch

        from capstan.training.sample import open_sampler

        sets, clip = self.prompts_and_scorer()
        last = point == self.points[-1]
        if not last:  # expanded prompts are measured only at the end
            sets = {name: sets[name] for name in prompts.SETS}
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // self.parallel))
        with Clock() as clock:
            sampler = open_sampler(arms.trial_folder(self.folder, trial))
            values, images = measure(sampler, sets, clip)
        drawn = sum(len(of_set) for of_set in sets.values())
        facts = {"step": point, "seconds": clock.seconds, "pictures": drawn, "values": values}
        self.measurements.write(trial.name, point, facts, images if last else {})
        self._done += 1
        minutes = (time.monotonic() - self._since) / 60 * (self._expected / self._done - 1)
        logger.info(
            "experiment: %s measured at step %d (%d images, %.0f s); %d of %d measurements, about %.0f min left",
            *(trial.name, point, drawn, clock.seconds, self._done, self._expected, minutes),
        )

    def request_stop(self, running: Sequence[Trial]) -> None:
        """Ask runs to save a checkpoint and end."""
        self.stopping.set()
        for trial in running:
            folder = arms.trial_folder(self.folder, trial)
            if (folder / "recipe.json").exists():
                Run(TrainConfig.from_recipe(self.recipe_of(trial, self.points[-1]))).stop.touch()

    # After them ------------------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """Write results.json, figures and report.html of the measurements so far; return the summary."""
        from capstan.training.experiment.report import write_report
        from capstan.training.experiment.results import gather

        results = gather(self.storage, self.config, self.train, self.layers)
        path = write_report(self.storage, results, self.measurements, self.prompts_and_scorer()[0])
        return {
            "run": str(self.folder),
            "runs": {arm: len(seeds) for arm, seeds in results.seeds.items()},
            "found": results.found,
            "report": path,
        }

    def _identity(self) -> dict[str, Any]:
        """Return the settings that must not change between a stop and a resume."""
        fixed = self.train.identity()
        for name in ("seed", "init"):
            fixed.pop(name)
        fixed["data"] = {k: v for k, v in fixed["data"].items() if k not in ("blend", "layer")}
        chosen = self.config.model_dump(mode="json", include={"prompts", "scorer", "upsampler"})
        own = {name: {"layer": self.layers[name], "blend": arm.shares} for name, arm in self.config.arms.items()}
        given = {"dataset": self._images(), "source": prompts.source_of(self.recipe), "init": self.train.init}
        whole = {"train": fixed, **given, "steps": self.points, **chosen, "arms": own}
        plain: dict[str, Any] = json.loads(json.dumps(whole))
        return plain

    def _images(self) -> str:
        """Return a digest of the shards: arms added later must see the same images."""
        dataset = Dataset(Storage(self.recipe.dataset, self.recipe.storage))
        return fingerprint([shard.sha256 for shard in dataset.manifest.shards])


def _any_blend(train: TrainConfig) -> Any:
    """Return `train.data` with a blend that every layer has; the arms' own blends are checked one by one."""
    return train.data.model_copy(update={"blend": {"original": 1.0}})


def _refuse_another(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    names = sorted((before.keys() | now.keys()) - {"arms"})
    changed = [name for name in names if before.get(name) != now.get(name)]
    known = before["arms"].keys() & now["arms"].keys()
    changed += [f"arms.{name}" for name in sorted(known) if before["arms"][name] != now["arms"][name]]
    if changed:
        problem = f"{folder} holds a different experiment (changed: {', '.join(changed)})"
        raise RecipeError("train.run", problem, "set another folder, or remove this one")


# Side by side --------------------------------------------------------------------------------------------------------


def _machine(recipe: Recipe, train: TrainConfig) -> tuple[int, int]:
    """Return the (cores, GPUs) that trainers may use, on the cluster or on this machine."""
    import torch

    allowed = recipe.resources
    if train.engine.launcher == "ray" and os.environ.get("RAY_ADDRESS"):
        import ray

        from capstan.pipeline.units import start_ray

        start_ray(allowed)
        available = ray.cluster_resources()
        cores, gpus = int(available.get("CPU", 1)), int(available.get("GPU", 0))
    else:
        cores, gpus = len(os.sched_getaffinity(0)), torch.cuda.device_count()
    return min(cores, allowed.cpus or cores), gpus if allowed.gpus is None else min(gpus, allowed.gpus)


def runs_at_once(config: ExperimentConfig, train: TrainConfig, cores: int, gpus: int) -> int:
    """Return the number of runs trained at once: `experiment.parallel`, or as many as GPUs or cores allow.

    A run uses `engine.workers` GPUs, or on CPUs `engine.workers` × `engine.threads` cores; without threads, all cores.
    Raises RecipeError if plain processes would share one GPU.
    """
    engine = train.engine
    if gpus and engine.launcher == "local":
        if (config.parallel or 1) > 1:
            problem = f"{config.parallel} runs as plain processes would all use the same GPU"
            raise RecipeError("experiment.parallel", problem, "set train.engine.launcher: ray, or parallel: 1")
        return 1
    if config.parallel is not None:
        return config.parallel
    if gpus:
        return max(1, gpus // engine.most)
    return max(1, cores // (engine.most * engine.threads)) if engine.threads else 1


def _side_by_side(todo: Sequence[Trial], experiment: Experiment) -> None:
    """Run all trials, `experiment.parallel` at a time. The first failure stops the others; Ctrl-C lets them save first.

    The report is rewritten after every run, and at a stop.
    """
    running: set[Trial] = set()

    def one(trial: Trial) -> None:
        if experiment.stopping.is_set():
            return
        running.add(trial)
        try:
            experiment.run(trial)
        except BaseException:
            experiment.stopping.set()  # before this thread takes the next trial
            raise
        finally:
            running.discard(trial)

    with ThreadPoolExecutor(experiment.parallel, thread_name_prefix="arm") as pool:
        futures = [pool.submit(one, trial) for trial in todo]
        try:
            for done in as_completed(futures):
                done.result()
                if any(not future.done() for future in futures):
                    experiment.report()
        except BaseException:
            _stop_and_wait(futures, lambda: experiment.request_stop(sorted(running, key=str)))
            experiment.report()
            raise


def _stop_and_wait(futures: Sequence[Future[None]], ask: Callable[[], None]) -> None:
    """Request a stop repeatedly, since a run that is just starting misses the first request, until all have ended."""
    for future in futures:
        future.cancel()
    while not all(future.done() for future in futures):
        ask()
        time.sleep(_POLL_S)
