"""State of a run ↔ checkpoints/step-000200/: complete or not there.

checkpoints/step-000200/worker-00000.pt     each worker's elements of model, optimizer and average (see training.parts),
                                            the model's buffers, and what this worker has not logged yet
checkpoints/step-000200/rival.pt            the second model and its optimizer, where the family has one
checkpoints/step-000200/checkpoint.json     step, workers, data; written last: a folder without it does not count

It is read by any number of workers, of any strategy; by as many of the same it is taken up bit for bit.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from capstan.pipeline.storage import Storage
from capstan.training.config import TrainConfig
from capstan.training.distributed.adversary import Adversary
from capstan.training.distributed.ema import Ema
from capstan.training.distributed.engine import Engine
from capstan.training.distributed.loss_scale import LossScale
from capstan.training.distributed.state import StateReader, written

logger = logging.getLogger(__name__)

MARK = "checkpoint.json"
_RIVAL = "rival.pt"


class Checkpoints:
    """The checkpoints of one run; all methods that save or load are called on every worker."""

    def __init__(
        self,
        train: TrainConfig,
        engine: Engine,
        ema: Ema,
        rival: Adversary | None = None,
        wanted: Callable[[Path], bool] = lambda path: False,
    ) -> None:
        self.train, self.engine, self.ema, self.rival = train, engine, ema, rival
        self._wanted = wanted  # whether an old checkpoint has to stay for a while, since it is being uploaded
        self.folder = train.folder / "checkpoints"

    def save(self, step: int, worker: dict[str, Any], shared: dict[str, Any]) -> Path:
        """Write the state after `step` steps; gives its folder. `worker` is this worker's own, `shared` (plain data) is
        rank 0's.
        """
        folder = self.folder / f"step-{step:06d}"
        if self.engine.is_main:
            shutil.rmtree(folder, ignore_errors=True)  # what a killed run began
            folder.mkdir(parents=True)
        self.engine.wait()
        parts = written(chain(self.engine.parts(), self.ema.parts()))
        content = {"parts": parts, "buffers": self.engine.buffers(), "worker": worker}
        torch.save(content, folder / f"worker-{self.engine.rank:05d}.pt")
        del parts, content
        if self.rival is not None and self.engine.is_main:
            torch.save(self.rival.state(), folder / _RIVAL)
        self.engine.wait()
        if self.engine.is_main:
            _sync(folder)
            mark = {"step": step, "samples": step * self.train.batch, "engine": self._shape(), **shared}
            if self.engine.loss_scale is not None:
                mark["loss_scale"] = asdict(self.engine.loss_scale)
            Storage(str(folder), field="train.run").write(MARK, json.dumps(mark, indent=1).encode())
            for old in complete(self.folder)[: -self.train.checkpoint.keep]:
                if not self._wanted(old):
                    (old / MARK).unlink()
                    shutil.rmtree(old)
        return folder

    def load(self) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """Take up the last complete checkpoint: (step, this worker's own, shared); (0, {}, {}) where there is none.

        Where there were more workers then, what the others had of their own is dealt out and merged; where there were
        fewer, some get nothing.
        """
        found = complete(self.folder)
        if not found:
            return 0, {}, {}
        shared = json.loads((found[-1] / MARK).read_text())
        pieces = StateReader(sorted(found[-1].glob("worker-*.pt")))
        self.engine.take(pieces)
        for part in self.ema.parts():
            part.take(pieces)
        if self.engine.loss_scale is not None:
            self.engine.loss_scale = LossScale(**shared["loss_scale"])
        before, now = shared["engine"], self._shape()
        rank, world = self.engine.rank, self.engine.world
        self.engine.take_buffers(pieces.buffers[rank if before["workers"] == world else 0])
        if self.rival is not None:
            self.rival.restore(torch.load(found[-1] / _RIVAL, map_location=self.engine.device, weights_only=True))
        if self.engine.is_main:
            then = "" if before == now else f", written by {_words(before)}, as {_words(now)}"
            logger.info("going on from %s%s", found[-1], then)
        return int(shared["step"]), merged(pieces.workers[rank::world]), shared

    def _shape(self) -> dict[str, Any]:
        strategy = self.train.engine.strategy
        return {"strategy": strategy, "zero": self.engine.zero, "workers": self.engine.world}


def merged(states: list[Any]) -> Any:
    """What several workers have counted and not logged yet, as if one had: lists are joined, numbers and tensors added.

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


def _words(shape: dict[str, Any]) -> str:
    """
    >>> _words({"strategy": "deepspeed", "zero": 2, "workers": 1}), _words({"strategy": "ddp", "zero": 0, "workers": 2})
    ('1 worker of ZeRO 2', '2 workers of DDP')
    """
    kind = f"ZeRO {shape['zero']}" if shape["strategy"] == "deepspeed" else "DDP"
    return f"{shape['workers']} worker{'s' * (shape['workers'] != 1)} of {kind}"


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    return sorted((mark.parent for mark in folder.glob(f"step-*/{MARK}")), key=lambda path: step_of(path.name))


def step_of(name: str) -> int:
    """The steps made before the checkpoint of this name.

    >>> step_of("step-000200")
    200
    """
    return int(name.removeprefix("step-"))


def _sync(folder: Path) -> None:
    """Make sure that the files are on disk before the mark says so."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
