"""The run folder: files of a training run, locking, resuming

recipe.json     the run's recipe, and its number of lanes; a start with another recipe is refused
assets/         computed from the dataset once: a tokenizer, latent statistics
log.jsonl       one JSON object per logged step; tensorboard/ has the same as curves, train.log the messages
evaluations.jsonl, samples/, best/, best.json     see training.monitoring.validation
checkpoints/    see training.distributed.checkpoint
product/        the trained model in its library's own format
finished.json   {steps, ...}; written last
stop            created by a launcher to ask the workers to save and stop
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import logging
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from capstan.pipeline.errors import CapstanError, DamagedFile, RecipeError
from capstan.pipeline.storage import Storage, is_inside
from capstan.pipeline.storage.local import as_disk_full
from capstan.training.config import TrainConfig
from capstan.training.data.lanes import lanes_of

logger = logging.getLogger(__name__)

_RESTORE = "restore it from a copy (a bucket's run has one), or start a new run in another folder"
_NAMED = 5  # keys in a message
_NAMED = 5  # differing keys in a message
_LOCK_TRIES, _LOCK_WAIT_S = 60, 0.5


class Run:
    """The folder of `train.run`; for a run in a bucket, its local copy (see training.upload)."""

    def __init__(self, train: TrainConfig) -> None:
        self.train, self.folder = train, train.folder
        self.where = train.run if "://" in train.run else str(train.folder)
        self.assets, self.product = self.folder / "assets", self.folder / "product"
        self.log, self.train_log, self.stop = (self.folder / name for name in ("log.jsonl", "train.log", "stop"))
        self.evaluations = self.folder / "evaluations.jsonl"

    @property
    def started(self) -> bool:
        """Whether the folder holds a run already."""
        return (self.folder / "recipe.json").exists()

    def open(self, recipe: dict[str, Any]) -> None:
        """Create the folder, or check that it holds a run of the same recipe. Raises RecipeError if it does not."""
        storage = Storage(str(self.folder), field="train.run")
        identity = self.train.identity()
        if self.started:
            before = storage.read_json("recipe.json", _RESTORE).get("identity")
            if other := other_recipe(before, json.loads(json.dumps(identity))):
                problem = f"{self.folder} holds a run of {other}"
                raise RecipeError("train.run", problem, "name another folder, or remove this one")
            return
        storage.check_writable()
        content = {"identity": identity, "recipe": recipe, "versions": versions(), "lanes": lanes_of(self.train)}
        storage.write("recipe.json", json.dumps(content, indent=1).encode())

    @property
    def lanes(self) -> int:
        """Number of lanes of the data order (training.data.lanes); 1 for runs of versions that had none.

        Raises DamagedFile if recipe.json says something else than a number.
        """
        if not self.started:
            return lanes_of(self.train)
        lanes = Storage(str(self.folder)).read_json("recipe.json", _RESTORE).get("lanes", 1)
        if not isinstance(lanes, int) or lanes < 1 or self.train.batch % lanes:
            problem = f"its lanes are {lanes!r}, and the batch is {self.train.batch}"
            raise DamagedFile(str(self.folder / "recipe.json"), problem, _RESTORE)
        return lanes

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the run for this process. Waits for a process that is ending; raises CapstanError if it does not."""
        with (self.folder / "lock").open("w") as file:
            for remaining in range(_LOCK_TRIES, -1, -1):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if remaining == 0:
                        raise CapstanError(f"training: another process is training in {self.folder}") from None
                    time.sleep(_LOCK_WAIT_S)
            yield

    def pinned(self, name: str, choose: Callable[[], str | None]) -> str | None:
        """Return the first result of `choose` for `name` in this run, so that "latest" does not change during a run."""
        path = self.folder / "pinned.json"
        known: dict[str, str | None] = Storage(str(self.folder)).read_json(path.name, _RESTORE) if path.exists() else {}
        if name not in known:
            known[name] = choose()
            Storage(str(self.folder)).write(path.name, json.dumps(known).encode())
        return known[name]

    def publish(self, folder: Path, fill: Callable[[Path], None]) -> None:
        """Let `fill` write into a temporary folder, then rename it to `folder`, replacing what was there.

        Raises DiskFull if the disk is full.
        """
        partial = folder.with_name(f".partial-{folder.name}")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            fill(partial)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise as_disk_full(error, folder.parent) or error from None
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)

    def finish(self, summary: dict[str, Any]) -> None:
        """Mark the run as finished."""
        Storage(str(self.folder)).write("finished.json", json.dumps(summary, indent=1).encode())

    def finished(self) -> dict[str, Any] | None:
        """Return the summary if the run has finished the recipe's steps, else None."""
        path = self.folder / "finished.json"
        if not path.exists():
            return None
        try:
            summary = Storage(str(self.folder)).read_json(path.name, "")
            done = int(summary["steps"]) >= self.train.steps
        except (DamagedFile, KeyError, TypeError, ValueError):
            logger.warning("%s is damaged: the run's end is made again from its last checkpoint", path)
            return None
        return summary if done and self.product.is_dir() else None

    def truncate_logs(self, step: int) -> None:
        """Remove the logs' lines after `step`: a run that resumes there writes them again."""
        for log in (self.log, self.evaluations):
            if log.exists():
                kept = [line for line, record in whole_lines(log) if record["step"] <= step]
                Storage(str(self.folder)).write(log.name, b"".join(line + b"\n" for line in kept))


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that training uses, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in ("capstan-t2i", "torch", "accelerate", "deepspeed", "diffusers", "transformers", "ray", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def download(storage: Storage, name: str, there: list[str], folder: Path) -> None:
    """Download the files of the folder `name` of a storage into `folder`; `there` lists all names of the storage.

    Raises RecipeError, before anything is written, if a name leads out of the folder.
    """
    files = [file for file in there if file.startswith(f"{name}/") and not file.endswith("/")]
    check_names(storage, files)
    for file in files:
        path = folder / file.removeprefix(f"{name}/")
        path.parent.mkdir(parents=True, exist_ok=True)
        with storage.open(file) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)


