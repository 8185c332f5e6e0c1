"""Metrics of the steps → log.jsonl, the trackers and a line every few seconds.

A record covers the steps since the last record, over all workers: the means of all scalars (loss, grad_norm, those of
the family) and of per-sample losses by timestep, images and FLOPs per second, MFU, the share of time spent waiting for
data, the memory of the largest worker, and the caption blend so far.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from capstan.training.config.monitoring import flat
from capstan.training.distributed.engine import Engine
from capstan.training.family import Batch, Metrics, PerSampleLoss
from capstan.training.monitoring import loss_by_timestep
from capstan.training.monitoring.blend import blend_warning
from capstan.training.monitoring.flops import FlopCount, peak_flops
from capstan.training.monitoring.trackers import Trackers, open_trackers
from capstan.training.run import Run

logger = logging.getLogger(__name__)

_PRINT_EVERY_S = 5.0

Item = TypeVar("Item")


class MetricsLogger:
    """Collector on every worker, writer on rank 0. Call `start` and `log` on every worker."""

    def __init__(self, engine: Engine, run: Run, name: str) -> None:
        self.engine, self.run, self.name = engine, run, name
        self.values: defaultdict[str, list[float | torch.Tensor]] = defaultdict(list)
        self.spreads: dict[str, torch.Tensor] = {}  # name → [2, bands], see loss_by_timestep
        self.slots, self.blend = Counter[str](), Counter[str]()  # captions since the last record; in total
        self.waited_s, self.steps, self.flops = 0.0, 0, 0.0
        self.since = self.printed = time.monotonic()
        self.since_cpu = time.process_time()  # of this worker, all threads
        self.flop_count = FlopCount()
        self.blend_warned = False
        self.peak = _peak(engine, run)
        self.trackers = Trackers()

    def start(self, step: int, worker: Mapping[str, Any], shared: Mapping[str, Any]) -> None:
        """Start after `step` steps, from the values that `state` and `shared_state` returned then."""
        for name, values in worker.get("values", {}).items():
            self.values[name].extend(values)
        for name, sums in worker.get("spreads", {}).items():
            if sums.shape[-1] == self.run.train.watch.bands:  # else the recipe now sets other bands
                self.spreads[name] = sums.to(self.engine.device)
        self.slots.update(worker.get("slots", {}))
        self.blend.update(shared.get("blend", {}))
        self.flop_count.known.update(shared.get("flops", {}))
        if self.engine.is_main:
            self.run.truncate_logs(step)
            self.trackers = open_trackers(self.run, step)
        self.since = self.printed = time.monotonic()
        self.since_cpu = time.process_time()

    def state(self) -> dict[str, Any]:
        """Return the values that this worker has not logged yet. Waits for the GPU."""
        values = {name: _numbers(values) for name, values in self.values.items()}
        spreads = {name: sums.cpu() for name, sums in self.spreads.items()}
        return {"values": values, "spreads": spreads, "slots": dict(self.slots)}

    def shared_state(self) -> dict[str, Any]:
        """Return the logged caption blend so far (slot → captions shown) and the FLOPs by shape."""
        return {"blend": dict(self.blend), "flops": dict(self.flop_count.known)}

    def timed(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield `items`, adding up the time spent waiting for them."""
        iterator = iter(items)
        while True:
            started = time.monotonic()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self.waited_s += time.monotonic() - started
            yield item

    @contextlib.contextmanager
    def counting(self, batch: Batch) -> Iterator[None]:
        """Wrap the forward and backward pass of a part of a step; count its FLOPs if the shape is new."""
        with self.flop_count.counting(batch):
            yield
        self.flops += self.flop_count.of(batch)

    def _check_blend(self) -> None:
        """Warn once if the captions shown are not blended as the recipe says."""
        data = self.run.train.data
        if data.layer is None or data.datasets is not None or self.blend_warned:
            return
        if warning := blend_warning(self.blend, data.weights):
            self.blend_warned = True
            logger.warning("train %s: %s", self.name, warning)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Wrap work that is not a step (sampling, evaluation): its time does not count in any rate."""
        started, started_cpu = time.monotonic(), time.process_time()
        yield
        self.since += time.monotonic() - started
        self.since_cpu += time.process_time() - started_cpu

    def add(self, metrics: Metrics) -> None:
        """Add the metrics of one part of a step; tensors stay on their device until they are logged."""
        for name, value in metrics.items():
            if isinstance(value, PerSampleLoss):
                sums = loss_by_timestep.sums(value, self.run.train.watch.bands)
                self.spreads[name] = self.spreads[name] + sums if name in self.spreads else sums
            else:
                self.values[name].append(value.detach() if isinstance(value, torch.Tensor) else value)

    def step(self, slots: Mapping[str, int]) -> None:
        """Count a step, with its number of captions per slot."""
        self.steps += 1
        self.slots.update(slots)

    def log(self, step: int, facts: Mapping[str, float]) -> None:
        """Write the record of the steps up to `step`; `facts` are copied into it."""
        mine = {"waited_s": self.waited_s, "flops": self.flops, **_memory(self.engine.device)}
        mine["cpu_s"] = time.process_time() - self.since_cpu
        workers = self.engine.collect({**self.state(), **mine})
        for worker in workers:
            self.blend.update(worker["slots"])
        if self.engine.is_main:
            record = self._record(step, facts, workers)
            with self.run.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            self.trackers.scalars(step, flat(record))
            self._print(step, record)
            self._check_blend()
        for collected in (self.values, self.spreads, self.slots):
            collected.clear()
        self.waited_s, self.steps, self.flops, self.since = 0.0, 0, 0.0, time.monotonic()
        self.since_cpu = time.process_time()

    def _record(self, step: int, facts: Mapping[str, float], workers: list[dict[str, Any]]) -> dict[str, Any]:
        seconds = max(time.monotonic() - self.since, 1e-9)
        names = sorted({name for worker in workers for name in worker["values"]})
        means = {}
        for name in names:
            values = [value for worker in workers for value in worker["values"].get(name, [])]
            means[name] = math.fsum(values) / len(values)
        names = sorted({name for worker in workers for name in worker["spreads"]})
        by_timestep = {
            name: loss_by_timestep.means([worker["spreads"][name] for worker in workers if name in worker["spreads"]])
            for name in names
        }
        waited = sum(worker["waited_s"] for worker in workers) / len(workers)
        rate = self.steps * self.run.train.batch / seconds
        # images_per_s is the same number, by the name that it has had since every sample was an image.
        rates = {"samples_per_s": rate, "images_per_s": rate, "data_wait": min(1.0, waited / seconds)}
        rates["cpu_s"] = sum(worker["cpu_s"] for worker in workers)
        rates["flops_per_s"] = sum(worker["flops"] for worker in workers) / seconds
        if self.peak is not None:
            rates["mfu"] = rates["flops_per_s"] / (len(workers) * self.peak)
        for name in ("memory_gib", "host_memory_gib"):
            if name in workers[0]:
                rates[name] = max(worker[name] for worker in workers)
        shown = sum(self.blend.values())
        blend = {slot: count / shown for slot, count in sorted(self.blend.items())}
        return {"step": step, **means, **facts, **rates, **by_timestep, "blend": blend}

    def _print(self, step: int, record: Mapping[str, Any]) -> None:
        """Log one line, at most every few seconds."""
        steps, now = self.run.train.steps, time.monotonic()
        if now - self.printed >= _PRINT_EVERY_S or step == steps:
            self.printed = now
            logger.info("%s", progress_line(self.name, record, steps, self.run.train.batch))

    def close(self) -> None:
        self.trackers.close()


def _numbers(values: list[float | torch.Tensor]) -> list[float]:
    """Return scalars as Python numbers; those on a device are copied in one transfer."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    if len(tensors) < len(values):
        return [float(value) for value in values]
    return [float(number) for number in torch.stack([tensor.float() for tensor in tensors]).tolist()]


