"""Mistakes that would end a command late are found before anything slow is loaded, and are one line with the fix."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from capstan.cluster.cli import run
from capstan.pipeline.dataset.shards import Manifest, write_manifest
from capstan.pipeline.storage import Storage

DIFFUSION = {"model": "diffusion", "run": "run", "steps": 1, "batch": 8, "diffusion": {"autoencoder": "ae"}}
ORIGINAL = "train.data={layer: null}"
BUILD = ["build", "recipe.yaml", "--set", "dataset=new", "--set", "source={path: urls.csv}"]

# Arguments → what the one line says.
CASES: dict[str, tuple[list[str], str]] = {
    "layer": (["train", "recipe.yaml", "--set", "train.data.layer=nope"], "train.data.layer: ds has no caption layer"),
    "fp16": (
        ["train", "recipe.yaml", "--set", "train.precision=fp16"],
        "fp16 needs a GPU, and this machine has no GPU",
    ),
    "workers": (
        ["train", "recipe.yaml", "--set", "train.engine.workers=4", "--set", "resources.cpus=2"],
        "train.engine.workers: is 4, but there are 2 CPUs. Fix: set engine.workers to at most 2",
    ),
    "gpus": (
        ["train", "recipe.yaml", "--set", "resources.gpus=2"],
        "resources.gpus: is 2, but this machine has no GPU",
    ),
    "autoencoder": (["train", "recipe.yaml", "--set", ORIGINAL], "train.diffusion.autoencoder: no model at ae"),
    "dataset": (
        ["train", "recipe.yaml", "--set", "dataset=none"],
        "dataset: no dataset at none. Fix: run `capstan build`",
    ),
    "sample": (["sample", "no-run", "-p", "a cat"], "RUN: no model at no-run"),
    "evaluate": (["evaluate", "no-run"], "RUN: no model at no-run"),
    "export": (["export", "no-run", "out"], "RUN: no model at no-run"),
    "diff": (["captions", "diff", "ds", "original", "nope"], "no caption layer 'nope' in ds"),
    "newer": (["verify", "newer"], "reads up to 4. Fix: upgrade: pip install --upgrade capstan-t2i"),
    "captioner": (
        ["recaption", "recipe.yaml", "--set", "recaption={engine: coca, device: cuda}"],
        "recaption.device: is cuda, but this machine has no GPU",
    ),
    "function": ([*BUILD, "--set", 'select=[{name: long, where: "lenght(caption) > 3"}]'], "did you mean length?"),
    "scorer": ([*BUILD, "--set", 'select=[{name: match, where: "clip_scor > 0.2"}]'], "Fix: add score.clip, which"),
    "score": ([*BUILD, "--set", "score.clip={precision: fp16}"], "score.clip.precision: fp16 needs a GPU"),
    "source": (BUILD, "source.path: no file at urls.csv"),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe, an empty dataset `ds`, and one that a later version wrote; no GPU is visible."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"dataset": "ds", "train": DIFFUSION}))
    write_manifest(Storage("ds"), Manifest())
    write_manifest(Storage("newer"), Manifest(format_version=99))
    return tmp_path


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("folder")
def test_a_mistake_is_one_line_with_its_fix(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, said = CASES[case]
    assert run(arguments) == 2
    err = capsys.readouterr().err
    assert said in err
    assert "Fix: " in err
    assert err.count("\n") == 1


def test_neither_torch_nor_ray_is_loaded_before(folder: Path) -> None:
    """Each of them takes seconds to load."""
    late = {"captioner"}  # names its model first, which needs open_clip
    code = (
        "import json, sys\n"
        "from capstan.cluster.cli import run\n"
        "codes = [run(arguments) for arguments in json.loads(sys.argv[1])]\n"
        "print(json.dumps([codes, sorted({'torch', 'ray'} & sys.modules.keys())]))\n"
    )
    every = [arguments for name, (arguments, _) in CASES.items() if name not in late]
    done = subprocess.run([sys.executable, "-c", code, json.dumps(every)], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [[2] * len(every), []]


def test_a_refused_run_leaves_no_folder_behind(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Else the corrected recipe would be another one than that of the folder."""
    assert run(CASES["fp16"][0]) == 2
    assert not (folder / "run").exists()


def test_another_models_run_is_named_by_its_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from capstan.pipeline.config import Recipe
    from capstan.training.config import TrainConfig
    from capstan.training.run import Run

    section: dict[str, Any] = {"model": "autoencoder", "run": "run", "steps": 1, "batch": 8}
    recipe = Recipe(dataset="ds", train=section)
    Run(TrainConfig.from_recipe(recipe)).open(recipe.model_dump(mode="json"))
    assert run(["train", "recipe.yaml"]) == 2
    said = "error: train.run: run holds a run of model autoencoder, and the recipe trains diffusion. Fix: name another"
    assert capsys.readouterr().err.startswith(said)
