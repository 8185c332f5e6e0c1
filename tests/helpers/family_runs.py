"""What every family's runs must do: end as if they had not been killed, and leave exports that open without Capstan."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import warm_python
import yaml
from safetensors.torch import load_file
from tiny_runs import records, wait_for_step

from capstan.pipeline.config import Recipe
from capstan.training.config import TrainConfig
from capstan.training.trainer import fit


def small_run(model: str, run: Path, steps: int) -> dict[str, Any]:
    """A section `train` without the model's settings: original captions, every step logged and saved, one thread."""
    section = {"model": model, "run": str(run), "steps": steps, "batch": 8, "lr": 1e-3, "log_every": 1, "ema": 0.5}
    section |= {"checkpoint": {"every": 1, "keep": 1}, "engine": {"strategy": "ddp", "threads": 1}}
    return section | {"data": {"layer": None}, "watch": {"trackers": []}}


def assert_killed_run_ends_as_whole(make: Callable[[str, int], Recipe], weights: str, folder: Path) -> None:
    """Kill a run by SIGKILL, resume it, and compare with a run that was not killed, bit by bit.

    `make(run, steps)` is a recipe that saves each step; `weights` a file of the product.
    """
    recipe = make("killed", 40)
    (path := folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    worker = warm_python.Popen([sys.executable, "-m", "capstan.training.trainer", str(path)], env=environment)
    killed = Path(TrainConfig.from_recipe(recipe).run)
    wait_for_step(killed, 2)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    before = records(killed)[-1]["step"]
    assert before < 40
    whole = Path(str(fit(make("whole", before + 3))["run"]))
    fit(make("killed", before + 3))
    assert "resuming from" in (killed / "train.log").read_text()
    assert records(killed) == records(whole)
    ours, theirs = load_file(killed / "product" / weights), load_file(whole / "product" / weights)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def made_elsewhere(code: str, export: Path, folder: Path) -> np.ndarray:
    """Return the array `made` of `code`, run without Capstan on the path; `model` is the exported model."""
    whole = (
        "import sys, numpy as np, torch\n"
        "from transformers import AutoModel\n"
        "torch.set_num_threads(1)\n"
        "model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        f"{code}\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'capstan']\n"
        "np.save(sys.argv[2], made)\n"
    )
    environment = os.environ | {"HF_HOME": str(folder / "hf"), "PYTHONPATH": ""}
    command = [sys.executable, "-c", whole, str(export), str(folder / "made.npy")]
    warm_python.run(command, check=True, cwd=folder, env=environment, timeout=500)
    made: np.ndarray = np.load(folder / "made.npy")
    return made
