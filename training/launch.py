"""A recipe → training workers, by Ray Train or as local processes

    train(recipe)   engine.launcher: ray      Ray Train's TorchTrainer: one worker per GPU, or engine.workers on CPUs
                    engine.launcher: local    processes on this machine, with the environment that torchrun would set

Workers run training.trainer.fit and keep their state in the run folder. If one dies, all are restarted from the last
checkpoint. The lines of train.log are repeated here while the workers run. Only this module uses Ray Train.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from capstan.pipeline.config import Recipe, Resources
from capstan.pipeline.errors import CapstanError, RecipeError
from capstan.pipeline.storage import Storage
from capstan.training.config import AUTO, TrainConfig
from capstan.training.config.machine import check_machine, placement, too_few
from capstan.training.monitoring.trackers import send_pending
from capstan.training.ready import check_ready
from capstan.training.run import Run
from capstan.training.signals import Interrupts

logger = logging.getLogger("capstan.training.launch")  # not __name__: a local worker runs this module as __main__

_STOPPING = "stopping: waiting for the workers to save a checkpoint (press Ctrl-C again to stop at once)"
_LOOK_EVERY_S = 0.2
_JOIN_S = 600.0  # for nodes to join a cluster that is too small


class _WorkersDied(Exception):
    """Workers ended without an error of their own; a restart may help."""


def train(recipe: Recipe) -> dict[str, Any]:
    """Train the recipe's model, after the runs of `train.before`; return the summary of the last run.

    All of it is checked before the first run starts. A run that is finished is not trained again.
    """
    config = TrainConfig.from_recipe(recipe)
    for section in (*config.before, recipe.train or {}) if config.before else ():
        check_machine(TrainConfig.from_section(section), recipe.resources)
    for number, earlier in enumerate(config.before):
        logger.info("train: run %d of those before %s: %s", number, (recipe.train or {})["run"], earlier["run"])
        train_one(recipe.model_copy(update={"train": earlier}))
    return train_one(recipe)


def train_one(recipe: Recipe) -> dict[str, Any]:
    """Train the recipe's model; return the summary {run, model, steps, samples, loss, product, stopped}.

    A finished run is not trained again. Raises CapstanError, and KeyboardInterrupt if it was stopped: then the same
    call resumes from the checkpoint saved at the stop.
    """
    config = TrainConfig.from_recipe(recipe)
    run = Run(config)
    fresh = not run.started and not _is_in_bucket(recipe, config)
    if fresh:  # before the folder exists: a corrected recipe may still use it
        check_ready(recipe, config)
    run.open(recipe.model_dump(mode="json"))
    if finished := _already_finished(recipe, config, run):
        logger.info("train %s: already finished: %s", finished["model"], finished["product"])
        send_pending(run)
        return finished
    if not fresh:
        check_machine(config, recipe.resources)
    if AUTO in (config.data.latents, config.data.text_states):
        from capstan.training.encode import encode_missing

        encode_missing(recipe)
    launch = _on_ray if config.engine.launcher == "ray" else _on_this_machine
    for attempt in range(config.engine.retries + 1):
        run.stop.unlink(missing_ok=True)
        try:
            summary = launch(recipe, config, run)
            break
        except _WorkersDied as error:
            if attempt == config.engine.retries:
                raise CapstanError(f"training: workers died {attempt + 1} times; last error: {error}") from None
            logger.warning("training: workers died (%s); restarting from the last checkpoint", error)
    if summary["stopped"]:
        raise KeyboardInterrupt
    return summary


def _is_in_bucket(recipe: Recipe, config: TrainConfig) -> bool:
    return config.bucket is not None and Storage(config.bucket, recipe.storage).exists("recipe.json")


def _already_finished(recipe: Recipe, config: TrainConfig, run: Run) -> dict[str, Any] | None:
    """Return the summary of a finished run (after completing its upload), or None if it is not finished."""
    if config.bucket is None:
        return run.finished()
    from capstan.training.upload import Upload

    upload = Upload(run, config.bucket, recipe.storage)
    with run.locked():
        upload.fetch()
        if finished := run.finished():
            upload.finish()
    return finished


# Ray Train -----------------------------------------------------------------------------------------------------------


def _on_ray(recipe: Recipe, config: TrainConfig, run: Run) -> dict[str, Any]:
    from capstan.pipeline.units import start_ray

    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    start_ray(recipe.resources)
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    workers, resources = _workers(config, recipe.resources)
    scaling = ScalingConfig(num_workers=workers, use_gpu="GPU" in resources, resources_per_worker=resources)
    scratch = run.folder / ".ray-train"  # Ray Train's own files; the state of a run is in its checkpoints
    trainer = TorchTrainer(
        _ray_worker,
        train_loop_config={
            "recipe": recipe.model_dump(mode="json"),
            "workers": workers,
            "folder": str(Path.cwd()),
            "path": sys.path,
            "cpus": resources["CPU"],
        },
        torch_config=TorchConfig("nccl" if "GPU" in resources else "gloo"),
        scaling_config=scaling,
        run_config=RunConfig(
            name="train", storage_path=str(scratch.absolute()), failure_config=FailureConfig(max_failures=0)
        ),
    )
    try:
        with _following(run):
            return _wait_for(lambda: _fit_on_ray(trainer), run, _kill_ray)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _ray_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Train as one worker of Ray Train."""
    from capstan.training.trainer import fit

    if Path(config["folder"]).is_dir():  # the recipe's paths are relative to the command's working directory
        os.chdir(config["folder"])
    sys.path += [entry for entry in config["path"] if entry not in sys.path]  # to import a user's own family
    engine = config["recipe"]["train"].setdefault("engine", {})
    engine["workers"] = config["workers"]
    if not engine.get("threads"):  # use no more of a shared node than was requested
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        engine["threads"] = max(1, min(cores, int(config["cpus"])))
    return fit(Recipe.model_validate(config["recipe"]))


