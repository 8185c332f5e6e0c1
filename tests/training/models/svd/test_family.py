"""The family svd: what starts from an image run, what the pipeline computes, runs that resume, clips that leave."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm_python
import yaml
from family_runs import assert_killed_run_ends_as_whole
from moving_clips import FRAMES, SIDE, frames_of, scene
from PIL import Image
from safetensors.torch import load_file
from tiny_networks import shake
from tiny_runs import records

from capstan.cluster import cli
from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage import Storage
from capstan.training.config import TrainConfig
from capstan.training.data.dataset import TrainingData
from capstan.training.evaluate import evaluate
from capstan.training.export import export
from capstan.training.launch import train
from capstan.training.models.svd.conditions import buckets_of, motion_of
from capstan.training.models.svd.config import ClipSampling, LogNormal
from capstan.training.models.svd.family import SvdFamily
from capstan.training.models.svd.noise import noised, scheduler_of
from capstan.training.sample import open_sampler, sample
from capstan.training.trainer import fit

Make = Callable[..., Recipe]
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def opened(make: Make, run: Path) -> tuple[SvdFamily, TrainingData]:
    """A family whose modules are shaken, and its data."""
    recipe = make("opened")
    config = TrainConfig.from_recipe(recipe)
    torch.manual_seed(0)
    family = SvdFamily(config, run / "assets")
    shake(family.model)
    family.to(torch.device("cpu"))
    family.model.eval()
    data = TrainingData(Dataset(Storage(recipe.dataset)), config.data, 0, layer=None, parts=SvdFamily.reads)
    return family, data


def image_of(index: int) -> Image.Image:
    return Image.fromarray(frames_of(scene(index), SIDE)[0])


def test_a_new_model_denoises_frames_as_the_image_model_does(make: Make, run: Path, image_run: Path) -> None:
    """But for the conditions, which the image model does not have: their last layer is set to zero here."""
    from diffusers import UNet2DConditionModel

    family = SvdFamily(TrainConfig.from_recipe(make("new")), run / "assets")
    unet = family.model.unet.eval()
    for weight in unet.add_embedding.linear_2.parameters():
        weight.data.zero_()
    image = UNet2DConditionModel.from_pretrained(image_run / "product/unet")
    noisy, states = torch.randn(2, FRAMES, 4, 8, 8), torch.randn(2, 1, 16)
    levels, numbers = torch.tensor([0.3, -0.5]), torch.ones(2, 3)
    with torch.no_grad():
        whole = torch.cat([noisy, torch.randn_like(noisy)], dim=2)
        made = unet(whole, levels, encoder_hidden_states=states, added_time_ids=numbers).sample
        for frame in range(FRAMES):
            one = image(noisy[:, frame], levels, states).sample
            torch.testing.assert_close(made[:, frame], one, atol=1e-4, rtol=1e-3)
    assert family.describe()["from_the_image_run"] == sum(weight.numel() for weight in image.parameters())


def test_the_scheduler_undoes_the_noise_of_training() -> None:
    latents = torch.randn(16, 3, 4, 2, 2)
    task = noised(latents, LogNormal(mean=0.0, std=1.0), torch.Generator().manual_seed(1))
    scheduler = scheduler_of(ClipSampling(sigma_min=0.05, sigma_max=30))
    for row in range(4):
        sigma = (4 * task.levels[row]).exp()
        scheduler.set_timesteps(2)
        scheduler.sigmas = torch.tensor([float(sigma), 0.0])
        scheduler.timesteps = 0.25 * scheduler.sigmas[:1].log()
        step = scheduler.timesteps[0]
        torch.testing.assert_close(step, task.levels[row])
        noisy = task.noisy[row] * (sigma.square() + 1).sqrt()  # x0 + σ ε
        torch.testing.assert_close(scheduler.scale_model_input(noisy, step), task.noisy[row])
        found = scheduler.step(task.target[row], step, noisy).prev_sample
        torch.testing.assert_close(found, latents[row], rtol=1e-3, atol=1e-3)


def test_the_pipeline_calls_the_network_with_what_training_does(opened: Any, tmp_path: Path) -> None:
    """Tensor by tensor: the image's latents with noise, its embedding, the three numbers, zeros without the image."""
    family, _ = opened
    family.save(family.model, tmp_path)
    drawer = SvdFamily.open(tmp_path, torch.device("cpu"))
    pipeline, seen = drawer.pipeline, []
    pipeline.unet.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    picture, level = image_of(0), 0.1
    made = pipeline(
        picture, SIDE, SIDE, num_inference_steps=1, fps=8, motion_bucket_id=90, noise_aug_strength=level,
        generator=torch.Generator().manual_seed(3), output_type="latent",
    ).frames  # fmt: skip
    (whole, step), kwargs = seen[0]
    assert made.shape == (1, FRAMES, 4, 8, 8)

    ours: dict[str, Any] = {}
    family.model.unet.register_forward_pre_hook(
        lambda _, args, kwargs: ours.update(args=args, **kwargs), with_kwargs=True
    )
    first = torch.from_numpy(np.asarray(picture).transpose(2, 0, 1).copy())[None].float() / 127.5 - 1
    noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        image = family.vae.encode(first + level * noise).latent_dist.mode()
        from capstan.training.models.svd.conditions import for_clip

        given = for_clip(first, family.processor).expand(2, -1, -1, -1)
        numbers = torch.tensor([[8.0 - 1, 90, level]] * 2)
        dropped = torch.tensor([True, False])  # the pipeline's order
        noisy = whole[:, :, :4]
        family.model(noisy, step.expand(2), image.expand(2, -1, -1, -1), given, numbers, dropped)
    torch.testing.assert_close(ours["args"][0], whole, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours["encoder_hidden_states"], kwargs["encoder_hidden_states"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours["added_time_ids"], kwargs["added_time_ids"])
    sigma = family.train.sampling.sigma_max
    assert float(step) == pytest.approx(0.25 * np.log(sigma), rel=1e-4)


def test_a_dropped_image_is_not_seen_and_frames_see_each_other(opened: Any) -> None:
    family, _ = opened
    noisy, levels, numbers = torch.randn(2, FRAMES, 4, 8, 8), torch.zeros(2), torch.ones(2, 3)
    call: dict[str, Any] = {"image": torch.randn(2, 4, 8, 8), "given": torch.randn(2, 3, 224, 224), "numbers": numbers}
    dropped = torch.tensor([True, False])
    with torch.no_grad():
        before = family.model(noisy, levels, **call, dropped=dropped)
        other = family.model(noisy, levels, **call | {"image": call["image"] + 1}, dropped=dropped)
        seen = family.model(noisy, levels, **call | {"given": call["given"] + 1}, dropped=dropped)
        changed = noisy.clone()
        changed[:, -1] += 1
        after = family.model(changed, levels, **call, dropped=dropped)
    for one in (other, seen):
        assert torch.equal(one[0], before[0])
        assert (one[1] - before[1]).abs().max() > 1e-5
    assert (after[:, 0] - before[:, 0]).abs().max() > 1e-5


def test_faster_clips_are_in_higher_buckets(opened: Any) -> None:
    family, data = opened
    still = np.repeat(frames_of(scene(0), 32)[:1], FRAMES, 0)
    clip = np.zeros((FRAMES, 32, 32, 3), np.uint8)
    slow, fast = clip.copy(), clip.copy()
    for frame in range(FRAMES):
        slow[frame, 10:20, 4 + frame : 12 + frame] = 255
        fast[frame, 10:20, 4 + 3 * frame : 12 + 3 * frame] = 255
    moved = [motion_of(one, 8.0) for one in (still, slow, fast)]
    assert moved[0] < 1e-3
    assert moved[0] < moved[1] < moved[2]
    assert buckets_of([0, 5, 10, 50], 10) == [0, 128, 255, 255]
    numbers = family.prepare([data.sample(index) for index in range(6)])["numbers"]
    assert (numbers[:, 0] == 8).all()
    assert len(numbers[:, 1].unique()) > 2


def test_a_killed_run_ends_as_one_that_was_not(make: Make, tmp_path: Path) -> None:
    assert_killed_run_ends_as_whole(make, UNET, tmp_path)


def test_two_workers_and_two_parts_learn_what_one_learns(make: Make) -> None:
    one = Path(fit(make("one", ema=None))["run"])
    engine = {"strategy": "ddp", "threads": 1, "launcher": "local", "workers": 2}
    other = Path(train(make("two", ema=None, accumulate=2, engine=engine))["run"])
    for a, b in zip(records(one), records(other), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    ours, theirs = (load_file(folder / "product" / UNET) for folder in (one, other))
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, atol=2e-4, rtol=1e-3)


def test_a_product_starts_another_run(make: Make, run: Path) -> None:
    after = Path(fit(make("started", 1, ema=None, init=str(run), lr=1e-12))["run"])
    before = load_file(run / "product" / UNET)
    for name, weight in load_file(after / "product" / UNET).items():
        torch.testing.assert_close(weight, before[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"frames": 1}, "train.svd.frames"),
        ({"image_encoder": {"width": 15, "heads": 2}}, "train.svd.image_encoder: width 15 does not divide by heads"),
        (
            {"sampling": {"first_guidance": 4, "guidance": 3}},
            "train.svd.sampling: first_guidance 4 is more than guidance",
        ),
        ({"size": 15}, "train.svd.size: 15 pixels do not divide by 8"),
        ({"after": "/no/run"}, "train.svd.after: no model at /no/run"),
        ({"image_encoder": {"pretrained": "/no/clip"}}, "train.svd.image_encoder.pretrained: /no/clip is no CLIP"),
    ],
)
def test_a_wrong_setting_ends_with_2_and_its_field(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], said: str
) -> None:
    recipe = make("wrong", 1, settings).model_dump(mode="json")
    recipe["train"]["run"] = str(tmp_path / "run")
    recipe["train"]["engine"]["launcher"] = "local"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert cli.run(["train", str(tmp_path / "recipe.yaml")]) == 2
    assert said in capsys.readouterr().err


