"""Imagen's cascade: stages that resume, that diffusers alone draws as we do, and what a stage that enlarges sees."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_towers
import torch
import warm_python
import yaml
from diffusers import DDPMScheduler
from safetensors.torch import load_file
from tiny_runs import records, wait_for_step

from capstan.cluster import cli
from capstan.pipeline.config import Recipe
from capstan.pipeline.errors import RecipeError
from capstan.training.config import TrainConfig
from capstan.training.evaluate import evaluate
from capstan.training.export import export
from capstan.training.models.imagen.noising import NoisedImages, shrunk
from capstan.training.models.pixels.process import PixelDdpm
from capstan.training.models.pixels.settings import PixelNoise
from capstan.training.sample import open_sampler
from capstan.training.trainer import fit

UNET = {"block_out_channels": [8, 16], "layers_per_block": 1, "head_channels": 4, "norm_num_groups": 4}
PROMPT = "A red square"

Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("imagen")


@pytest.fixture(scope="module")
def t5(root: Path) -> str:
    return tiny_towers.save_t5(root / "t5")


@pytest.fixture(scope="module")
def make(root: Path, squares: Path, t5: str) -> Make:
    """`make(run, {…}, key=value, …)`: a recipe of three steps: a base of 8 pixels, or what enlarges `after` to 16."""

    def recipe(run: str, imagen: dict[str, Any] | None = None, after: str | None = None, **section: Any) -> Recipe:
        stage: dict[str, Any] = {"text": t5, "size": 8}
        if after is not None:
            stage = {"enlarge": {"after": str(root / after), "most": 0.5}}
        settings = {"unet": UNET, "sampling": {"steps": 4, "guidance": 3.0}} | stage | (imagen or {})
        base = {"model": "imagen", "run": str(root / run), "steps": 3, "batch": 8, "lr": 1e-3, "log_every": 1}
        base |= {"ema": 0.5, "data": {"layer": None}, "engine": {"strategy": "ddp", "threads": 1, "launcher": "local"}}
        world = {"format": "world", "world": {"scenes": 10, "size": 16, "captions": "short"}}
        base |= {"watch": {"trackers": []}, "imagen": settings}
        return Recipe(dataset=str(squares), source=world, train=base | section)

    return recipe


@pytest.fixture(scope="module")
def cascade(make: Make) -> Path:
    """The run of a stage that enlarges, after its base."""
    fit(make("base"))
    return Path(fit(make("super", after="base"))["run"])


def test_a_cascade_draws_an_image_that_depends_on_its_seed_alone(cascade: Path) -> None:
    drawer = open_sampler(cascade)
    one, two = (drawer.draw([PROMPT] * n, [5, 6][:n], batch=2).arrays for n in (1, 2))
    assert one.shape == (1, 16, 16, 3)
    assert np.abs(one[0].astype(int) - two[0]).max() <= 1
    assert np.abs(two[0].astype(int) - two[1]).max() > 1
    assert open_sampler(cascade.with_name("base")).draw([PROMPT], [5]).arrays.shape == (1, 8, 8, 3)
    stages = drawer.settings(steps=3)["stages"]
    assert [(stage["steps"], stage["guidance"], "level" in stage) for stage in stages] == [
        (3, 3.0, False),
        (3, 3.0, True),
    ]


def test_the_level_of_noise_is_chosen_in_drawing(cascade: Path) -> None:
    drawer = open_sampler(cascade)
    drawn = {}
    for level in (0.0, 0.5):
        drawer.use_level(level)
        drawn[level] = drawer.draw([PROMPT], [5]).arrays.astype(int)
    assert np.abs(drawn[0.0] - drawn[0.5]).max() > 0
    with pytest.raises(RecipeError, match=r"^--level: this model enlarges no image"):
        open_sampler(cascade.with_name("base")).use_level(0.1)


def test_a_stage_sees_small_images_as_the_pipeline_shows_them() -> None:
    noising = NoisedImages(1.0)
    scheduler = NoisedImages.scheduler()
    torch.testing.assert_close(noising.alphas, scheduler.alphas_cumprod, rtol=1e-4, atol=1e-7)
    small = torch.rand(64, 3, 4, 4) * 2 - 1
    image, levels = noising.draw(small, 8, torch.Generator().manual_seed(0))
    assert image.shape == (64, 3, 8, 8)
    assert levels.min() < 200
    assert levels.max() > 800
    assert NoisedImages(0.0).draw(small, 8, torch.Generator())[1].max() == 0
    large = torch.nn.functional.interpolate(small, (8, 8), mode="bilinear", align_corners=True)
    kept = scheduler.alphas_cumprod[levels].sqrt().view(-1, 1, 1, 1)
    noise = (image - kept * large) / (1 - kept**2).sqrt()
    assert abs(float(noise.mean())) < 0.05
    assert abs(float(noise.std()) - 1) < 0.05


def test_small_images_are_means_of_areas() -> None:
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    means = images.float().unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    assert (shrunk(images, 4).float() - means).abs().max() <= 0.5


def test_dynamic_thresholding_divides_by_the_percentile() -> None:
    """Imagen's §2.3, and that the scheduler's own limit of 1, which would turn it off, is lifted."""
    noise = PixelNoise(schedule="cosine", prediction="sample")
    made = PixelDdpm(noise, sampler="ddpm", variance="fixed_small", threshold=0.9)
    scheduler: DDPMScheduler = made.scheduler()
    x0 = torch.linspace(-3, 3, 48).reshape(1, 3, 4, 4)
    limit = torch.quantile(x0.abs(), 0.9)
    torch.testing.assert_close(scheduler._threshold_sample(x0), x0.clamp(-limit, limit) / limit)
    static = PixelDdpm(noise, sampler="dpm++", variance="fixed_small").scheduler()
    torch.testing.assert_close(static._threshold_sample(x0), x0.clamp(-1, 1))


def weights(run: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_file(run / "product" / stage / "unet" / "diffusion_pytorch_model.safetensors")


def test_a_killed_run_ends_as_one_that_was_not(make: Make, cascade: Path, tmp_path: Path) -> None:
    every = {"checkpoint": {"every": 1, "keep": 1}}
    recipe = make("killed", after="base", steps=40, **every)
    (path := tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    worker = warm_python.Popen([sys.executable, "-m", "capstan.training.trainer", str(path)], env=environment)
    folder = Path(TrainConfig.from_recipe(recipe).run)
    wait_for_step(folder, 2)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    end = records(folder)[-1]["step"] + 3
    assert end < 40
    for name in ("killed", "whole"):
        fit(make(name, after="base", steps=end, **every))
    whole = folder.with_name("whole")
    assert records(folder) == records(whole)
    ours, theirs = weights(folder, "super"), weights(whole, "super")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("section", "after", "field"),
    [
        ({"text": None}, None, r"train\.imagen: names no text encoder; set text"),
        ({"text": "/no/t5"}, None, r"train\.imagen\.text: no text encoder at /no/t5"),
        ({"text": "./t5"}, "base", r"train\.imagen: a stage that enlarges uses the T5 before it"),
        ({"size": 9}, None, r"train\.imagen\.size: 9 pixels do not divide by 2"),
        ({"size": 8}, "base", r"train\.imagen\.size: is 8 pixels, and .* already draws 8"),
        ({"unet": {**UNET, "head_channels": 5}}, None, r"train\.imagen\.unet: .*does not divide by head_channels"),
        ({"sampling": {"level": 0.9}}, "base", r"train\.imagen: sampling\.level 0\.9 is above"),
        ({"sampling": {"threshold": 1.5}}, None, r"train\.imagen\.sampling\.threshold"),
        ({"sampling": {"sampler": "ddim"}}, None, r"train\.imagen\.sampling\.sampler"),
        ({"sampling": {"steps": 1001}}, None, r"train\.imagen\.sampling\.steps: .* use 1000 or fewer"),
        ({"variance": "learned", "sampling": {"sampler": "dpm++"}}, None, r"train\.imagen: .*sampler ddpm alone"),
        ({"noise": {"zero_terminal_snr": True}}, None, r"train\.imagen: noise\.zero_terminal_snr needs"),
        ({}, "nowhere", r"train\.imagen\.enlarge\.after: no model at"),
    ],
)
def test_a_wrong_setting_ends_with_exit_code_2(
    make: Make, cascade: Path, tmp_path: Path, section: dict[str, Any], after: str | None, field: str
) -> None:
    recipe = make("wrong", section, after)
    (path := tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    with pytest.raises(RecipeError, match=f"^{field}") as raised:
        fit(recipe)
    assert raised.value.exit_code == 2
    shutil.rmtree(cascade.with_name("wrong"), ignore_errors=True)
    if "no model" in field:  # found before a worker starts
        assert cli.run(["train", str(path)]) == 2


_ELSEWHERE = """
import sys
import numpy as np, torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
folder, prompt = sys.argv[1:]
base, larger = (DiffusionPipeline.from_pretrained(f"{folder}/{name}") for name in ("base", "super"))
print(type(base).__name__, type(larger).__name__)
generator = torch.Generator("cpu").manual_seed(3)
states = base.encode_prompt(prompt, clean_caption=False)
texts = dict(zip(("prompt_embeds", "negative_prompt_embeds"), states))
options = {"num_inference_steps": 4, "guidance_scale": 3.0, "generator": generator}
small = base(**texts, **options, output_type="pt").images
image = larger(**texts, **options, image=small, noise_level=200, output_type="np").images[0]
np.save(folder + ".npy", image)
ours = [name for name in sys.modules if name.split(".")[0] == "capstan"]
assert not ours, ours
"""


@pytest.mark.parametrize("variance", ["fixed_small", "learned"])
def test_diffusers_alone_draws_the_image_that_we_draw(make: Make, cascade: Path, tmp_path: Path, variance: str) -> None:
    run = cascade
    if variance == "learned":
        run = Path(fit(make("learned", {"variance": variance}, after="base"))["run"])
    folder = tmp_path / "exported"
    assert export(run, folder)["pipeline"] == "IFPipeline and IFSuperResolutionPipeline"
    ours = [open_sampler(path).draw([PROMPT], [3]).arrays[0] for path in (run, folder)]  # an export is opened here, too
    assert (ours[0] == ours[1]).all()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", _ELSEWHERE, str(folder), PROMPT]
    out = warm_python.run(command, check=True, cwd=tmp_path, timeout=500, env=environment, stdout=warm_python.PIPE)
    assert out.stdout.decode().split() == ["IFPipeline", "IFSuperResolutionPipeline"]
    theirs = np.load(f"{folder}.npy")
    assert np.abs(theirs - ours[0] / 255).max() <= 0.5 / 255 + 1e-3  # ours is rounded to 8 bits


def test_evaluation_compares_enlarging_with_bicubic(cascade: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(cascade, tmp_path / "run")
    result = evaluate(folder, count=4)
    row = result["measures"]["psnr"]
    assert row["chance"] > row["value"]  # after three steps
    assert {"colours", "colour_shape"} <= set(result["measures"])
    assert json.loads((folder / "evaluation.json").read_text())["sampling"]["stages"][1]["level"] == 0.2
    other = evaluate(folder, count=4, steps=2, guidance=1.0, level=0.0)
    assert other["measures"]["psnr"]["value"] != row["value"]
    assert other["sampling"]["stages"][1]["level"] == 0.0


def test_a_product_starts_another_run(make: Make, cascade: Path) -> None:
    same = Path(fit(make("next", after="base", init=str(cascade), lr=1e-12, steps=1, ema=None))["run"])
    before, after = weights(cascade, "super"), weights(same, "super")
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, atol=1e-6, rtol=1e-5)


def test_samplers_are_those_of_the_pipelines(cascade: Path) -> None:
    for name in ("ddpm", "dpm++"):
        assert open_sampler(cascade, sampler=name).draw([PROMPT], [0]).arrays.shape == (1, 16, 16, 3)
    with pytest.raises(RecipeError, match=r"^--sampler: .*Fix: use ddpm or dpm"):
        open_sampler(cascade, sampler="ddim")
