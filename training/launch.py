"""A recipe → its workers: the one door to Ray Train, and plain processes for those without Ray.

    train(recipe)   engine.launcher: ray      Ray Train's TorchTrainer, one worker a GPU, or so many on the CPU
                    engine.launcher: local    processes of this machine, with the environment that torchrun would set

Either way the workers run training.trainer.fit, keep their state in the run folder, and are started again after one has
died, from the last checkpoint. What they write into the run's train.log is repeated here while they work.
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
from capstan.training.config import AUTO, TrainConfig
from capstan.training.run import Run
from capstan.training.signals import Interrupts

logger = logging.getLogger("capstan.training.launch")  # by name: a local worker runs this module as __main__

_STOPPING = "stopping: the workers save a checkpoint (once more to stop at once)"
_LOOK_EVERY_S = 0.2
_JOIN_S = 600.0  # for nodes to join a cluster that has too few


class _WorkersDied(Exception):
    """Workers ended without saying why; starting them again may help."""


def train(recipe: Recipe) -> dict[str, Any]:
    """Train what the recipe says; gives the summary {run, model, steps, samples, loss, product, stopped}.

    A finished run is not trained again. Raises CapstanError, and KeyboardInterrupt when it was stopped on the way: then
    the same call goes on from the checkpoint made at the stop.
    """
    config = TrainConfig.from_recipe(recipe)
    run = Run(config)
    run.begin(recipe.model_dump(mode="json"))
    if finished := _already_finished(recipe, config, run):
        logger.info("train %s: already finished: %s", finished["model"], finished["product"])
        return finished
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
                raise CapstanError(f"training: workers died {attempt + 1} times, at last: {error}") from None
            logger.warning("training: workers died (%s); going on from the last checkpoint", error)
    if summary["stopped"]:
        raise KeyboardInterrupt
    return summary


def _already_finished(recipe: Recipe, config: TrainConfig, run: Run) -> dict[str, Any] | None:
    """The summary of a run that is done, here or in its bucket, which then has all of it; else None."""
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
    scratch = run.folder / ".ray-train"  # Ray Train's own notes; the state of a run is in its checkpoints
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
    """Runs in each worker of Ray Train."""
    from capstan.training.trainer import fit

    if Path(config["folder"]).is_dir():  # paths in the recipe are relative to where the command was given
        os.chdir(config["folder"])
    sys.path += [entry for entry in config["path"] if entry not in sys.path]  # where a family of the user's may lie
    engine = config["recipe"]["train"].setdefault("engine", {})
    engine["workers"] = config["workers"]
    if not engine.get("threads"):  # no more of a node that is shared than was asked for
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        engine["threads"] = max(1, min(cores, int(config["cpus"])))
    return fit(Recipe.model_validate(config["recipe"]))


def _workers(config: TrainConfig, allowed: Resources) -> tuple[int, dict[str, float]]:
    """(workers, what each takes): a GPU, or where the cluster has none (or `allowed.gpus` is 0) its share of the CPUs.

    Of the numbers that `engine.workers` allows and the batch can be dealt among, the largest that there is room for.
    On a cluster that others started it waits until the least of them fit: for nodes that may be on their way, after one
    was lost, or while an autoscaler makes them. Raises RecipeError where there is not enough.
    """
    import ray

    sizes, started = config.world_sizes(), time.monotonic()
    while True:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = 0 if allowed.gpus == 0 else sum(int(node.get("GPU", 0)) for node in nodes)
        cpus = [int(node.get("CPU", 0)) for node in nodes]
        if config.bucket == config.run and len(cpus) > 1:
            hint = "name a folder that all nodes share, and the bucket as train.checkpoint.upload"
            raise RecipeError("train.run", f"a bucket, and workers on {len(cpus)} nodes have no folder in common", hint)
        if found := _largest(sizes, gpus, cpus, config.engine.threads):
            return found
        if not os.environ.get("RAY_ADDRESS") or time.monotonic() - started > _JOIN_S:
            have = f"{gpus} GPUs" if gpus else f"{sum(cpus)} CPUs"
            hint = f"set engine.workers to at most {gpus or sum(cpus)}, or resources.cpus to {sizes[-1]}"
            raise RecipeError("train.engine.workers", f"{sizes[-1]} workers, but Ray has {have}", hint)
        if time.monotonic() - started < _LOOK_EVERY_S:
            have = f"{sum(cpus)} CPUs, {gpus} GPUs"
            logger.info("waiting for nodes: %d workers, and the cluster has %s", sizes[-1], have)
        time.sleep(_LOOK_EVERY_S)


def _largest(sizes: list[int], gpus: int, cpus: list[int], threads: int | None) -> tuple[int, dict[str, float]] | None:
    """The first of `sizes` for which there is room on nodes of these CPUs, with what each worker takes.

    >>> _largest([4, 2], 3, [16], None), _largest([4, 2, 1], 0, [2], None), _largest([4], 0, [2], None)
    ((2, {'CPU': 1, 'GPU': 1}), (2, {'CPU': 1}), None)
    """
    for workers in sizes:
        if gpus >= workers:
            return workers, {"CPU": 1, "GPU": 1}
        if not gpus and (share := _share(cpus, workers, threads)):
            return workers, {"CPU": share}
    return None


def _share(cpus: list[int], workers: int, threads: int | None) -> int:
    """CPUs for each worker, as many as fit on nodes of these many, or `threads`; 0 where they do not fit.

    >>> _share([2], 2, None), _share([4, 2], 2, None), _share([1, 0], 2, None), _share([8, 8], 2, 3)
    (1, 2, 0, 3)
    """
    wanted = [threads] if threads else range(sum(cpus) // workers, 0, -1)
    return next((share for share in wanted if sum(cpu // share for cpu in cpus) >= workers), 0)


def _fit_on_ray(trainer: Any) -> dict[str, Any]:
    """Run the trainer to its end, with errors as Capstan knows them."""
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
            raise causes[0] from error  # a defect of ours or of a family's: trying again would not mend it
        raise _WorkersDied(str(causes[0]).strip().splitlines()[0]) from None
    except (TrainingFailedError, RayError) as error:
        raise _WorkersDied(str(error).strip().splitlines()[0]) from None


def _kill_ray() -> None:
    import ray

    ray.shutdown()


# Plain processes -----------------------------------------------------------------------------------------------------


def _on_this_machine(recipe: Recipe, config: TrainConfig, run: Run) -> dict[str, Any]:
    from capstan.training.distributed.engine import free_port

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
                stdin=subprocess.PIPE,  # when this process ends, however it does, the workers read the end of it
                start_new_session=True,  # Ctrl-C is for this process, which asks the workers to save
            )
            for rank in range(world)
        ]
        try:
            with _following(run):
                return _wait_for(lambda: _results(processes, folder), run, lambda: _kill(processes))
        finally:
            _kill(processes)


def _results(processes: list[subprocess.Popen[bytes]], folder: Path) -> dict[str, Any]:
    """Wait for all workers, or for the first that fails; gives what rank 0 returned."""
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            time.sleep(1.0)  # the others may yet say why
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
    """Runs in each local worker: leaves the summary or the error in `folder`."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    recipe, path = pickle.loads((folder / "recipe.pickle").read_bytes())
    sys.path[:] = path
    from capstan.training.trainer import fit

    result: Any
    try:
        result = fit(recipe)
    except Exception as error:  # handed to the launcher, which raises it
        if not isinstance(error, CapstanError):
            logger.exception("worker %d", rank)
        result = error
    partial = folder / f"partial-{rank}"
    partial.write_bytes(pickle.dumps(result))
    partial.rename(folder / f"result-{rank:05d}.pickle")
    return int(isinstance(result, Exception))


