"""SIGKILL at ten random moments: the layer ends byte for byte as it would have without.

One process loads everything and is forked for each life, which does what a run does, units one after the other; so a
life costs no more than its work. tests/recaption/test_job.py kills a run on Ray.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

# Arguments: captioner, dataset, seed. Each layout of the dataset is captioned by lives that are
# killed at random, until one comes to its end; then the next, whose images are partly others and lie elsewhere.
SCRIPT = """
import json, os, random, signal, sys, time
from pathlib import Path

import open_clip
import torch
from in_process import run_here
from small_dataset import write_dataset

from pipeline import units
from pipeline.config import Recipe
from pipeline.storage import Storage
from recaption import job
from recaption.engines import coca, decode  # loaded before any fork

torch.set_num_threads(1)
units.run = run_here
captioner, folder, chance = sys.argv[1], sys.argv[2], random.Random(int(sys.argv[3]))
section = {"model": captioner, "decoding": {"method": "top_p"}, "lint": {"retries": 1}, "batch": 2}
recipe = Recipe.model_validate({"dataset": folder, "resources": {"cpus": 1}, "recaption": section})
storage = Storage(folder)


def layout() -> list[list[int]]:
    chosen = chance.sample(range(1, 60), 13)
    return [chosen[start : start + 3] for start in range(0, 12, 3)] + [[chosen[12], *chosen[:2]]]


def live(moment: float) -> float:
    # A run in a process of its own, killed at this moment unless it ends before; how long it took, or 0.
    started, child = time.monotonic(), os.fork()
    if child == 0:
        try:
            job.recaption(recipe, progress=False)
            os._exit(0)
        finally:
            os._exit(1)
    while time.monotonic() - started < moment:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert status == 0
            return time.monotonic() - started
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return 0.0


write_dataset(storage, layout())
whole, kills, files, shards = live(100), 0, [], []
# Ten at least, and as many as it takes to hit the work at four different points of it.
while wanted := kills < 10 or (len(set(files)) < 4 and kills < 60):
    shards = layout()
    write_dataset(storage, shards)
    while wanted and not live(chance.uniform(0, whole)):
        kills += 1
        files.append(len(storage.names("captions")) + len(storage.names("state")))
        wanted = kills < 10 or (len(set(files)) < 4 and kills < 60)
job.recaption(recipe, progress=False)
print(json.dumps({"kills": kills, "files": files, "shards": shards}))
"""


def run(code: str, *arguments: str) -> dict[str, Any]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests/helpers")])
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.integration
def test_ten_kills_at_random_moments(captioner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from in_process import run_here
    from small_dataset import write_dataset

    from pipeline import units
    from pipeline.config import Recipe
    from pipeline.storage import Storage
    from recaption.job import recaption

    found = run(SCRIPT, str(captioner), str(tmp_path / "torn"), "5")
    assert found["kills"] >= 10
    assert len(set(found["files"])) > 3  # they came at different points of the work
    monkeypatch.setattr(units, "run", run_here)
    whole, torn = Storage(str(tmp_path / "whole")), Storage(str(tmp_path / "torn"))
    write_dataset(whole, found["shards"])
    section = {"model": str(captioner), "decoding": {"method": "top_p"}, "lint": {"retries": 1}, "batch": 3}
    recaption(Recipe.model_validate({"dataset": whole.url, "resources": {"cpus": 1}, "recaption": section}))
    files = {name: whole.read(name) for name in whole.names("captions")}
    assert {name: torn.read(name) for name in torn.names("captions")} == files
    assert len(files) == 6  # five shards, and the layer's recipe
    assert not list((tmp_path / "torn").rglob(".partial-*"))