def _workers(config: TrainConfig, allowed: Resources) -> tuple[int, dict[str, float]]:
    """Return (workers, resources of each): a GPU each, or a share of the CPUs without GPUs (or if `allowed.gpus` is 0).

    Chooses the largest worker count that fits, among those that `engine.workers` allows and that divide the batch. On
    an external cluster, waits for the smallest count to fit: nodes may be joining, after one was lost or by an
    autoscaler. Raises RecipeError if resources do not suffice.
    """
    import ray

    sizes, started = config.world_sizes(), time.monotonic()
    while True:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = 0 if allowed.gpus == 0 else sum(int(node.get("GPU", 0)) for node in nodes)
        cpus = [int(node.get("CPU", 0)) for node in nodes]
        if config.bucket == config.run and len(cpus) > 1:
            hint = "set train.run to a folder that all nodes share, and train.checkpoint.upload to the bucket"
            raise RecipeError("train.run", f"is a bucket, and the workers on {len(cpus)} nodes share no folder", hint)
        if fitting := placement(sizes, gpus, cpus, config.engine.threads):
            return fitting
        if not os.environ.get("RAY_ADDRESS") or time.monotonic() - started > _JOIN_S:
            raise too_few(sizes, gpus, cpus)
        if time.monotonic() - started < _LOOK_EVERY_S:
            have = f"{sum(cpus)} CPUs, {gpus} GPUs"
            logger.info("waiting for nodes: %d workers requested, the cluster has %s", sizes[-1], have)
        time.sleep(_LOOK_EVERY_S)


def _fit_on_ray(trainer: Any) -> dict[str, Any]:
    """Run the trainer to its end; convert its errors to CapstanError, or to _WorkersDied if a restart may help."""
    from ray.exceptions import RayError
    from ray.train import TrainingFailedError, WorkerGroupError

    try:
        summary: dict[str, Any] = trainer.fit().return_value
        return summary
    except WorkerGroupError as error:
        causes = [getattr(cause, "_base_exc", cause) for _, cause in sorted(error.worker_failures.items())]
        for cause in causes:
            if isinstance(cause, CapstanError):
                raise cause from None
        if all(hasattr(cause, "_traceback_str") for cause in error.worker_failures.values()):
            raise causes[0] from error  # a bug in Capstan or in a family: a restart would not help
        raise _WorkersDied(str(causes[0]).strip().splitlines()[0]) from None
    except (TrainingFailedError, RayError) as error:
        raise _WorkersDied(str(error).strip().splitlines()[0]) from None


def _kill_ray() -> None:
    import ray

    ray.shutdown()


# Plain processes -----------------------------------------------------------------------------------------------------


def _on_this_machine(recipe: Recipe, config: TrainConfig, run: Run) -> dict[str, Any]:
    from capstan.pipeline.ports import free_port

    world = config.world_sizes()[0]
    common = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryDirectory(prefix="capstan-train-") as name:
        folder = Path(name)
        (folder / "recipe.pickle").write_bytes(pickle.dumps((recipe, sys.path)))
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "capstan.training.launch", str(folder), str(rank)],
                env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,  # workers see it close when this process ends, for whatever reason
                start_new_session=True,  # Ctrl-C goes to this process alone, which asks the workers to save
            )
            for rank in range(world)
        ]
        try:
            with _following(run):
                return _wait_for(lambda: _results(processes, folder), run, lambda: _kill(processes))
        finally:
            _kill(processes)


