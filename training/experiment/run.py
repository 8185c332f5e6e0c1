"""A recipe → all runs of its experiment, each measured at its points → results and a report. Goes on where it stopped.

    train.run/experiment.json    what the experiment is; another one is refused, but arms and seeds may be added
    train.run/start, arms        the runs (training.experiment.arms), each one an ordinary run
    train.run/measured           what their images score (training.experiment.measure)
    train.run/references.json    what true images score, and those of other prompts
    train.run/captions.json      how true the captions are; train.run/upsampled.json: the expanded prompts
    train.run/prompts.json       how many of the prompts are captions word for word
    train.run/results.json, report.html, figures/

A run is trained to its first point, measured with the averaged weights that it leaves there, and goes on to the next:
`train.steps` may grow between starts. Runs go side by side in threads, each of which waits for its own workers.
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
from capstan.training.data.dataset import find_layer
from capstan.training.experiment import arms, prompts, upsample
from capstan.training.experiment.arms import Trial
from capstan.training.experiment.caption_accuracy import about_prompts, shown_captions, truth_of_captions
from capstan.training.experiment.config import ExperimentConfig
from capstan.training.experiment.measure import Clock, Kept, measure, open_scorer, references, with_upsampled
from capstan.training.launch import train
from capstan.training.run import Run

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.5


def run_blend(recipe: Recipe) -> dict[str, Any]:
    """Train and measure what is not yet done, and write the report; gives the summary.

    Raises CapstanError, and KeyboardInterrupt when it was stopped on the way: then the same call goes on.
    """
    experiment = Experiment(recipe)
    experiment.begin()
    experiment.judges()  # all that measuring needs is looked at before anything is trained
    with _in_few_words():
        for seed in experiment.config.seeds:
            experiment.start(seed)
        if experiment.train.engine.launcher == "ray":
            from capstan.pipeline.units import start_ray

            start_ray(recipe.resources)  # here, in the main thread, and once for all
        todo = [trial for trial in arms.trials(experiment.config) if not experiment.finished(trial)]
        experiment.expect(todo)
        _side_by_side(todo, experiment)
    return experiment.report()


@contextlib.contextmanager
def _in_few_words() -> Iterator[None]:
    """Each run tells of its steps in its own train.log; here several would talk at once."""
    talk = logging.getLogger("capstan.training.launch")
    before = talk.level
    talk.setLevel(logging.WARNING)
    try:
        yield
    finally:
        talk.setLevel(before)


class Experiment:
    """The experiment that a recipe asks for, and its folder."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.config = recipe, ExperimentConfig.from_recipe(recipe)
        self.train = TrainConfig.from_recipe(recipe)
        self.folder, self.points = self.train.folder, self.config.points(self.train)
        self.storage = Storage(str(self.folder), field="train.run")
        self.kept, self.stopping = Kept(self.storage), threading.Event()
        self._measuring = threading.Lock()  # one at a time: it has the threads that the trainers leave
        self._judges: tuple[prompts.Prompts, Any] | None = None
        self.parallel = how_many(self.config, self.train, *_machine(recipe, self.train))

    # Before the runs -------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Make the folder, or check that it holds this experiment. Raises RecipeError."""
        if self.train.data.layer is None:
            self.layer = None
        elif self.storage.exists("experiment.json"):  # "latest" must not move under an experiment
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

    def judges(self) -> tuple[prompts.Prompts, Any]:
        """The sets of prompts, the expanded one included, and the scorer. Raises RecipeError."""
        if self._judges is None:
            sets = prompts.prompt_sets(self.recipe, self.config, self.train, self.layer)
            clip = open_scorer(self.config.scorer)
            first = next(iter(sets.values()))
            if clip is None and first[0].wanted is None:
                problem = "is null, and only images of the captioned world can be measured without"
                raise RecipeError("experiment.scorer", problem, "name a CLIP, e.g. scorer: {model: ./clip}")
            sets = self._expanded(sets)
            if not self.storage.exists("references.json"):
                self.storage.write("references.json", json.dumps(references(sets, clip)).encode())
            if not self.storage.exists("captions.json"):
                true = truth_of_captions(self.recipe, self.layer)
                self.storage.write("captions.json", json.dumps(true, indent=1).encode())
            if not self.storage.exists("prompts.json"):
                held = self.train.data.holdout
                shown = (shown_captions(self.recipe, layer, held) for layer in set(self.layers.values()))
                told = about_prompts(sets, itertools.chain.from_iterable(shown))
                self.storage.write("prompts.json", json.dumps(told, indent=1).encode())
            self._judges = sets, clip
        return self._judges

    def _expanded(self, sets: prompts.Prompts) -> prompts.Prompts:
        """The sets, and the first one with its prompts expanded, where the recipe says by what; written down once."""
        if self.config.upsampler is None:
            return sets
        name, asked = "upsampled.json", [prompt.text for prompt in sets[prompts.SETS[0]]]
        if not self.storage.exists(name):
            texts = upsample.expanded(self.recipe, self.config, self.layer, asked, self.train.data.holdout)
            self.storage.write(name, json.dumps(texts, indent=1).encode())
        return with_upsampled(sets, prompts.UPSAMPLED, prompts.SETS[0], json.loads(self.storage.read(name)))

    def start(self, seed: int) -> None:
        """Train the run of one step from which the arms of a seed begin, unless the recipe says where they do."""
        if self.train.init is None:
            layer, slots = self.layer or next((known for known in self.layers.values() if known), None), [ORIGINAL]
            if layer is not None:
                slots += layer_recipe(Storage(self.recipe.dataset, self.recipe.storage), layer)["slots"]
            train(arms.start_recipe(self.recipe, slots, layer, self.folder, seed))

    def expect(self, todo: Sequence[Trial]) -> None:
        """Say what is still to be done."""
        left = [(trial, point) for trial in todo for point in self.points if self.kept.read(trial.name, point) is None]
        self._expected, self._done, self._since = len(left), 0, time.monotonic()
        logger.info(
            "experiment: %d runs to go, %d at a time, measured %d times", len(todo), self.parallel, self._expected
        )

    # One run ---------------------------------------------------------------------------------------------------------

    def recipe_of(self, trial: Trial, steps: int) -> Recipe:
        arm = self.config.arms[trial.arm]
        return arms.arm_recipe(self.recipe, arm, self.layers[trial.arm], self.folder, trial, steps)

    def finished(self, trial: Trial) -> bool:
        """Whether the run has been measured at its last point."""
        return self.kept.read(trial.name, self.points[-1]) is not None

    def run(self, trial: Trial) -> None:
        """Train to each point and measure there. Raises KeyboardInterrupt when told to stop."""
        whole = self.recipe_of(trial, self.points[-1]).model_dump(mode="json")
        text = yaml.safe_dump(whole, sort_keys=False, allow_unicode=True)
        Storage(str(arms.trial_folder(self.folder, trial))).write("recipe.yaml", text.encode())
        for point in self.points:
            if self.kept.read(trial.name, point) is not None:
                continue
            if self.stopping.is_set():
                raise KeyboardInterrupt
            trained = train(self.recipe_of(trial, point))
            if trained["steps"] != point:
                problem = f"experiment: {trial.name} has gone past step {point} without being measured there"
                raise CapstanError(f"{problem}; remove {arms.trial_folder(self.folder, trial)} to train it again")
            with self._measuring:
                self._measure(trial, point)

    def _measure(self, trial: Trial, point: int) -> None:
        import torch

        from capstan.training.sample import open_sampler

        sets, clip = self.judges()
        last = point == self.points[-1]
        if not last:  # what expanding does is asked of finished models only
            sets = {name: sets[name] for name in prompts.SETS}
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // self.parallel))
        with Clock() as clock:
            sampler = open_sampler(arms.trial_folder(self.folder, trial))
            values, images = measure(sampler, sets, clip)
        drawn = sum(len(asked) for asked in sets.values())
        facts = {"step": point, "seconds": clock.seconds, "pictures": drawn, "values": values}
        self.kept.write(trial.name, point, facts, images if last else {})
        self._done += 1
        minutes = (time.monotonic() - self._since) / 60 * (self._expected / self._done - 1)
        logger.info(
            "experiment: %s measured at step %d (%d images, %.0f s); %d of %d measurements, about %.0f min to go",
            *(trial.name, point, drawn, clock.seconds, self._done, self._expected, minutes),
        )

    def ask_to_stop(self, running: Sequence[Trial]) -> None:
        """Let runs save a checkpoint and end."""
        self.stopping.set()
        for trial in running:
            folder = arms.trial_folder(self.folder, trial)
            if (folder / "recipe.json").exists():
                Run(TrainConfig.from_recipe(self.recipe_of(trial, self.points[-1]))).stop.touch()

    # After them ------------------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """Write results.json, the figures and report.html of what has been measured so far; gives the summary."""
        from capstan.training.experiment.report import write_report
        from capstan.training.experiment.results import gather

        results = gather(self.storage, self.config, self.train, self.layers)
        path = write_report(self.storage, results, self.kept, self.judges()[0])
        return {
            "run": str(self.folder),
            "runs": {arm: len(seeds) for arm, seeds in results.seeds.items()},
            "found": results.found,
            "report": path,
        }

    def _identity(self) -> dict[str, Any]:
        """What may not change between a stop and its going on."""
        fixed = self.train.identity()
        for name in ("seed", "init"):
            fixed.pop(name)
        fixed["data"] = {k: v for k, v in fixed["data"].items() if k not in ("blend", "layer")}
        chosen = self.config.model_dump(mode="json", include={"prompts", "scorer", "upsampler"})
        own = {name: {"layer": self.layers[name], "blend": arm.shares} for name, arm in self.config.arms.items()}
        given = {"dataset": self._images(), "source": prompts.source_of(self.recipe), "init": self.train.init}
        whole = {"train": fixed, **given, "steps": self.points, **chosen, "arms": own}
        made: dict[str, Any] = json.loads(json.dumps(whole))
        return made

    def _images(self) -> str:
        """A digest of the shards: arms that are added later must see the same images."""
        dataset = Dataset(Storage(self.recipe.dataset, self.recipe.storage))
        return fingerprint([shard.sha256 for shard in dataset.manifest.shards])


