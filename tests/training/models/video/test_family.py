"""The family video: what starts from an image run and what is trained, images among clips, runs that resume."""

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
from moving_clips import FRAMES, SIDE
from safetensors.torch import load_file
from tiny_networks import shake
from tiny_runs import records

from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage import Storage
from capstan.training.config import TrainConfig
from capstan.training.data.dataset import TrainingData
from capstan.training.evaluate import evaluate
from capstan.training.export import export
from capstan.training.launch import train
from capstan.training.models.video.family import VideoFamily
from capstan.training.precomputed.latents import LatentsJob, plan, reader
from capstan.training.sample import open_sampler, sample
from capstan.training.trainer import fit

Make = Callable[..., Recipe]
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def opened(make: Make, run: Path) -> tuple[VideoFamily, TrainingData]:
    """A family whose modules are shaken, and its data."""
    recipe = make("opened")
    config = TrainConfig.from_recipe(recipe)
    torch.manual_seed(0)
    family = VideoFamily(config, run / "assets")
    shake(family.model)
    family.to(torch.device("cpu"))
    data = TrainingData(Dataset(Storage(recipe.dataset)), config.data, 0, layer=None, parts=VideoFamily.reads)
    return family, data


def given(family: VideoFamily, count: int) -> dict[str, Any]:
    """What the network is called with."""
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(count, 4, FRAMES, SIDE // 2, SIDE // 2, generator=generator)
    text = family.text(["a red circle moves left", "a blue square", "", "a"][:count])
    return {"noisy": noisy, "timesteps": torch.arange(100, 100 + count), "text": text}


def test_a_new_clip_model_draws_the_image_models_frames(make: Make, run: Path, image_run: Path) -> None:
    from diffusers import UNet2DConditionModel

    family = VideoFamily(TrainConfig.from_recipe(make("new")), run / "assets")
    family.model.eval()
    unet = UNet2DConditionModel.from_pretrained(image_run / "product/unet")
    call = given(family, 2)
    with torch.no_grad():
        made = family.model(**call, still=torch.zeros(2, dtype=torch.bool))
        for frame in range(FRAMES):
            one = unet(call["noisy"][:, :, frame], call["timesteps"], call["text"]["text_states"]).sample
            torch.testing.assert_close(made[:, :, frame], one, atol=1e-4, rtol=1e-3)


def test_frames_see_each_other_and_an_image_sees_none(opened: Any) -> None:
    family, _ = opened
    family.model.eval()
    call = given(family, 3)
    still = torch.tensor([False, True, False])
    with torch.no_grad():
        before = family.model(**call, still=still)
        changed = call["noisy"].clone()
        changed[:, :, -1] += 1
        after = family.model(**(call | {"noisy": changed}), still=still)
        texts = {name: states[1:2] for name, states in call["text"].items()}
        alone = family.model(call["noisy"][1:2], call["timesteps"][1:2], texts, torch.tensor([True]))
    assert (after[0, :, 0] - before[0, :, 0]).abs().max() > 1e-5
    assert torch.equal(after[1], before[1])
    assert (before[1] == before[1, :, :1]).all()
    torch.testing.assert_close(alone[0], before[1], atol=1e-5, rtol=1e-4)


def test_only_what_is_named_is_trained(make: Make, run: Path, image_run: Path) -> None:
    image, video = load_file(image_run / "product" / UNET), load_file(run / "product" / UNET)
    motion = {name for name in video if "motion_modules" in name}
    assert video.keys() - motion == image.keys()
    assert all(torch.equal(video[name], image[name]) for name in image)
    assert any(video[name].abs().max() > 0 for name in motion if "proj_out" in name)
    words = "text_encoder/model.safetensors"
    texts = [load_file(folder / "product" / words) for folder in (image_run, run)]
    assert any(not torch.equal(texts[0][name], texts[1][name]) for name in texts[0])
    alone = Path(fit(make("alone", 1))["run"])
    kept = load_file(alone / "product" / words)
    assert all(torch.equal(kept[name], texts[0][name]) for name in kept)
    every = load_file(Path(fit(make("every", 1, {"trained": ["motion", "image"]}))["run"]) / "product" / UNET)
    assert any(not torch.equal(every[name], image[name]) for name in image)


def test_an_image_counts_as_one_frame_in_the_loss(opened: Any) -> None:
    family, data = opened
    batch = family.prepare([data.sample(index) for index in range(4)])
    assert batch["still"].tolist() == [True, True, False, False]
    draws = (torch.Generator().manual_seed(1) for _ in range(2))
    with torch.no_grad():
        loss, metrics = family.loss(family.model, batch, next(draws))
        changed = {**batch, "pictures": batch["pictures"].clone()}
        changed["pictures"][:2, 1:] = 0
        other, _ = family.loss(family.model, changed, next(draws))
    assert float(loss) == float(other)
    assert metrics["loss_by_time"].values.shape == (4,)
    assert float(metrics["images"]) == 0.5


def test_latents_encoded_ahead_are_those_of_the_frames(make: Make, opened: Any) -> None:
    family, data = opened
    recipe = make("opened")
    config, dataset = TrainConfig.from_recipe(recipe), Dataset(Storage(recipe.dataset))
    job = LatentsJob(dataset, config, plan(config, dataset), recipe.resources)
    job.storage.write(f"{job.folder}/recipe.json", json.dumps(job.identity).encode())
    apply = job.model()
    for entry in dataset.manifest.shards:
        job.commit(unit := job.unit(entry), [apply(piece) for piece in job.prepare(unit)])
    latents = reader(job.storage, job.encoder)
    ahead = TrainingData(dataset, config.data, 0, layer=None, latents=latents, parts=VideoFamily.reads)
    samples = [ahead.sample(index) for index in range(4)]
    assert (samples[0].latent.dtype, samples[0].latent.shape) == (np.float16, (FRAMES, 8, SIDE // 2, SIDE // 2))
    assert not samples[2].parts
    frames, stored = (family.prepare(some) for some in ([data.sample(index) for index in range(4)], samples))
    assert torch.equal(frames["still"], stored["still"])
    draws = (torch.Generator().manual_seed(0) for _ in range(2))
    with torch.no_grad():
        first, second = (family.loss(family.model, batch, next(draws))[0] for batch in (frames, stored))
    assert float(first) == pytest.approx(float(second), rel=1e-3)


def test_a_killed_run_ends_as_one_that_was_not(make: Make, tmp_path: Path) -> None:
    assert_killed_run_ends_as_whole(
        lambda run, steps: make(run, steps, {"trained": ["motion", "text"]}), UNET, tmp_path
    )


def test_two_workers_and_two_parts_learn_what_one_learns(make: Make) -> None:
    one = Path(fit(make("one", ema=None))["run"])
    engine = {"strategy": "ddp", "threads": 1, "launcher": "local", "workers": 2}
    other = Path(train(make("two", ema=None, accumulate=2, engine=engine))["run"])
    for a, b in zip(records(one), records(other), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    ours, theirs = (load_file(folder / "product" / UNET) for folder in (one, other))
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"frames": 40}, "train.video: frames 40 are more than motion.positions 32"),
        ({"trained": ["text"]}, "train.video: trained lacks motion"),
        ({"objective": "ddpm"}, "train.video.objective: is ddpm, and the image run .* learnt flow"),
        ({"motion": {"heads": 3}}, "train.video.motion.heads: 3 does not divide the image model's 8 channels"),
        ({"sampling": {"sampler": "ddim"}}, "train.video: sampling.sampler ddim is not for objective flow"),
        ({"after": "/no/run"}, "train.video.after: no model at /no/run"),
        ({"size": 15}, "train.video.size: 15 pixels do not divide by 8"),
    ],
)
def test_a_wrong_setting_is_named(make: Make, settings: dict[str, Any], field: str) -> None:
    with pytest.raises(RecipeError, match=f"^{field}") as caught:
        fit(make(f"wrong-{next(iter(settings))}", 1, settings))
    assert caught.value.exit_code == 2


