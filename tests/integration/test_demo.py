"""The whole chain by one command, killed with SIGKILL on the way and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import warm_python
from PIL import Image

pytestmark = [pytest.mark.integration, pytest.mark.timeout(3600)]


def start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "capstan", "demo", str(folder), "--quick", "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def stop_when(process: subprocess.Popen[str], ready: Callable[[], bool], how: signal.Signals) -> str:
    """Send a signal to the demo's own process as soon as `ready`; what it started has to notice by itself.

    Returns what it wrote to stderr. All limits are against hangs.
    """
    started = time.monotonic()
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - started < 1200, "the stage was not reached"
        time.sleep(0.02)
    os.kill(process.pid, how)
    return process.communicate(timeout=300)[1]


def complete(folder: Path, run: str) -> list[Path]:
    return sorted((folder / run / "checkpoints").glob("step-*/checkpoint.json"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A demo that was killed while it trained and recaptioned, interrupted while it trained, and then ended.

    Builds that are killed are in tests/pipeline/test_killed.py.
    """
    folder = tmp_path_factory.mktemp("demo") / "demo"
    stop_when(start(folder), lambda: bool(complete(folder, "captioner-base")), signal.SIGKILL)
    process = start(folder)
    said = stop_when(process, lambda: (folder / "captioner" / "log.jsonl").exists(), signal.SIGINT)
    assert process.returncode == 130
    assert "run the same command again to resume" in said
    said = stop_when(start(folder), lambda: bool(list(folder.glob("web/captions/*/shard-*.parquet"))), signal.SIGKILL)
    assert ".cc:" not in said, "lines of Ray's core on the terminal"
    process = start(folder)
    out, err = process.communicate(timeout=1800)
    assert process.returncode == 0, err
    return folder, json.loads(out.splitlines()[-1])


def test_it_ends_with_a_grid_and_a_report(demo: tuple[Path, dict[str, Any]]) -> None:
    _, summary = demo
    assert Image.open(summary["grid"]).size[0] > 400
    assert "<h2>How well images follow prompts</h2>" in Path(summary["report"]).read_text()
    assert {"background", "colours", "count", "colour_shape", "relation"} <= summary["measures"].keys()


def test_every_run_was_trained_by_deepspeed_on_two_processes(demo: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = demo
    for run, stage in {"captioner-base": 2, "captioner": 0, "autoencoder": 0, "diffusion": 0}.items():
        assert f"DeepSpeed, ZeRO stage {stage}, world size 2" in (folder / run / "train.log").read_text()


def test_a_killed_run_went_on_without_losing_or_repeating_a_step(demo: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = demo
    steps = [json.loads(line)["step"] for line in (folder / "captioner-base" / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_every_image_has_its_captions(demo: tuple[Path, dict[str, Any]]) -> None:
    from capstan.pipeline.dataset.shards import Dataset
    from capstan.pipeline.pack.verify import verify
    from capstan.pipeline.storage import Storage
    from capstan.recaption.store import read_rows

    folder, summary = demo
    dataset = Dataset(Storage(str(folder / "web")))
    assert verify(dataset.storage) == []
    for shard in dataset.shard_names:
        # Of a model that has learnt nothing some captions are none: then the original stands in, flagged.
        rows = read_rows(dataset.storage, summary["layer"], shard).to_pylist()
        keys = dataset.table(shard, ["key"])["key"].to_pylist()
        assert [(row["key"], row["slot"]) for row in rows] == [(k, s) for k in keys for s in ("short", "descriptive")]
        assert all(row["text"] for row in rows)


def test_the_exported_folder_draws_the_same_image_without_capstan(
    demo: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, _ = demo
    exported, grid = tmp_path / "pipeline", tmp_path / "ours.npy"
    command = [sys.executable, "-m", "capstan", "export", str(folder / "diffusion"), str(exported)]
    warm_python.run(command, check=True, capture_output=True)
    theirs = (
        "import sys, numpy, torch; from diffusers import DiffusionPipeline as P; p = P.from_pretrained(sys.argv[1]); "
        "r = p(['a red circle'], num_inference_steps=15, guidance_scale=3.0, output_type='np', "
        "generator=[torch.Generator().manual_seed(7)]); numpy.save(sys.argv[2], r.images)"
    )
    command = [sys.executable, "-c", theirs, str(exported), str(grid)]
    warm_python.run(command, check=True, capture_output=True, cwd="/")
    from capstan.training.sample import open_sampler

    ours = open_sampler(folder / "diffusion").draw(["a red circle"], [7], steps=15, guidance=3.0).arrays
    assert np.abs(np.load(grid)[0] - ours[0] / 255).max() <= 1e-3 + 0.5 / 255  # ours is rounded to 8 bits
