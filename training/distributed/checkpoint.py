"""State of a run ↔ checkpoints/step-000200/, complete or absent

checkpoints/step-000200/worker-00000.pt     each worker's elements of model, optimizer and average (see
                                            training.distributed.state), the model's buffers, and metrics not logged yet
checkpoints/step-000200/rival.pt            the adversary and its optimizer, if the family has one
checkpoints/step-000200/checkpoint.json     step, workers, data, size and SHA-256 of every file; written last: a folder
                                            without it does not count

Every file is verified before it is loaded. A damaged checkpoint is renamed to damaged-step-000200, with a warning, and
the one before is loaded. Any number of workers with any strategy can load it. With the same number and strategy the run
resumes bit for bit.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from capstan.pipeline.errors import CapstanError
from capstan.pipeline.storage import Storage
from capstan.training.config import TrainConfig
from capstan.training.distributed.adversary import Adversary
from capstan.training.distributed.ema import Ema
from capstan.training.distributed.engine import Engine
from capstan.training.distributed.integrity import MARK, FileSum, problem_of, read_mark, seal, set_aside, write_summed
from capstan.training.distributed.loss_scale import LossScale
from capstan.training.distributed.state import StateReader, collect_state

logger = logging.getLogger(__name__)

_ADVERSARY = "rival.pt"


class Checkpoints:
    """The checkpoints of one run; all methods that save or load are called on every worker."""

    def __init__(
        self,
        train: TrainConfig,
        engine: Engine,
        ema: Ema,
        adversary: Adversary | None = None,
        in_use: Callable[[Path], bool] = lambda path: False,
    ) -> None:
        self.train, self.engine, self.ema, self.adversary = train, engine, ema, adversary
        self._in_use = in_use  # whether an old checkpoint must be kept, because it is being uploaded
        self.folder = train.folder / "checkpoints"

    def save(self, step: int, worker: dict[str, Any], shared: dict[str, Any]) -> Path:
        """Write the state after `step` steps; return its folder.

        `worker` is this worker's own state, `shared` (plain data) is taken from rank 0.
        """
        folder = self.folder / f"step-{step:06d}"
        if self.engine.is_main:
            shutil.rmtree(folder, ignore_errors=True)  # left over from a killed run
            folder.mkdir(parents=True)
        self.engine.wait()
        sums = self._write_files(folder, worker)
        files = {name: file for part in self.engine.collect(sums) for name, file in part.items()}
        if self.engine.is_main:
            _sync(folder)
            mark = {"step": step, "samples": step * self.train.batch, "engine": self._shape(), **shared, "files": files}
            if self.engine.loss_scale is not None:
                mark["loss_scale"] = asdict(self.engine.loss_scale)
            Storage(str(folder), field="train.run").write(MARK, seal(mark))
            for old in complete(self.folder)[: -self.train.checkpoint.keep]:
                if not self._in_use(old):
                    (old / MARK).unlink()
                    shutil.rmtree(old)
        return folder

    def _write_files(self, folder: Path, worker: dict[str, Any]) -> dict[str, FileSum]:
        """Write this worker's files; return their sizes and checksums by name. Raises DiskFull."""
        state = collect_state(chain(self.engine.slices(), self.ema.slices()))
        contents: dict[str, Any] = {f"worker-{self.engine.rank:05d}.pt": {"parts": state, "worker": worker}}
        contents[f"worker-{self.engine.rank:05d}.pt"]["buffers"] = self.engine.buffers()
        if self.adversary is not None and self.engine.is_main:
            contents[_ADVERSARY] = self.adversary.state()
        return {
            name: write_summed(folder / name, functools.partial(torch.save, content))
            for name, content in contents.items()
        }

    def load(self) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """Load the last sound checkpoint; return (step, this worker's own state, shared), or (0, {}, {}) if none.

        If there were more workers then, their own states are distributed and merged. If there were fewer, some workers
        get none. Raises CapstanError if there are checkpoints, but all are damaged.
        """
        newest = self._newest_sound()
        if newest is None:
            return 0, {}, {}
        shared = read_mark(newest)
        names = shared.get("files") or [path.name for path in newest.iterdir()]  # earlier versions list no files
        reader = StateReader(newest / name for name in sorted(names) if name.startswith("worker-"))
        self.engine.load_from(reader)
        for part in self.ema.slices():
            part.load_from(reader)
        if self.engine.loss_scale is not None:
            self.engine.loss_scale = LossScale(**shared["loss_scale"])
        before, now = shared["engine"], self._shape()
        rank, world = self.engine.rank, self.engine.world
        self.engine.load_buffers(reader.buffers[rank if before["workers"] == world else 0])
        if self.adversary is not None:
            self.adversary.restore(torch.load(newest / _ADVERSARY, map_location=self.engine.device, weights_only=True))
        if self.engine.is_main:
            then = "" if before == now else f", written by {_describe(before)}, with {_describe(now)}"
            logger.info("resuming from %s%s", newest, then)
        return int(shared["step"]), merged(reader.workers[rank::world]), shared

    def _newest_sound(self) -> Path | None:
        """Return the newest checkpoint whose files are all as they were written; set damaged ones aside."""
        damaged = []
        while checkpoints := self.engine.collect(complete(self.folder))[0]:
            newest: Path = checkpoints[-1]
            problems = self.engine.collect(problem_of(newest, self.engine.rank, self.engine.world))
            problem = next((problem for problem in problems if problem is not None), None)
            if problem is None:
                self._warn_of_unfinished(newest)
                return newest
            damaged.append(problem)
            if self.engine.is_main:
                logger.warning("checkpoint damaged: %s. It is kept as %s", problem, set_aside(newest).name)
            self.engine.wait()
        if damaged:
            raise CapstanError(
                f"training: every checkpoint in {self.folder} is damaged ({damaged[-1]}). "
                f"Fix: restore one, or remove the damaged-* folders there to start again at step 0"
            )
        self._refuse_only_damaged()
        return None

    def _refuse_only_damaged(self) -> None:
        """Raise CapstanError if earlier starts have set all checkpoints aside: never start again unasked."""
        if left := sorted(self.folder.glob("damaged-step-*")):
            raise CapstanError(
                f"training: every checkpoint in {self.folder} is damaged (e.g. {left[-1].name}). "
                f"Fix: restore one, or remove the damaged-* folders there to start again at step 0"
            )

    def _warn_of_unfinished(self, newest: Path) -> None:
        """Name the checkpoint that was not finished, if a later one than `newest` was being written."""
        for folder in self.folder.glob("step-*") if self.engine.is_main else ():
            if is_checkpoint(folder.name) and step_of(folder.name) > step_of(newest.name):
                logger.warning("checkpoint incomplete: %s has no %s; using %s", folder, MARK, newest.name)

    def _shape(self) -> dict[str, Any]:
        strategy = self.train.engine.strategy
        return {"strategy": strategy, "zero": self.engine.zero, "workers": self.engine.world}