def test_the_command_ends_with_2_and_the_field(make: Make, tmp_path: Path) -> None:
    recipe = make("wrong", 1, {"frames": 40}).model_dump(mode="json")
    (path := tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "capstan", "train", str(path)]
    out = warm_python.run(command, env=environment, capture_output=True, text=True, check=False)
    assert out.returncode == 2, out.stderr
    assert "train.video" in out.stderr


def test_random_parts_have_no_latents_ahead(make: Make) -> None:
    with pytest.raises(RecipeError, match=r"^train\.video\.part: latents are precomputed"):
        TrainConfig.from_recipe(make("parts", 1, {"part": "random"}, data={"latents": "auto"}))


def test_a_first_stage_is_no_image_run(make: Make, image_run: Path) -> None:
    with pytest.raises(RecipeError, match=r"^train\.video\.after: .* is no pipeline; motion modules need"):
        fit(make("first-stage", 1, {"after": str(image_run.parent / "ae")}))


def test_a_product_starts_another_run(make: Make, run: Path) -> None:
    after = Path(fit(make("started", 1, ema=None, init=str(run), lr=1e-12))["run"])
    before = load_file(run / "product" / UNET)
    for name, weight in load_file(after / "product" / UNET).items():
        torch.testing.assert_close(weight, before[name], atol=1e-6, rtol=1e-5)