def _results(processes: list[subprocess.Popen[bytes]], folder: Path) -> dict[str, Any]:
    """Wait for all workers, or for the first that fails; return rank 0's result."""
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            time.sleep(1.0)  # time for the others to report an error
            break
        time.sleep(_LOOK_EVERY_S)
    results = [pickle.loads(path.read_bytes()) for path in sorted(folder.glob("result-*.pickle"))]
    errors = [result for result in results if isinstance(result, BaseException)]
    for error in sorted(errors, key=lambda error: not isinstance(error, CapstanError)):
        if isinstance(error, CapstanError) or len(results) == len(processes):
            raise error
    if len(results) < len(processes) or errors:
        raise _WorkersDied(f"exit codes {[process.poll() for process in processes]}")
    summary: dict[str, Any] = results[0]
    return summary


def _kill(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()
    for process in processes:
        process.wait()
        if process.stdin is not None:
            process.stdin.close()


def _local_worker(folder: Path, rank: int) -> int:
    """Train as one local worker: write the summary or the error into `folder`, return the exit code."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    recipe, path = pickle.loads((folder / "recipe.pickle").read_bytes())
    sys.path[:] = path
    from capstan.training.trainer import fit

    result: Any
    try:
        result = fit(recipe)
    except Exception as error:  # the launcher raises it
        if not isinstance(error, CapstanError):
            logger.exception("worker %d", rank)
        result = error
    partial = folder / f"partial-{rank}"
    partial.write_bytes(pickle.dumps(result))
    partial.rename(folder / f"result-{rank:05d}.pickle")
    return int(isinstance(result, Exception))


def _end_with_parent() -> None:
    os.read(0, 1)  # not sys.stdin: its lock would still be held when the interpreter exits
    os._exit(1)


# Waiting -------------------------------------------------------------------------------------------------------------


def _wait_for(work: Callable[[], dict[str, Any]], run: Run, kill: Callable[[], None]) -> dict[str, Any]:
    """Return the result of `work`, which runs in a thread so that Ctrl-C and SIGTERM reach this one.

    The first signal asks the workers to save and stop. There is no timeout: finishing a step and writing a large state
    can take long. A second request kills them; schedulers do the same after their own grace period.
    """
    box: dict[str, Any] = {}
    done = threading.Event()  # not Thread.join: interrupted by a signal it reports the thread as ended (Python 3.11)

    def target() -> None:
        try:
            box["result"] = work()
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
            box["error"] = error
        finally:
            done.set()

    with Interrupts(_STOPPING) as interrupts:
        threading.Thread(target=target, daemon=True, name="train").start()
        try:
            while not done.wait(_LOOK_EVERY_S) and not interrupts.seen:
                pass
            if interrupts.seen:
                run.stop.touch()
            while not done.wait(_LOOK_EVERY_S):
                pass
        finally:
            if not done.is_set():
                kill()
            if interrupts.seen:
                run.stop.unlink(missing_ok=True)  # left over from killed workers; the next start would stop at once
    if interrupts.seen and "error" in box:
        logger.warning("stopped, but not saved (%s); the next start resumes from the last checkpoint", box["error"])
        raise KeyboardInterrupt
    if "error" in box:
        raise box["error"]
    result: dict[str, Any] = box["result"]
    return result


@contextlib.contextmanager
def _following(run: Run) -> Iterator[None]:
    """Log here the lines that the workers add to the run's train.log."""
    done = threading.Event()

    def follow() -> None:
        position = run.train_log.stat().st_size if run.train_log.exists() else 0
        while True:
            ended = done.wait(_LOOK_EVERY_S)
            if run.train_log.exists():
                with run.train_log.open("rb") as file:
                    file.seek(position)
                    new = file.read()
                whole = new[: new.rfind(b"\n") + 1]
                position += len(whole)
                for line in whole.decode("utf-8", "replace").splitlines():
                    _repeat(line)
            if ended:
                return

    thread = threading.Thread(target=follow, daemon=True, name="train-log")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(5)


def _repeat(line: str) -> None:
    """Log a line of train.log (`date time LEVEL message`) at its own level."""
    parts = line.split(" ", 3)
    known = logging.getLevelNamesMapping()
    if len(parts) == 4 and parts[2] in known:
        logger.log(known[parts[2]], "%s", parts[3])
    else:
        logger.info("%s", line)


if __name__ == "__main__":
    sys.exit(_local_worker(Path(sys.argv[1]), int(sys.argv[2])))
