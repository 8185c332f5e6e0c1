"""SIGKILL at ten random moments: the layer ends byte for byte as it would have without.

One process loads everything and is forked for each life, which does what a run does, units one after the other; so a
life costs no more than its work. The same on Ray itself, where each life starts a Ray of its own, takes minutes: it is
among the slow tests. tests/recaption/test_job.py kills one run on Ray.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from in_process import run_here
from repo import ROOT
from small_dataset import write_dataset

from capstan.pipeline import units
from capstan.pipeline.config import Recipe
from capstan.pipeline.storage import Storage
from capstan.recaption.job import recaption

# Arguments: captioner, dataset, seed. Each layout of the dataset is captioned by lives that are
# killed at random, until one comes to its end; then the next, whose images are partly others and lie elsewhere.
SCRIPT = """
import json, os, random, signal, sys, time
from pathlib import Path

import open_clip
import torch
from in_process import run_here
from small_dataset import write_dataset

from capstan.pipeline import units
from capstan.pipeline.config import Recipe
from capstan.pipeline.storage import Storage
from capstan.recaption import job
from capstan.recaption.engines import coca, coca_decoding  # loaded before any fork

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
    found = run(SCRIPT, str(captioner), str(tmp_path / "torn"), "5")
    assert found["kills"] >= 10
    assert len(set(found["files"])) > 3  # they came at different points of the work
    monkeypatch.setattr(units, "run", run_here)
    whole, torn = Storage(str(tmp_path / "whole")), Storage(str(tmp_path / "torn"))
    write_dataset(whole, found["shards"])
    recaption(recipe_of(captioner, whole, batch=3))
    files = {name: whole.read(name) for name in whole.names("captions")}
    assert {name: torn.read(name) for name in torn.names("captions")} == files
    assert len(files) == 6  # five shards, and the layer's recipe
    assert not list((tmp_path / "torn").rglob(".partial-*"))


def recipe_of(captioner: Path, storage: Storage, **section: Any) -> Recipe:
    section |= {"model": str(captioner), "decoding": {"method": "top_p"}, "lint": {"retries": 1}}
    return Recipe.model_validate({"dataset": storage.url, "resources": {"cpus": 1}, "recaption": section})


LIFE = """
import sys
from pathlib import Path
from capstan.pipeline.config import Recipe
from capstan.recaption.job import recaption
recaption(Recipe.model_validate_json(Path(sys.argv[1]).read_text()), progress=False)
"""


def live_on_ray(file: Path, seconds: float) -> bool:
    """Run in separate processes, kill all of them after `seconds`, and return whether the run had ended before."""
    log = file.with_suffix(".log").open("wb")
    with log, subprocess.Popen([sys.executable, "-c", LIFE, str(file)], stderr=log, start_new_session=True) as process:
        try:
            assert process.wait(seconds) == 0, file.with_suffix(".log").read_text()
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return False
    return True


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_kills_at_random_moments_on_ray(
    captioner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Driver, Ray and workers are killed together, at moments drawn from the whole time that a run takes; each time the
    run resumes, and whenever it ends, images change and move.
    """
    chance, torn = random.Random(7), Storage(str(tmp_path / "torn"))
    file = tmp_path / "recipe.json"
    file.write_text(recipe_of(captioner, torn, batch=2).model_dump_json())

    def layout() -> list[list[int]]:
        chosen = chance.sample(range(1, 400), 96)
        return [chosen[start : start + 6] for start in range(0, 96, 6)]

    write_dataset(torn, layout())
    started = time.monotonic()
    assert live_on_ray(file, 600)
    whole, kills, shards = time.monotonic() - started, list[tuple[float, int]](), layout()
    write_dataset(torn, shards)
    while len(kills) < 10 or (len({files for _, files in kills}) < 4 and len(kills) < 30):
        moment = chance.uniform(0, whole)
        if live_on_ray(file, moment):
            shards = layout()
            write_dataset(torn, shards)
        else:
            kills.append((round(moment, 1), len(list((tmp_path / "torn/state").rglob("*.json")))))
    assert live_on_ray(file, 600)
    with capsys.disabled():
        print(f"\n{len(kills)} kills of a run of {whole:.1f} s, (second, files of state): {kills}")
    assert len({files for _, files in kills}) > 3  # they came at different points of the work
    monkeypatch.setattr(units, "run", run_here)
    never = Storage(str(tmp_path / "never"))
    write_dataset(never, shards)
    recaption(recipe_of(captioner, never, batch=3))
    expected = {name: never.read(name) for name in never.names("captions")}
    assert {name: torn.read(name) for name in torn.names("captions")} == expected
    assert len(expected) == 17  # sixteen shards, and the layer's recipe
    assert not list((tmp_path / "torn").rglob(".partial-*"))