def test_drawn_clips_are_written_as_files_and_a_strip(run: Path, tmp_path: Path) -> None:
    import av
    from PIL import Image

    prompts = ["a red circle moves left.", "a blue square."]
    summary = sample(run, prompts, tmp_path / "out.png", seeds=[3, 4])
    assert (summary["pictures"], summary["frames"], summary["fps"]) == (2, FRAMES, 8.0)
    assert summary["size"] == [SIDE, SIDE]
    strip = Image.open(tmp_path / "out.png")
    assert strip.width > FRAMES * 100
    drawn = open_sampler(run).draw(prompts, [3, 4])
    for number in range(2):
        with av.open(summary["mp4"][number]) as file:
            shown = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
            assert float(file.streams.video[0].average_rate) == 8.0
        assert len(shown) == FRAMES
        small = np.stack(shown)[:, 8::16, 8::16].astype(int)
        assert np.abs(small - drawn.arrays[number]).mean() < 8
        gif = Image.open(summary["gif"][number])
        assert (gif.n_frames, gif.size) == (FRAMES, (256, 256))


def test_a_clip_depends_on_its_seed_alone(run: Path) -> None:
    drawer = open_sampler(run)
    one, two = (drawer.draw(["a red circle"] * n, [5, 6][:n], batch=2).arrays for n in (1, 2))
    assert one.shape == (1, FRAMES, SIDE, SIDE, 3)
    assert np.abs(one[0].astype(int) - two[0]).max() <= 1
    assert np.abs(two[0].astype(int) - two[1]).max() > 1


def test_evaluation_has_the_oracle_over_frames(run: Path) -> None:
    result = evaluate(run, count=4, batch=2)
    assert set(result["measures"]) == {"background", "colours", "count", "colour_shape", "motion", "steady"}
    for row in result["measures"].values():
        assert all(0 <= row[kind] <= 1 for kind in ("value", "chance", "ceiling"))
    assert (run / "evaluation.png").stat().st_size > 1000
    with pytest.raises(RecipeError, match=r"^--count: needs 5 samples"):
        evaluate(run, count=5)


def test_a_run_watches_its_clips(make: Make) -> None:
    watch = {"trackers": [], "samples": {"every": 1, "count": 2}}
    watch |= {"evaluate": {"every": 1, "count": 2, "measures": ["oracle"]}}
    watched = Path(fit(make("watched", 1, watch=watch))["run"])
    assert (watched / "samples/step-000001.png").is_file()
    (line,) = (watched / "evaluations.jsonl").read_text().splitlines()
    assert {"motion", "steady"} <= set(json.loads(line)["measures"])
    watch["evaluate"]["measures"] = ["layout"]
    with pytest.raises(RecipeError, match=r"^train\.watch\.evaluate\.measures: layout judges scenes, .* draws clips"):
        fit(make("layout", 1, watch=watch))


_ELSEWHERE = """
import sys
import numpy as np, torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
pipeline.set_progress_bar_config(disable=True)
generator = torch.Generator("cpu").manual_seed(3)
made = pipeline("a red circle moves left.", num_frames=6, num_inference_steps=2, guidance_scale=2.0, output_type="np",
                generator=generator).frames[0]
assert not [name for name in sys.modules if name.split(".")[0] == "capstan"]
np.save(sys.argv[2], made)
print(type(pipeline).__name__)
"""


def test_diffusers_alone_draws_the_clip_that_we_draw(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    assert export(run, folder)["pipeline"] == "AnimateDiffPipeline"
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": ""}
    command = [sys.executable, "-c", _ELSEWHERE, str(folder), str(tmp_path / "made.npy")]
    out = warm_python.run(
        command, check=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500
    )
    assert out.stdout.split() == ["AnimateDiffPipeline"]
    for place in (run, folder):  # an export is opened here, too
        ours = open_sampler(place).draw(["a red circle moves left."], [3]).arrays[0] / 255
        assert np.abs(np.load(tmp_path / "made.npy") - ours).max() <= 0.5 / 255 + 1e-3
