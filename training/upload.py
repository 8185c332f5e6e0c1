"""A run folder ↔ its copy in a bucket: checkpoints, product, log

For `train.checkpoint.upload`, or a `train.run` that is a bucket's URL.

    checkpoint saved ──▶ Upload.send: a thread uploads grids, evaluations and the best state, then the checkpoint's
                         files, then its checkpoint.json; then removes all but the newest `keep`
    product written  ──▶ Upload.finish: uploads what is missing, then finished.json
    empty run folder ──▶ Upload.fetch: downloads the newest complete checkpoint (or the product) to resume from

The bucket has the same names as the run folder. As there, a checkpoint counts only with its checkpoint.json, a product
with finished.json, and a best state if best.json names it. An unavailable bucket never stops training: the upload is
retried with the next checkpoint and at the end, where it fails with an error.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from capstan.pipeline.errors import CapstanError, RecipeError
from capstan.pipeline.storage import Storage
from capstan.pipeline.storage.local import scratch
from capstan.training.distributed.checkpoint import complete, is_checkpoint, step_of
from capstan.training.distributed.integrity import MARK, problem_of, set_aside
from capstan.training.run import Run, check_names, download, other_recipe

logger = logging.getLogger(__name__)

_ONCE: Final = ("recipe.json", "pinned.json")
_GROWING: Final = ("log.jsonl", "train.log")
_EVALUATIONS: Final = "evaluations.jsonl"
_BEST: Final = "best.json"
_TRIES_AT_END: Final = 3  # each with the retries of pipeline.storage
_FIELD: Final = "train.checkpoint.upload"


class Upload:
    """The upload of one run, for one process. Use it as a context manager."""

    def __init__(self, run: Run, url: str, options: Mapping[str, Any]) -> None:
        self.run, self.storage = run, Storage(url, options, field=_FIELD)
        self._waiting: Path | None = None  # the newest checkpoint whose upload has not started
        self._sending: Path | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, daemon=True, name="upload")

    def __enter__(self) -> Upload:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # In the background -----------------------------------------------------------------------------------------------

    def send(self, checkpoint: Path) -> None:
        """Queue a finished checkpoint. It replaces a queued one whose upload has not started."""
        with self._changed:
            self._waiting = checkpoint
            self._changed.notify_all()

    def is_sending(self, checkpoint: Path) -> bool:
        """Return whether the files of a checkpoint are still needed for an upload."""
        with self._changed:
            return checkpoint in (self._sending, self._waiting)

    def drain(self) -> None:
        """Wait until the queue is empty; failed uploads do not count."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is None and self._sending is None)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._sending = None
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting is not None or self._closed)
                if self._waiting is None:
                    return
                self._sending, self._waiting = self._waiting, None
                checkpoint = self._sending
            try:
                self._put_checkpoint(checkpoint)
                logger.info("uploaded %s to %s", checkpoint.name, self.storage.url)
            except (CapstanError, OSError) as error:
                again = "retrying with the next checkpoint, or at the end"
                logger.warning("could not upload %s (%s); %s", checkpoint.name, error, again)

    # To the bucket ---------------------------------------------------------------------------------------------------

    def _put_checkpoint(self, checkpoint: Path) -> None:
        """Upload the files, then checkpoint.json: until then readers use an older checkpoint."""
        there = self.storage.names()
        self._put_small(there)
        name = f"checkpoints/{checkpoint.name}"
        before = [old for old in there if old.startswith(f"{name}/")]
        self.storage.delete(f"{name}/{MARK}", *(old for old in before if not old.endswith(MARK)))
        for path in sorted(checkpoint.iterdir()):
            if path.name != MARK:
                self._put(path, f"{name}/{path.name}")
        self.storage.write(f"{name}/{MARK}", (checkpoint / MARK).read_bytes())
        kept = sorted({*_steps(there), checkpoint.name}, key=step_of)[-self.run.train.checkpoint.keep :]
        for old in {name.split("/")[1] for name in there if name.startswith("checkpoints/")} - set(kept):
            self._remove(old, there)

    def _remove(self, checkpoint: str, there: list[str]) -> None:
        """Remove an old checkpoint, or an unfinished upload of a killed run."""
        mark = f"checkpoints/{checkpoint}/{MARK}"
        self.storage.delete(mark)
        self.storage.delete(*(name for name in there if name.startswith(f"checkpoints/{checkpoint}/")))

    def _put_small(self, there: list[str]) -> None:
        """Upload the small files that a run needs besides its checkpoints, and its log so far."""
        folder = self.run.folder
        once = [folder / name for name in _ONCE] + [path for path in self.run.assets.rglob("*") if path.is_file()]
        for path in once + sorted((folder / "samples").glob("*.png")):
            name = path.relative_to(folder).as_posix()
            if name not in there and path.exists():
                self._put(path, name)
        for path in [*(folder / name for name in _GROWING), *sorted((folder / "tensorboard").glob("*"))]:
            if path.exists():
                self.storage.write(path.relative_to(folder).as_posix(), path.read_bytes())
        measured = _read(
            self.run.evaluations
        )  # read first: the best state is uploaded before the evaluations that name it
        self._put_best(there)
        if measured is not None:
            self.storage.write(_EVALUATIONS, measured)

    def _put_best(self, there: list[str]) -> None:
        """Upload the best state, then best.json, which names it; then remove earlier ones."""
        pointer, sent = self.run.folder / _BEST, self.storage.read(_BEST) if _BEST in there else None
        while (mark := _read(pointer)) is not None and mark != sent:
            name = json.loads(mark)["folder"]
            if sent is not None and json.loads(sent)["folder"] == name:
                self.storage.delete(_BEST)
            self.storage.delete(
                *(old for old in there if old.startswith(f"{name}/"))
            )  # unfinished upload of a killed run
            try:
                for path in sorted((self.run.folder / name).rglob("*")):
                    if path.is_file():
                        self._put(path, path.relative_to(self.run.folder).as_posix())
            except (CapstanError, OSError):
                if _read(pointer) == mark:
                    raise
            if _read(pointer) == mark:  # else a better one has replaced it, and its files may be gone
                self.storage.write(_BEST, mark)
                self.storage.delete(*(old for old in self.storage.names("best") if not old.startswith(f"{name}/")))
                sent = mark

    def _put(self, path: Path, name: str) -> None:
        if self.storage.local_path() is None:
            self.storage.put(path, name)
            return
        with scratch() as folder:  # for a local folder `put` would move the file
            self.storage.put(Path(shutil.copy(path, folder)), name)

    def finish(self) -> None:
        """Upload what is missing of a finished run: the product, then finished.json. Raises CapstanError on failure."""
        mark = (self.run.folder / "finished.json").read_bytes()
        for attempt in range(1, _TRIES_AT_END + 1):
            try:
                if self.storage.exists("finished.json") and self.storage.read("finished.json") == mark:
                    return
                self.storage.delete("finished.json")
                newest = complete(self.run.folder / "checkpoints")[-1]
                if f"checkpoints/{newest.name}/{MARK}" not in self.storage.names("checkpoints"):
                    self._put_checkpoint(newest)
                self._put_small(self.storage.names())
                for path in sorted(self.run.product.rglob("*")):
                    if path.is_file():
                        self._put(path, path.relative_to(self.run.folder).as_posix())
                self.storage.write("finished.json", mark)
                logger.info("uploaded the product to %s", self.storage.url)
                return
            except (CapstanError, OSError) as error:
                if attempt == _TRIES_AT_END:
                    raise CapstanError(
                        f"training: finished, the product is in {self.run.product}, but uploading to "
                        f"{self.storage.url} failed: {error}. Run the same command again to upload it"
                    ) from error
                logger.warning("could not upload the product (%s); retrying", error)

    # From the bucket -------------------------------------------------------------------------------------------------

    def fetch(self) -> None:
        """Download what is newer in the bucket than here: the finished run, or the newest complete checkpoint.

        Raises RecipeError if the bucket holds a run of another recipe, or is not writable.
        """
        self.storage.check_writable()
        there, folder = self.storage.names(), self.run.folder
        check_names(self.storage, there)
        if "recipe.json" in there:
            before = json.loads(self.storage.read("recipe.json"))["identity"]
            if other := other_recipe(before, json.loads(json.dumps(self.run.train.identity()))):
                problem = f"{self.storage.url} holds a run of {other}"
                raise RecipeError(_FIELD, problem, "choose another URL, or remove what is there")
        self._set_damaged_aside()
        here = max((step_of(path.name) for path in complete(folder / "checkpoints")), default=0)
        newest = max(_steps(there), key=step_of, default=None)
        if here > max((step_of(name) for name in _steps(there)), default=0):
            self.send(complete(folder / "checkpoints")[-1])
        if newest is not None and step_of(newest) > here:
            logger.info("fetching %s from %s", newest, self.storage.url)
            self._get_small(there)
            name = f"checkpoints/{newest}"
            self.run.publish(folder / name, lambda partial: download(self.storage, name, there, partial))
        if "finished.json" in there and not (folder / "finished.json").exists():
            self._get_small(there)
            self.run.publish(self.run.product, lambda partial: download(self.storage, "product", there, partial))
            Storage(str(folder)).write("finished.json", self.storage.read("finished.json"))

    def _set_damaged_aside(self) -> None:
        """Rename the newest local checkpoints as long as they are damaged: the bucket may have a sound one."""
        while checkpoints := complete(self.run.folder / "checkpoints"):
            if (problem := problem_of(checkpoints[-1])) is None:
                return
            logger.warning("checkpoint damaged: %s. It is kept as %s", problem, set_aside(checkpoints[-1]).name)

    def _get_small(self, there: list[str]) -> None:
        for name in there:
            if name in (*_ONCE, *_GROWING, _EVALUATIONS) or name.startswith(("tensorboard/", "samples/")):
                Storage(str(self.run.folder)).write(name, self.storage.read(name))
        if _BEST in there and (mark := self.storage.read(_BEST)) != _read(self.run.folder / _BEST):
            best = json.loads(mark)["folder"]
            check_names(self.storage, [best])
            self.run.publish(self.run.folder / best, lambda partial: download(self.storage, best, there, partial))
            Storage(str(self.run.folder)).write(_BEST, mark)
        if not self.run.assets.is_dir():
            self.run.publish(self.run.assets, lambda partial: download(self.storage, "assets", there, partial))


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _steps(there: list[str]) -> list[str]:
    """Return the names of the complete checkpoints in a bucket."""
    marks = [name.split("/") for name in there if name.startswith("checkpoints/") and name.endswith(f"/{MARK}")]
    return [parts[1] for parts in marks if len(parts) == 3 and is_checkpoint(parts[1])]
