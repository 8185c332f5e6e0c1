"""What happens in the steps → log.jsonl, TensorBoard and a line every few seconds.

A record says, of the steps since the last one and over all workers: the means of all scalars (loss, grad_norm, the
family's own), images per second, the share of time spent waiting for data, and the caption blend so far.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch

from training.engine import Engine
from training.run import Run

logger = logging.getLogger(__name__)

_SAY_EVERY_S = 5.0

Item = TypeVar("Item")


class Meter:
    """Collects on every worker; writes on rank 0. `start` and `log` are called on every worker."""

    def __init__(self, engine: Engine, run: Run, name: str) -> None:
        self.engine, self.run, self.name = engine, run, name
        self.values: defaultdict[str, list[float | torch.Tensor]] = defaultdict(list)
        self.slots, self.blend = Counter[str](), Counter[str]()  # captions since the last record, and in all
        self.waited_s, self.steps = 0.0, 0
        self.since = self.said = time.monotonic()
        self.board: Any = None

    def start(self, step: int, worker: Mapping[str, Any], shared: Mapping[str, Any]) -> None:
        """Begin after `step` steps, with what `state` and `shared_state` gave then."""
        for name, values in worker.get("values", {}).items():
            self.values[name].extend(values)
        self.slots.update(worker.get("slots", {}))
        self.blend.update(shared.get("blend", {}))
        if self.engine.is_main:
            from torch.utils.tensorboard import SummaryWriter

            self.run.forget_after(step)
            self.board = SummaryWriter(str(self.run.folder / "tensorboard"), purge_step=step + 1)
        self.since = self.said = time.monotonic()

    def state(self) -> dict[str, Any]:
        """What this worker has not logged yet."""
        values = {name: [float(value) for value in values] for name, values in self.values.items()}
        return {"values": values, "slots": dict(self.slots)}

    def shared_state(self) -> dict[str, Any]:
        """The caption blend so far: slot → captions shown, as far as it was logged."""
        return {"blend": dict(self.blend)}

    def timed(self, items: Iterable[Item]) -> Iterator[Item]:
        """Hand on `items`, taking the time that is spent waiting for them."""
        iterator = iter(items)
        while True:
            asked = time.monotonic()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self.waited_s += time.monotonic() - asked
            yield item

    def add(self, metrics: Mapping[str, float | torch.Tensor]) -> None:
        """Scalars of one part of a step; tensors stay on their device until they are logged."""
        for name, value in metrics.items():
            self.values[name].append(value.detach() if isinstance(value, torch.Tensor) else value)

    def step(self, slots: Mapping[str, int]) -> None:
        """A step was made, with so many captions from each slot."""
        self.steps += 1
        self.slots.update(slots)

    def log(self, step: int, facts: Mapping[str, float]) -> None:
        """Write the record of the steps up to `step`; `facts` stand in it as they are."""
        workers = self.engine.collect({**self.state(), "waited_s": self.waited_s})
        for worker in workers:
            self.blend.update(worker["slots"])
        if self.engine.is_main:
            record = self._record(step, facts, workers)
            with self.run.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            self._draw(step, record)
            self._say(step, record)
        self.values.clear()
        self.slots.clear()
        self.waited_s, self.steps, self.since = 0.0, 0, time.monotonic()

    def _record(self, step: int, facts: Mapping[str, float], workers: list[dict[str, Any]]) -> dict[str, Any]:
        seconds = max(time.monotonic() - self.since, 1e-9)
        names = sorted({name for worker in workers for name in worker["values"]})
        means = {}
        for name in names:
            values = [value for worker in workers for value in worker["values"].get(name, [])]
            means[name] = math.fsum(values) / len(values)
        waited = sum(worker["waited_s"] for worker in workers) / len(workers)
        rates = {"images_per_s": self.steps * self.run.train.batch / seconds, "data_wait": min(1.0, waited / seconds)}
        if self.engine.device.type == "cuda":
            rates["memory_gib"] = torch.cuda.max_memory_allocated(self.engine.device) / 2**30
        shown = sum(self.blend.values())
        blend = {slot: count / shown for slot, count in sorted(self.blend.items())}
        return {"step": step, **means, **facts, **rates, "blend": blend}

    def _draw(self, step: int, record: Mapping[str, Any]) -> None:
        flat = {name: value for name, value in record.items() if name not in ("step", "blend")}
        flat |= {f"blend/{slot}": share for slot, share in record["blend"].items()}
        for name, value in flat.items():
            self.board.add_scalar(name, value, step)

    def _say(self, step: int, record: Mapping[str, Any]) -> None:
        """One line, but not more often than every few seconds."""
        steps, now = self.run.train.steps, time.monotonic()
        if now - self.said >= _SAY_EVERY_S or step == steps:
            self.said = now
            logger.info("%s", progress_line(self.name, record, steps, self.run.train.batch))

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def progress_line(name: str, record: Mapping[str, Any], steps: int, batch: int) -> str:
    """A record in words.

    >>> record = {"step": 30, "loss": 0.25, "lr": 0.001, "images_per_s": 64.0, "data_wait": 0.015}
    >>> progress_line("diffusion", record, 120, 16)
    'train diffusion: step 30/120 · loss 0.2500 · lr 1.0e-03 · 64.0 images/s · data wait 2% · ETA 0:22'
    """
    rate = record["images_per_s"]
    left_s = round((steps - record["step"]) * batch / rate) if rate else 0
    return (
        f"train {name}: step {record['step']}/{steps} · loss {record['loss']:.4f} · lr {record['lr']:.1e} · "
        f"{rate:.1f} images/s · data wait {record['data_wait']:.0%} · ETA {left_s // 60}:{left_s % 60:02}"
    )
