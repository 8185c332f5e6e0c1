"""The run folder: what a training run leaves behind, and how the next start finds its way.

recipe.json     what the run is; a start with another recipe is refused
assets/         what the family made from the dataset once: a tokenizer, latent statistics
log.jsonl       one JSON object a logged step; tensorboard/ the same as curves; train.log in words
evaluations.jsonl, samples/, best/, best.json     see training.watch.inloop
checkpoints/    see training.checkpoint
product/        the trained model in its library's own format
finished.json   {steps, ...}; written last
stop            made by a launcher that wants the workers to save and stop
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from capstan.pipeline.errors import CapstanError, RecipeError
from capstan.pipeline.storage import Storage
from capstan.training.config import TrainConfig

_LOCK_TRIES, _LOCK_WAIT_S = 60, 0.5


class Run:
    """The folder of `train.run`; of a run in a bucket, this machine's copy of it (see training.upload)."""

    def __init__(self, train: TrainConfig) -> None:
        self.train, self.folder = train, train.folder
        self.where = train.run if "://" in train.run else str(train.folder)
        self.assets, self.product = self.folder / "assets", self.folder / "product"
        self.log, self.words, self.stop = (self.folder / name for name in ("log.jsonl", "train.log", "stop"))
        self.evaluations = self.folder / "evaluations.jsonl"

    def begin(self, recipe: dict[str, Any]) -> None:
        """Make the folder, or check that it holds a run of the same recipe. Raises RecipeError if not."""
        storage = Storage(str(self.folder), field="train.run")
        identity = self.train.identity()
        if (self.folder / "recipe.json").exists():
            before = json.loads((self.folder / "recipe.json").read_text())["identity"]
            if changed := differences(before, json.loads(json.dumps(identity))):
                problem = f"{self.folder} holds a run of another recipe (other: {', '.join(changed)})"
                raise RecipeError("train.run", problem, "name another folder, or remove this one")
            return
        storage.check_writable()
        content = {"identity": identity, "recipe": recipe}
        storage.write("recipe.json", json.dumps(content, indent=1).encode())

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process. Waits a while for one that is ending; raises CapstanError if it does not."""
        with (self.folder / "lock").open("w") as file:
            for left in range(_LOCK_TRIES, -1, -1):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if left == 0:
                        raise CapstanError(f"training: another process is training in {self.folder}") from None
                    time.sleep(_LOCK_WAIT_S)
            yield

    def pinned(self, name: str, choose: Callable[[], str | None]) -> str | None:
        """What `choose` gave when it was first asked for `name` in this run: "latest" must not move under a run."""
        path = self.folder / "pinned.json"
        known: dict[str, str | None] = json.loads(path.read_text()) if path.exists() else {}
        if name not in known:
            known[name] = choose()
            Storage(str(self.folder)).write(path.name, json.dumps(known).encode())
        return known[name]

    def publish(self, folder: Path, fill: Callable[[Path], None]) -> None:
        """Let `fill` write into a folder that appears as `folder` once it is whole, in place of what was there."""
        partial = folder.with_name(f".partial-{folder.name}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        fill(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)

    def finish(self, summary: dict[str, Any]) -> None:
        """Say that the product is there."""
        Storage(str(self.folder)).write("finished.json", json.dumps(summary, indent=1).encode())

    def finished(self) -> dict[str, Any] | None:
        """The summary of a run that is done with as many steps as the recipe asks for, or None."""
        path = self.folder / "finished.json"
        summary: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
        return summary if summary and summary["steps"] >= self.train.steps and self.product.is_dir() else None

    def forget_after(self, step: int) -> None:
        """Drop the logs' lines after `step`: a run that goes on from there writes them again."""
        for log in (self.log, self.evaluations):
            if log.exists():
                lines = log.read_text().splitlines(keepends=True)
                kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
                Storage(str(self.folder)).write(log.name, "".join(kept).encode())


def download(storage: Storage, name: str, there: list[str], folder: Path) -> None:
    """The files of the folder `name` of a storage, out of all names that are `there`, into `folder`."""
    for file in there:
        if file.startswith(f"{name}/"):
            path = folder / file.removeprefix(f"{name}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            with storage.open(file) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)


def last_record(log: Path) -> dict[str, Any] | None:
    """The last whole line of a run's log.jsonl, or None where there is none yet."""
    if not log.exists():
        return None
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 65536))
        whole = file.read().rpartition(b"\n")[0].splitlines()
    return json.loads(whole[-1]) if whole else None


@contextlib.contextmanager
def writing_words(path: Path) -> Iterator[None]:
    """What the training floor logs goes also into `path`."""
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


def differences(before: Any, now: Any, where: str = "") -> list[str]:
    """Dotted names of the values that differ between two JSON objects."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [] if before == now else [where]
    names = sorted(before.keys() | now.keys())
    return [
        found
        for name in names
        for found in differences(before.get(name), now.get(name), f"{where}.{name}".removeprefix("."))
    ]