def check_names(storage: Storage, names: Iterable[str]) -> None:
    """Raise RecipeError if an object's name, read as a path, leads out of the folder that it is downloaded to."""
    for name in names:
        if not is_inside(name.removesuffix("/")):
            problem = f"{storage.url} has a file named {name!r}, which leads out of its folder"
            raise RecipeError(storage.field, problem, "remove that file, and check who can write to the bucket")


def last_record(log: Path) -> dict[str, Any] | None:
    """Return the last complete record of a run's log.jsonl, or None if there is none yet."""
    if not log.exists():
        return None
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 65536))
        whole = file.read().rpartition(b"\n")[0].splitlines()
    return next((record for line in reversed(whole) if (record := _record(line)) is not None), None)


def whole_lines(log: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Return the lines of a log with a step each, and their records. Damaged ones are left out, with a warning.

    The last line has no end if its writer was killed; nothing is said of it.
    """
    lines = log.read_bytes().split(b"\n")[:-1] if log.exists() else []
    found = [(line, record) for line in lines if (record := _record(line)) is not None]
    if len(found) < len(lines):
        logger.warning("%s: %d damaged lines are left out", log, len(lines) - len(found))
    return found


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


@contextlib.contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Also write training's log messages into `path`."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log = logging.getLogger("capstan.training")
    log.addHandler(handler)
    if log.getEffectiveLevel() > logging.INFO:
        log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


def other_recipe(before: Any, now: dict[str, Any]) -> str:
    """Return in words how the recipe of a run differs from the one now; "" if it does not.

    >>> other_recipe({"model": "vqgan", "seed": 1, "lr": 1}, {"model": "captioner", "seed": 2, "lr": 3})
    'model vqgan, and the recipe trains captioner'
    >>> other_recipe({"model": "vqgan", "seed": 1}, {"model": "vqgan", "seed": 2})
    'another recipe (different: seed)'
    """
    changed = differences(before, now)
    if isinstance(before, dict) and before.get("model") != now["model"]:
        return f"model {before.get('model')}, and the recipe trains {now['model']}"
    more = f" and {len(changed) - _NAMED} more" if len(changed) > _NAMED else ""
    return f"another recipe (different: {', '.join(changed[:_NAMED])}{more})" if changed else ""


def differences(before: Any, now: Any, where: str = "") -> list[str]:
    """Return the dotted names of the values that differ between two JSON objects."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [] if before == now else [where]
    names = sorted(before.keys() | now.keys())
    return [
        difference
        for name in names
        for difference in differences(before.get(name), now.get(name), f"{where}.{name}".removeprefix("."))
    ]
