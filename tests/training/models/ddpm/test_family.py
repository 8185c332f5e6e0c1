"""Reverse diffusion in pixels: runs that resume, draw with and without text, and are drawn by diffusers alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import warm_python
import yaml
from safetensors.torch import load_file
from tiny_runs import records, wait_for_step

from capstan.pipeline.config import Recipe
from capstan.pipeline.errors import RecipeError
from capstan.training.config import TrainConfig
from capstan.training.evaluate import evaluate
from capstan.training.export import export
from capstan.training.models.pixels.process import PixelDdpm
from capstan.training.models.pixels.settings import PixelNoise
from capstan.training.sample import open_sampler, sample
from capstan.training.trainer import fit

UNET = {"block_out_channels": [8, 16], "layers_per_block": 1, "head_channels": 4, "norm_num_groups": 4}
TEXT = {"vocab_size": 600, "length": 16, "width": 16, "layers": 1, "heads": 2}
WORLD = {"format": "world", "world": {"scenes": 10, "size": 16}}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "text": {"text": TEXT},
    "learned": {"text": TEXT, "variance": "learned", "noise": {"schedule": "cosine"}},
    "v": {"noise": {"prediction": "v_prediction", "zero_terminal_snr": True}},
}

Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def make(squares: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`make(run, kind, key=value, …)`: a recipe of four steps in a folder `run`."""
    root = tmp_path_factory.mktemp("ddpm")

    def recipe(run: str, kind: str = "text", ddpm: dict[str, Any] | None = None, **section: Any) -> Recipe:
        settings = {"unet": UNET, "sampling": {"steps": 4}} | KINDS[kind] | (ddpm or {})
        base = {"model": "ddpm", "run": str(root / run), "steps": 4, "batch": 8, "lr": 1e-3, "log_every": 1}
        base |= {
            "ema": 0.5,
            "data": {"layer": None},
            "engine": {"strategy": "ddp", "threads": 1},
            "watch": {"trackers": []},
        }
        return Recipe(dataset=str(squares), source=WORLD, train=base | {"ddpm": settings} | section)

    return recipe


@pytest.fixture(scope="module")
def run(make: Make) -> Callable[[str], Path]:
    """`run(kind)`: the folder of a finished run."""

    def finished(kind: str) -> Path:
        return Path(fit(make(kind, kind))["run"])

    return finished


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "product" / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_draws_and_names_itself(run: Callable[[str], Path], kind: str) -> None:
    log = records(run(kind))
    assert [record["step"] for record in log] == [1, 2, 3, 4]
    assert all(np.isfinite(record["loss"]) for record in log)
    assert ("bound" in log[0]) == (kind == "learned")
    drawer = open_sampler(run(kind))
    assert drawer.prompted == (kind in ("text", "learned"))
    one, two, other = (drawer.draw(["a red square"] * n, [5, 6][:n], batch=2).arrays for n in (1, 2, 1))
    assert one.shape == (1, 16, 16, 3)
    assert np.abs(one[0].astype(int) - two[0]).max() <= 1  # an image depends on its seed, not on its batch
    assert (one == other).all()
    assert np.abs(two[0].astype(int) - two[1]).max() > 1


def test_a_killed_run_ends_as_one_that_was_not(make: Make, run: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = make("killed", "text", steps=40, checkpoint={"every": 1, "keep": 1})
    (path := tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    worker = warm_python.Popen([sys.executable, "-m", "capstan.training.trainer", str(path)], env=environment)
    folder = Path(TrainConfig.from_recipe(recipe).run)
    wait_for_step(folder, 2)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    before = records(folder)[-1]["step"]
    assert before < 40
    end = before + 3
    for name in ("killed", "whole"):
        fit(make(name, "text", steps=end, checkpoint={"every": 1, "keep": 1}))
    killed, whole = folder, folder.with_name("whole")
    assert records(killed) == records(whole)
    ours, theirs = weights(killed), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ({"unet": {**UNET, "head_channels": 5}}, "train.ddpm.unet: .*does not divide by head_channels"),
        ({"unet": {**UNET, "attention": [True]}}, "train.ddpm.unet: .*attention must be"),
        ({"variance": "learned", "sampling": {"sampler": "ddim"}}, "train.ddpm: .*sampler ddpm alone"),
        ({"noise": {"schedule": "cubic"}}, r"train\.ddpm\.noise\.schedule"),
        ({"text": {**TEXT, "chunks": 2, "pretrained": "./clip"}}, "train.ddpm: .*chunks"),
        ({"size": 15}, r"train\.ddpm\.size: 15 pixels do not divide by 2"),
        ({"text": {"pretrained": "/no/clip"}}, r"train\.ddpm\.text\.pretrained: no text encoder at /no/clip"),
        ({"sampling": {"steps": 1001}}, r"train\.ddpm\.sampling\.steps: .* use 1000 or fewer"),
    ],
)
def test_a_wrong_setting_is_named(make: Make, section: dict[str, Any], field: str) -> None:
    with pytest.raises(RecipeError, match=field):
        fit(make("wrong", "plain", section))
    shutil.rmtree(make("wrong").train["run"], ignore_errors=True)


def test_what_takes_no_prompts_says_so(run: Callable[[str], Path], tmp_path: Path) -> None:
    drawer = open_sampler(run("plain"))
    with pytest.raises(RecipeError, match=r"^--guidance: this model has no such setting"):
        drawer.draw([""], [0], guidance=3.0)
    with pytest.raises(RecipeError, match=r"^-p: this model takes no prompts\. Fix: remove it, and set --seed"):
        sample(run("plain"), ["a red square"], tmp_path / "grid.png")
    summary = sample(run("plain"), [], tmp_path / "grid.png", seeds=[3, 4])
    assert (summary["pictures"], summary["seeds"]) == (2, [3, 4])
    with pytest.raises(RecipeError, match=r"^-p: is missing"):
        sample(run("text"), [], tmp_path / "grid.png", seeds=[3, 4])


