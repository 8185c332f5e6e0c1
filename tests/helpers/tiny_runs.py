"""Training runs of the tiny family, and what they leave behind."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from capstan.pipeline.config import Recipe


def make_recipe(dataset: Path, run: Path, **section: Any) -> Recipe:
    base = {"model": "tiny_family:TinyFamily", "run": str(run), "steps": 12, "batch": 8, "log_every": 1}
    base |= {"lr": 0.01, "warmup": 4, "schedule": "cosine", "ema": 0.9, "data": {"layer": None}}
    base |= {"checkpoint": {"every": 4}, "engine": {"strategy": "ddp"}}
    return Recipe(dataset=str(dataset), train={**base, **section})


def records(run: Path) -> list[dict[str, Any]]:
    text = (run / "log.jsonl").read_text() if (run / "log.jsonl").exists() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()  # the last one may still be being written
    timed = ("samples_per_s", "images_per_s", "data_wait", "cpu_s", "flops_per_s", "host_memory_gib")
    return [{name: value for name, value in json.loads(line).items() if name not in timed} for line in lines]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "product" / "weights.pt")


def assert_same(run: Path, other: Path) -> None:
    """Every record and every weight, bit for bit."""
    assert records(run) == records(other)
    ours, theirs = weights(run), weights(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def wait_for_step(run: Path, step: int, limit_s: float = 500) -> None:
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if (seen := records(run)) and seen[-1]["step"] >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"{run} did not come to step {step}")