def _any_blend(train: TrainConfig) -> Any:
    """`train.data` with a blend that any layer has: the arms' own are looked at one by one."""
    return train.data.model_copy(update={"blend": {"original": 1.0}})


def _refuse_another(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    names = sorted((before.keys() | now.keys()) - {"arms"})
    changed = [name for name in names if before.get(name) != now.get(name)]
    known = before["arms"].keys() & now["arms"].keys()
    changed += [f"arms.{name}" for name in sorted(known) if before["arms"][name] != now["arms"][name]]
    if changed:
        problem = f"{folder} holds another experiment (other: {', '.join(changed)})"
        raise RecipeError("train.run", problem, "name another folder, or remove this one")


# Side by side --------------------------------------------------------------------------------------------------------


def _machine(recipe: Recipe, train: TrainConfig) -> tuple[int, int]:
    """(cores, GPUs) that trainers may take: of the cluster that they run on, or of this machine."""
    import torch

    allowed = recipe.resources
    if train.engine.launcher == "ray" and os.environ.get("RAY_ADDRESS"):
        import ray

        from capstan.pipeline.units import start_ray

        start_ray(allowed)
        there = ray.cluster_resources()
        cores, gpus = int(there.get("CPU", 1)), int(there.get("GPU", 0))
    else:
        cores, gpus = len(os.sched_getaffinity(0)), torch.cuda.device_count()
    return min(cores, allowed.cpus or cores), gpus if allowed.gpus is None else min(gpus, allowed.gpus)


def how_many(config: ExperimentConfig, train: TrainConfig, cores: int, gpus: int) -> int:
    """How many runs are trained at once: as the recipe says, or as many as there are GPUs or cores for.

    A run takes `engine.workers` GPUs, or on CPUs as many cores times `engine.threads`; without threads it takes all.
    Raises RecipeError where plain processes would share one GPU.
    """
    engine = train.engine
    if gpus and engine.launcher == "local":
        if (config.parallel or 1) > 1:
            problem = f"{config.parallel} runs of plain processes would all take the same GPU"
            raise RecipeError("experiment.parallel", problem, "write train.engine.launcher: ray, or parallel: 1")
        return 1
    if config.parallel is not None:
        return config.parallel
    if gpus:
        return max(1, gpus // engine.most)
    return max(1, cores // (engine.most * engine.threads)) if engine.threads else 1


def _side_by_side(todo: Sequence[Trial], experiment: Experiment) -> None:
    """Run all trials, so many at a time. The first that fails stops the others; Ctrl-C lets them save and stops.

    Whenever one has ended, and at a stop, the report is written anew.
    """
    running: set[Trial] = set()

    def one(trial: Trial) -> None:
        if experiment.stopping.is_set():
            return
        running.add(trial)
        try:
            experiment.run(trial)
        except BaseException:
            experiment.stopping.set()  # before this thread takes the next
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
            _until_all_end(futures, lambda: experiment.ask_to_stop(sorted(running, key=str)))
            experiment.report()
            raise


def _until_all_end(futures: Sequence[Future[None]], ask: Callable[[], None]) -> None:
    """Ask again and again: a run that was just starting has overlooked the first time."""
    for future in futures:
        future.cancel()
    while not all(future.done() for future in futures):
        ask()
        time.sleep(_LOOK_EVERY_S)