def merged(states: list[Any]) -> Any:
    """Merge the metrics that several workers have not logged yet: join lists, add numbers and tensors.

    >>> merged([{"a": [1], "n": {"x": 1}}, {"a": [2], "n": {"x": 2, "y": 3}}]), merged([])
    ({'a': [1, 2], 'n': {'x': 3, 'y': 3}}, {})
    """
    if not states:
        return {}
    if not isinstance(states[0], dict):
        total = states[0]
        for state in states[1:]:
            total = total + state
        return total
    names = {name: None for state in states for name in state}
    return {name: merged([state[name] for state in states if name in state]) for name in names}


def _describe(shape: dict[str, Any]) -> str:
    """Describe the workers of a checkpoint.

    >>> _describe({"strategy": "deepspeed", "zero": 2, "workers": 1})
    '1 worker of ZeRO 2'
    >>> _describe({"strategy": "ddp", "zero": 0, "workers": 2})
    '2 workers of DDP'
    """
    kind = f"ZeRO {shape['zero']}" if shape["strategy"] == "deepspeed" else "DDP"
    return f"{shape['workers']} worker{'s' * (shape['workers'] != 1)} of {kind}"


def complete(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, oldest first."""
    marked = (mark.parent for mark in folder.glob(f"step-*/{MARK}"))
    return sorted((path for path in marked if is_checkpoint(path.name)), key=lambda path: step_of(path.name))


def is_checkpoint(name: str) -> bool:
    """Return whether a folder's name is that of a checkpoint.

    >>> is_checkpoint("step-000200"), is_checkpoint("step-"), is_checkpoint("step-1/..")
    (True, False, False)
    """
    return re.fullmatch(r"step-[0-9]+", name) is not None


def step_of(name: str) -> int:
    """Return the step in a checkpoint's name.

    >>> step_of("step-000200")
    200
    """
    return int(name.removeprefix("step-"))


def _sync(folder: Path) -> None:
    """Flush the files to disk, before checkpoint.json marks them as complete."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