def test_an_image_run_with_other_groups_is_refused(make: Make, image_run: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(image_run, tmp_path / "run")
    config = tmp_path / "run/product/unet/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"norm_num_groups": 16}))
    with pytest.raises(RecipeError, match=r"^train\.svd\.after: normalises in 16 groups, .* in 32"):
        fit(make("groups", 1, {"after": str(tmp_path / "run")}))


def test_sample_continues_an_image_and_says_what_is_missing(run: Path, tmp_path: Path) -> None:
    image_of(0).resize((40, 30)).save(tmp_path / "first.png")
    picture = tmp_path / "first.png"
    summary = sample(run, [], tmp_path / "out.png", images=[picture], seeds=[3, 4], motion=200, level=0.1)
    assert (summary["pictures"], summary["frames"], summary["fps"]) == (2, FRAMES, 8.0)
    assert all(Path(file).stat().st_size > 100 for file in summary["mp4"] + summary["gif"])
    for arguments, said in (
        ({}, r"^--image: is missing: this model continues images"),
        ({"images": [tmp_path / "none.png"]}, r"^--image: cannot read .*none\.png"),
        ({"images": [picture, picture], "seeds": [1]}, r"^--seed: 1 seeds for 2 images"),
        ({"images": [picture], "negative": "red"}, r"^--negative: this model has no such setting"),
    ):
        with pytest.raises(RecipeError, match=said):
            sample(run, [], tmp_path / "x.png", **arguments)
    with pytest.raises(RecipeError, match=r"^-p: this model takes no prompts"):
        sample(run, ["a red circle"], tmp_path / "x.png", images=[picture])


def test_other_models_continue_no_image(image_run: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^--image: this model continues no image"):
        sample(image_run, ["a red circle"], tmp_path / "x.png", images=[tmp_path / "first.png"])
    with pytest.raises(RecipeError, match=r"^--motion: this model has no such setting"):
        sample(image_run, ["a red circle"], tmp_path / "x.png", motion=3)


def test_a_clip_depends_on_its_seed_and_its_motion_alone(opened: Any, tmp_path: Path) -> None:
    family, _ = opened
    family.save(family.model, tmp_path)
    drawer, images = open_sampler(tmp_path), np.stack([np.asarray(image_of(0))] * 2)
    one, two = (drawer.draw([""] * n, [5, 6][:n], batch=2, first_frames=images[:n]).arrays for n in (1, 2))
    assert one.shape == (1, FRAMES, SIDE, SIDE, 3)
    assert np.abs(one[0].astype(int) - two[0]).max() <= 1
    assert np.abs(two[0].astype(int) - two[1]).max() > 1
    drawer.use_motion(250)
    assert np.abs(drawer.draw([""], [5], first_frames=images[:1]).arrays[0].astype(int) - one[0]).max() > 0


def test_evaluation_measures_what_is_continued(run: Path) -> None:
    result = evaluate(run, count=4, batch=4)
    assert set(result["measures"]) == {"first_frame", "last_colours", "moved"}
    assert result["sampling"] == {"steps": 2, "guidance": 2.0, "motion": 127, "level": 0.02}
    assert (run / "evaluation.png").stat().st_size > 1000
    with pytest.raises(RecipeError, match=r"^--measures: oracle compares images with prompts"):
        evaluate(run, count=4, measures=["oracle"])


def test_a_run_watches_the_clips_that_it_continues(make: Make) -> None:
    watched = Path(fit(make("watched", 1, watch={"trackers": [], "samples": {"every": 1, "count": 2}}))["run"])
    assert (watched / "samples/step-000001.png").stat().st_size > 1000


_ELSEWHERE = """
import sys
import numpy as np, torch
from PIL import Image
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
made = pipeline(Image.open(sys.argv[2]), 16, 16, num_inference_steps=2, max_guidance_scale=2.0, fps=8,
                generator=[torch.Generator("cpu").manual_seed(3)], output_type="np").frames[0]
assert not [name for name in sys.modules if name.split(".")[0] == "capstan"]
np.save(sys.argv[3], made)
print(type(pipeline).__name__)
"""


def test_diffusers_alone_draws_the_clip_that_we_draw(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    assert export(run, folder)["pipeline"] == "StableVideoDiffusionPipeline"
    image_of(0).save(tmp_path / "first.png")
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": ""}
    command = [sys.executable, "-c", _ELSEWHERE, *map(str, (folder, tmp_path / "first.png", tmp_path / "made.npy"))]
    out = warm_python.run(
        command, check=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500
    )
    assert out.stdout.split() == ["StableVideoDiffusionPipeline"]
    for place in (run, folder):
        ours = open_sampler(place).draw([""], [3], first_frames=np.asarray(image_of(0))[None]).arrays[0] / 255
        assert np.abs(np.load(tmp_path / "made.npy") - ours).max() <= 0.5 / 255 + 1e-3
