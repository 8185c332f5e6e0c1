"""State of a run ↔ checkpoints/step-000200/: complete or not there.

checkpoints/step-000200/engine/...          model and optimizer, every worker its part
checkpoints/step-000200/rival.pt            the second model and its optimizer, where the family has one
checkpoints/step-000200/worker-00000.pt     each worker's share of the EMA, and what it has not logged yet
checkpoints/step-000200/checkpoint.json     step, workers, data; written last: a folder without it does not count
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import RecipeError
from pipeline.storage import Storage
from training.config import TrainConfig
from training.ema import Ema
from training.engine import Engine
from training.rival import Rival

logger = logging.getLogger(__name__)

MARK = "checkpoint.json"
_RIVAL = "rival.pt"


class Checkpoints:
    """The checkpoints of one run; all methods that save or load are called on every worker."""

    def __init__(self, train: TrainConfig, engine: Engine, ema: Ema, rival: Rival | None = None) -> None:
        self.train, self.engine, self.ema, self.rival = train, engine, ema, rival
        self.folder = train.folder / "checkpoints"

    def save(self, step: int, worker: dict[str, Any], shared: dict[str, Any]) -> None:
        """Write the state after `step` steps. `worker` is this worker's own, `shared` (plain data) is rank 0's."""
        folder = self.folder / f"step-{step:06d}"
        if self.engine.is_main:
            shutil.rmtree(folder, ignore_errors=True)  # what a killed run began
            folder.mkdir(parents=True)
        self.engine.wait()
        self.engine.save(folder / "engine")
        torch.save({"ema": self.ema.state(), **worker}, folder / f"worker-{self.engine.rank:05d}.pt")
        if self.rival is not None and self.engine.is_main:
            torch.save(self.rival.state(), folder / _RIVAL)
        self.engine.wait()
        if self.engine.is_main:
            _sync(folder)
            mark = {"step": step, "samples": step * self.train.batch, "engine": self._shape(), **shared}
            Storage(str(folder), field="train.run").write(MARK, json.dumps(mark, indent=1).encode())
            for old in complete(self.folder)[: -self.train.checkpoint.keep]:
                (old / MARK).unlink()
                shutil.rmtree(old)

    def load(self) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """Take up the last complete checkpoint: (step, this worker's own, shared); (0, {}, {}) where there is none."""
        found = complete(self.folder)
        if not found:
            return 0, {}, {}
        shared = json.loads((found[-1] / MARK).read_text())
        self._refuse_other_shape(shared["engine"])
        self.engine.load(found[-1] / "engine")
        name = f"worker-{self.engine.rank:05d}.pt"
        worker = torch.load(found[-1] / name, map_location=self.engine.device, weights_only=True)
        self.ema.restore(worker.pop("ema"))
        if self.rival is not None:
            self.rival.restore(torch.load(found[-1] / _RIVAL, map_location=self.engine.device, weights_only=True))
        if self.engine.is_main:
            logger.info("going on from %s", found[-1])
        return int(shared["step"]), worker, shared

    def _shape(self) -> dict[str, Any]:
        strategy = self.train.engine.strategy
        return {"strategy": strategy, "zero": self.engine.zero, "workers": self.engine.world}

    def _refuse_other_shape(self, saved: dict[str, Any]) -> None:
        for name, value in self._shape().items():
            if saved[name] != value:
                problem = f"the last checkpoint in {self.train.run} was written with {name}: {saved[name]}, not {value}"
                mend = f"write {name}: {saved[name]}, or start anew in another train.run"
                raise RecipeError(f"train.engine.{name}", problem, mend)


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    return sorted((mark.parent for mark in folder.glob(f"step-*/{MARK}")), key=lambda path: int(path.name[5:]))


def _sync(folder: Path) -> None:
    """Make sure that the files are on disk before the mark says so."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
