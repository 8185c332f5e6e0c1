"""Capstan beside a user's own code and without its extras: real commands in folders that look like many projects."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from repo import ROOT
from small_captioner import write_captioner

from capstan.pipeline import extras

TRAIN = {
    "model": "autoencoder",
    "run": "run",
    "steps": 2,
    "batch": 2,
    "autoencoder": {"block_out_channels": [8, 8], "norm_num_groups": 2},
    "data": {"layer": None},
}
DDP = {"strategy": "ddp", "workers": 1}


def write_recipe(folder: Path, **changes: Any) -> None:
    base: dict[str, Any] = {
        "dataset": str(folder / "ds"),
        "source": {"format": "folder", "path": "images"},
        "image": {"size": 32, "min_size": 16},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(base | changes))


def write_images(folder: Path) -> None:
    (folder / "images").mkdir()
    noise = np.random.default_rng(0)
    for number in range(6):
        pixels = noise.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        (folder / "images" / f"{number}.txt").write_text(f"noise number {number}")


def capstan(folder: Path, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command in `folder`, of which Python makes the first place to look for modules."""
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*([str(path)] if path else []), str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


@pytest.mark.integration
def test_modules_of_the_users_own_do_not_get_in_the_way(tmp_path: Path) -> None:
    write_images(tmp_path)
    captioner = write_captioner(tmp_path / "captioner")
    section = {"engine": "coca", "model": str(captioner), "slots": ["short"]}
    write_recipe(tmp_path, recaption=section, train={**TRAIN, "engine": {**DDP, "launcher": "ray"}})
    for name in (
        "pipeline/__init__",
        "pipeline/config",
        "training/__init__",
        "training/config",
        "recaption/__init__",
        "cluster",
    ):
        file = tmp_path / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text("raise RuntimeError('this is the user\\'s own module')\n")
    for command, key in (("build", "counts"), ("recaption", "layer"), ("train", "steps")):
        done = capstan(tmp_path, "capstan", command, "recipe.yaml", "--json")
        assert done.returncode == 0, done.stderr
        assert key in json.loads(done.stdout.splitlines()[-1]), command
    for launcher in ("capstan.training.trainer", "torch.distributed.run --standalone -m capstan.training.trainer"):
        write_recipe(tmp_path, train={**TRAIN, "run": f"run-{len(launcher)}", "engine": DDP})
        done = capstan(tmp_path, *launcher.split(), "recipe.yaml")
        assert done.returncode == 0, done.stderr
        assert (tmp_path / f"run-{len(launcher)}" / "finished.json").exists()


def test_the_package_is_a_command(tmp_path: Path) -> None:
    assert capstan(tmp_path, "capstan", "--help").stdout.startswith("Usage: ")
    assert capstan(tmp_path, "capstan", "--version").stdout == "capstan 0.1.0\n"


@pytest.fixture
def core_only(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH: every Python process, Ray's workers too, lacks the packages of all extras."""
    hidden = sorted({package for packages in extras.PACKAGES.values() for package in packages})
    (tmp_path / "without").mkdir()
    lines = ["import sys", *(f"sys.modules[{package!r}] = None" for package in hidden)]
    (tmp_path / "without" / "sitecustomize.py").write_text("\n".join(lines))
    return tmp_path / "without"


@pytest.mark.integration
def test_the_core_builds_without_torch(tmp_path: Path, core_only: Path) -> None:
    write_images(tmp_path)
    write_recipe(tmp_path, train=TRAIN, score={"image": {}, "caption": {}})
    (tmp_path / "keys.txt").write_text("0" * 32)
    done = capstan(tmp_path, "capstan", "build", "recipe.yaml", "--json", path=core_only)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["counts"]["kept"] == 6
    assert "train: " not in done.stderr
    for command in ("verify ds", "report ds", "remove ds --keys keys.txt", "jobs list", "schema", "doctor"):
        done = capstan(tmp_path, "capstan", *command.split(), path=core_only)
        assert "Traceback" not in done.stderr
        assert done.returncode == 0 or command == "doctor", done.stderr


NEEDING = {
    "recaption recipe.yaml": "recaption",
    "captions diff ds original latest": "recaption",
    "train recipe.yaml": "train",
    "sample run -p x": "train",
    "demo": "train",
    "build recipe.yaml --set score.clip.model=ViT-B-32": "recaption",
    "build recipe.yaml --set score.language.weights=x": "language",
}


def test_a_mistake_in_a_model_is_found_without_torch(tmp_path: Path, core_only: Path) -> None:
    write_images(tmp_path)
    write_recipe(tmp_path, train={**TRAIN, "autoencoder": {"latent_chanels": 1}})
    done = capstan(tmp_path, "capstan", "build", "recipe.yaml", path=core_only)
    assert done.stderr == "error: train.autoencoder.latent_chanels: unknown key. Fix: did you mean latent_channels?\n"


@pytest.mark.parametrize("command", NEEDING)
def test_a_command_that_needs_an_extra_says_so_in_one_line(command: str, tmp_path: Path, core_only: Path) -> None:
    write_images(tmp_path)
    write_recipe(tmp_path, train=TRAIN)
    done = capstan(tmp_path, "capstan", *command.split(), path=core_only)
    lines = done.stderr.splitlines()
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1
    assert lines[0].endswith(f"Fix: pip install 'capstan-t2i[{NEEDING[command]}]'")
