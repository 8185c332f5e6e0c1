"""Run folders as training leaves them, without training."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

SERIES = {"loss": 1.0, "grad_norm": 0.5, "lr": 1e-3, "images_per_s": 64.0, "samples": 8.0}


def record(step: int, **own: Any) -> dict[str, Any]:
    values: dict[str, Any] = {name: value / step for name, value in SERIES.items()}
    bands = {"0.00-0.50": 2.0 / step, "0.50-1.00": 1.0 / step}
    return {
        "step": step,
        **values,
        "images_per_s": 64.0,
        "loss_by_time": bands,
        "blend": {"original": 0.05, "short": 0.95},
        **own,
    }


def write_run(
    folder: Path,
    steps: Iterable[int] = range(10, 101, 10),
    *,
    grids: Iterable[int] = (50, 100),
    prompts: list[str] | None = None,
    **train: Any,
) -> Path:
    """Write a run of model diffusion with a record for each of `steps` and a grid for each of `grids`."""
    folder.mkdir(parents=True)
    section = {
        "model": "diffusion",
        "steps": 100,
        "batch": 32,
        "watch": {"samples": {"prompts": prompts or ["a red circle"]}},
    }
    content = {"identity": {"model": "diffusion"}, "recipe": {"dataset": "ds", "train": {**section, **train}}}
    (folder / "recipe.json").write_text(json.dumps(content | {"versions": {"torch": "2.15.0"}}))
    add_records(folder, *map(record, steps))
    for step in grids:
        add_grid(folder, step)
    evaluation = {"step": 100, "count": 64, "measures": {"clip": 0.31, "fid": None}, "seconds": 4.5}
    (folder / "evaluations.jsonl").write_text(json.dumps(evaluation) + "\n")
    (folder / "checkpoints/step-000100").mkdir(parents=True)
    (folder / "checkpoints/step-000100/state.json").write_text("{}")
    return folder


def add_records(folder: Path, *records: dict[str, Any]) -> None:
    with (folder / "log.jsonl").open("a") as file:
        file.writelines(json.dumps(one) + "\n" for one in records)


def add_grid(folder: Path, step: int) -> None:
    file = io.BytesIO()
    Image.new("RGB", (320, 160), (step % 256, 80, 160)).save(file, "PNG")
    (folder / "samples").mkdir(exist_ok=True)
    (folder / f"samples/step-{step:06d}.png").write_bytes(file.getvalue())