def test_samplers_are_those_of_the_schedule(run: Callable[[str], Path]) -> None:
    drawn = {
        name: open_sampler(run("text"), sampler=name).draw(["a red square"], [0]).arrays.astype(int)
        for name in ("ddim", "ddpm", "dpm++")
    }
    assert np.abs(drawn["ddim"] - drawn["ddpm"]).max() > 0
    for kind, name, known in (
        ("text", "euler", "ddim, ddpm"),
        ("learned", "ddim", "ddpm, which"),
        ("plain", "dpm++", "ddim or ddpm"),
    ):
        with pytest.raises(RecipeError, match=f"^--sampler: .*Fix: use {known}"):
            open_sampler(run(kind), sampler=name)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++"])
def test_guidance_beyond_the_range_of_images_does_not_darken_what_the_network_sees(
    run: Callable[[str], Path], sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = PixelNoise(prediction="v_prediction", zero_terminal_snr=True)
    pipeline = open_sampler(run("text")).pipeline  # type: ignore[attr-defined]
    pipeline.scheduler = PixelDdpm(noise, sampler=sampler, variance="fixed_small").scheduler()
    alphas, seen = pipeline.scheduler.alphas_cumprod, []

    def velocity(noisy: torch.Tensor, time: torch.Tensor, **_: Any) -> SimpleNamespace:
        """Return v of an image of −0.2 without text and of 0.8 with it: at a guidance of 3, of 2.8."""
        without, with_text = noisy.chunk(2)
        known = torch.cat([torch.full_like(without, -0.2), torch.full_like(with_text, 0.8)])
        alpha = alphas[int(time)]
        seen.append(float(without.mean() / alpha.sqrt()))
        epsilon = (noisy - alpha.sqrt() * known) / (1 - alpha).sqrt()
        return SimpleNamespace(sample=alpha.sqrt() * epsilon - (1 - alpha).sqrt() * known)

    monkeypatch.setattr(pipeline.unet, "forward", velocity)
    drawn = pipeline(["a red square"], num_inference_steps=20, guidance_scale=3.0, output_type="np").images
    assert drawn.min() > 0.99
    assert 0.9 < seen[-1] < 1.1  # in the last step: the image is 1 already, and not what the overshoot left of it


def test_drawings_without_prompts_are_measured_by_what_they_show(run: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run("plain"), folder)
    result = evaluate(folder, count=8)
    assert set(result["measures"]) == {"parsed", "background_tv", "colours_tv"}
    for name, row in result["measures"].items():
        assert row["value"] is None or 0 <= row["value"] <= 1, name
        assert row["chance"] is None
    assert result["measures"]["parsed"]["ceiling"] == 1.0
    assert result["sampling"] == {"steps": 4}
    with pytest.raises(
        RecipeError, match=r"^--measures: oracle compares images with prompts, and this model takes none"
    ):
        evaluate(folder, count=8, measures=["oracle"])
    assert set(evaluate(_copy(run("text"), tmp_path), count=4)["measures"]) >= {"colours", "count"}


def _copy(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder / run.name))


_ELSEWHERE = """
import json, sys
import numpy as np, torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
for folder, prompt in json.loads(sys.argv[1]).items():
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=prompt is not None)
    pipeline.set_progress_bar_config(disable=True)
    given = {} if prompt is None else {"prompt": prompt, "guidance_scale": 3.0}
    result = pipeline(num_inference_steps=4, output_type="np", generator=torch.Generator("cpu").manual_seed(3), **given)
    np.save(folder + ".npy", result.images[0])
    print(type(pipeline).__name__)
ours = [name for name in sys.modules if name.split(".")[0] == "capstan"]
assert not ours, ours
"""


def test_diffusers_alone_draws_the_image_that_we_draw(run: Callable[[str], Path], tmp_path: Path) -> None:
    wanted, ours = {}, {}
    for kind in KINDS:
        folder, prompt = str(tmp_path / kind), "a red square" if "text" in KINDS[kind] else None
        export(run(kind), folder)
        wanted[folder] = prompt
        drawers = [open_sampler(run(kind)), open_sampler(folder)]  # an export is opened here, too
        images = [drawer.draw([prompt or ""], [3]).arrays[0] for drawer in drawers]
        assert (images[0] == images[1]).all()
        ours[folder] = images[0] / 255
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-c", _ELSEWHERE, json.dumps(wanted)]
    out = warm_python.run(command, check=True, cwd=tmp_path, timeout=500, env=environment, stdout=warm_python.PIPE)
    named = out.stdout.decode().split()
    assert named == ["DDPMPipeline", "TextToPixelsPipeline", "TextToPixelsPipeline", "DDPMPipeline"]
    for folder, image in ours.items():
        assert np.abs(np.load(folder + ".npy") - image).max() <= 0.5 / 255 + 1e-3, folder  # ours is rounded to 8 bits


def test_a_product_starts_another_run(make: Make, run: Callable[[str], Path]) -> None:
    first = run("text")
    same = Path(fit(make("next", "text", init=str(first), lr=1e-12, steps=1, ema=None))["run"])
    before, after = weights(first), weights(same)
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, atol=1e-6, rtol=1e-5)
    with pytest.raises(RecipeError, match=r"^train\.init: .* has a different shape"):
        fit(make("other", "plain", init=str(first), steps=1))