def _peak(engine: Engine, run: Run) -> float | None:
    """Return the peak FLOP/s of one worker's device: the recipe's, else by GPU name; None for a CPU or unknown GPU."""
    given, precision = run.train.watch.peak_tflops, run.train.precision
    if given is not None or engine.device.type != "cuda":
        return None if given is None else given * 1e12
    return peak_flops(torch.cuda.get_device_name(engine.device), precision, torch.backends.cuda.matmul.allow_tf32)


def _memory(device: torch.device) -> dict[str, float]:
    """Return this worker's peak GPU allocation and its current share of the machine's memory (PSS), in GiB."""
    memory: dict[str, float] = {}
    if device.type == "cuda":
        memory["memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    rollup = Path("/proc/self/smaps_rollup")
    if rollup.exists():
        kib = next(int(line.split()[1]) for line in rollup.read_text().splitlines() if line.startswith("Pss:"))
        memory["host_memory_gib"] = kib / 2**20
    return memory


def progress_line(name: str, record: Mapping[str, Any], steps: int, batch: int) -> str:
    """Return the log line of a record.

    >>> record = {"step": 30, "loss": 0.25, "lr": 0.001, "samples_per_s": 64.0, "data_wait": 0.015}
    >>> progress_line("diffusion", record, 120, 16)
    'train diffusion: step 30/120 · loss 0.2500 · lr 1.0e-03 · 64.0 samples/s · data wait 2% · ETA 0:22'
    """
    rate = record["samples_per_s"]
    mfu = f" · MFU {record['mfu']:.1%}" if "mfu" in record else ""
    left_s = round((steps - record["step"]) * batch / rate) if rate else 0
    return (
        f"train {name}: step {record['step']}/{steps} · loss {record['loss']:.4f} · lr {record['lr']:.1e} · "
        f"{rate:.1f} samples/s{mfu} · data wait {record['data_wait']:.0%} · ETA {left_s // 60}:{left_s % 60:02}"
    )