def _end_with_parent() -> None:
    os.read(0, 1)  # not by sys.stdin, whose lock would be held when the interpreter ends
    os._exit(1)


# Waiting -------------------------------------------------------------------------------------------------------------


def _wait_for(work: Callable[[], dict[str, Any]], run: Run, kill: Callable[[], None]) -> dict[str, Any]:
    """The result of `work`, which runs in a thread, so that Ctrl-C and SIGTERM reach this one.

    The first asks the workers to save and stop, which takes as long as it takes: a step and a large state written to
    disk, or to a bucket. Asking again kills them, and so does every scheduler once its own patience ends.
    """
    box: dict[str, Any] = {}
    done = threading.Event()  # Thread.join takes a thread for ended when a signal interrupts it (Python 3.11)

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
                run.stop.unlink(missing_ok=True)  # which killed workers leave, and a next start would obey
    if interrupts.seen and "error" in box:
        logger.warning("stopped, but not saved (%s); the run goes on from its last checkpoint", box["error"])
        raise KeyboardInterrupt
    if "error" in box:
        raise box["error"]
    result: dict[str, Any] = box["result"]
    return result


@contextlib.contextmanager
def _following(run: Run) -> Iterator[None]:
    """Repeat here what the workers add to the run's train.log."""
    done = threading.Event()

    def follow() -> None:
        place = run.words.stat().st_size if run.words.exists() else 0
        while True:
            ended = done.wait(_LOOK_EVERY_S)
            if run.words.exists():
                with run.words.open("rb") as file:
                    file.seek(place)
                    new = file.read()
                whole = new[: new.rfind(b"\n") + 1]
                place += len(whole)
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
    """Log a line of train.log (`date time LEVEL message`) as if it were said here."""
    parts = line.split(" ", 3)
    known = logging.getLevelNamesMapping()
    if len(parts) == 4 and parts[2] in known:
        logger.log(known[parts[2]], "%s", parts[3])
    else:
        logger.info("%s", line)


if __name__ == "__main__":
    sys.exit(_local_worker(Path(sys.argv[1]), int(sys.argv[2])))
