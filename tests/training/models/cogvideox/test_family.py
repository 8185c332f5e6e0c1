"""Sora's form: images as clips of one frame, clips of several lengths, runs that resume, clips that leave."""

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
from causal_clips import FRAMES, STAGE, TEXT, TRANSFORMER, recipe
from family_runs import assert_killed_run_ends_as_whole
from moving_clips import SIDE, write_clips
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
from capstan.training.models.audio.text import ids_of
from capstan.training.models.cogvideox.family import CogvideoxFamily
from capstan.training.precomputed.latents import LatentsJob, plan, reader
from capstan.training.sample import open_sampler, sample
from capstan.training.trainer import fit

Make = Callable[..., Recipe]
NET = "transformer/diffusion_pytorch_model.safetensors"
PROMPT = "a red circle moves left."


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 clips and four images, and a first stage of them."""
    root = tmp_path_factory.mktemp("sora")
    torch.set_num_threads(1)
    write_clips(root / "ds", [14, 14], images=2)
    fit(recipe(root / "ds", root / "stage", "video_autoencoder", 1, STAGE))
    return root


@pytest.fixture(scope="module")
def make(root: Path) -> Make:
    def made(run: str, steps: int = 2, settings: dict[str, Any] | None = None, **section: Any) -> Recipe:
        own = {"autoencoder": str(root / "stage"), "frames": FRAMES, "transformer": TRANSFORMER, "text": TEXT}
        own |= {"sampling": {"steps": 2, "guidance": 2.0}} | (settings or {})
        return recipe(root / "ds", root / run, "cogvideox", steps, own, **section)

    return made


@pytest.fixture(scope="module")
def run(make: Make) -> Path:
    torch.set_num_threads(1)
    return Path(fit(make("run"))["run"])


@pytest.fixture
def opened(make: Make, run: Path) -> tuple[CogvideoxFamily, TrainingData]:
    """A family whose modules are shaken, and its data."""
    config = TrainConfig.from_recipe(make("opened"))
    torch.manual_seed(0)
    family = CogvideoxFamily(config, run / "assets")
    shake(family.model)
    family.to(torch.device("cpu"))
    family.model.eval()
    dataset = Dataset(Storage(make("opened").dataset))
    return family, TrainingData(dataset, config.data, 0, layer=None, parts=CogvideoxFamily.reads)


def test_all_patches_see_each_other_but_not_those_that_are_not_there(opened: Any) -> None:
    family, _ = opened
    noisy, times = torch.randn(3, 3, 2, 8, 8), torch.tensor([10, 20, 30])
    text = {"ids": torch.ones(3, TEXT["length"], dtype=torch.int64)}
    counts = torch.tensor([3, 1, 3])
    changed = noisy.clone()
    changed[:, -1] += 1
    with torch.no_grad():
        before, after = (family.model(x, times, text, counts) for x in (noisy, changed))
        alone = family.model(noisy[1:2, :1], times[1:2], {"ids": text["ids"][1:2]}, counts[1:2])
        other = family.model(noisy, times, {"ids": text["ids"] + 3}, counts)
    assert (after[0, 0] - before[0, 0]).abs().max() > 1e-5
    assert torch.equal(after[1], before[1])
    assert not before[1, 1:].any()
    torch.testing.assert_close(alone[0, 0], before[1, 0], atol=1e-5, rtol=1e-4)
    assert (other - before).abs().max() > 1e-5


def test_the_pipeline_calls_the_network_with_what_training_does(opened: Any, tmp_path: Path) -> None:
    """Tensor by tensor: the states of the empty caption and of the prompt, without a mask; times; what is predicted."""
    family, _ = opened
    family.save(family.model, tmp_path)
    drawer, seen = CogvideoxFamily.open(tmp_path, torch.device("cpu")), []
    net = drawer.pipeline.transformer
    net.register_forward_hook(lambda _, args, kwargs, made: seen.append((kwargs, made[0])), with_kwargs=True)
    drawer.draw([PROMPT], [3])
    ids = torch.cat([family.empty, ids_of(family.tokenizer, [PROMPT])["ids"]])
    task = family.process.draw(torch.zeros(64, 1), torch.Generator().manual_seed(0))
    assert seen
    for kwargs, made in seen:
        noisy, times = kwargs["hidden_states"], kwargs["timestep"]
        assert noisy.shape == (2, 3, 2, 8, 8)
        assert times.dtype == task.timesteps.dtype
        with torch.no_grad():
            states = family.model.text_encoder(ids)[0]
            ours = family.model(noisy, times, {"ids": ids}, torch.tensor([3, 3]))
        torch.testing.assert_close(kwargs["encoder_hidden_states"], states, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours, made, atol=1e-5, rtol=1e-4)


def test_clips_are_seen_with_the_most_frames_that_they_have(make: Make, run: Path, opened: Any) -> None:
    _, data = opened
    family = CogvideoxFamily(TrainConfig.from_recipe(make("lengths", 1, {"frames": [5, 9]})), run / "assets")
    batch = family.prepare([data.sample(index) for index in range(4)])
    assert batch["frames"].tolist() == [1, 1, 3, 3]  # two images; no clip has nine frames
    assert batch["clips"].shape[:2] == (4, 9)
    draws = (torch.Generator().manual_seed(1) for _ in range(2))
    changed = {**batch, "clips": batch["clips"].clone()}
    changed["clips"][:2, 1:] = 9
    changed["clips"][2:, 5:] = 9
    with torch.no_grad():
        one, other = (family.loss(family.model, some, next(draws)) for some in (batch, changed))
    assert float(one[0]) == float(other[0])
    assert float(one[1]["images"]) == 0.5


def test_latents_encoded_ahead_are_those_of_the_clips(make: Make, opened: Any) -> None:
    family, data = opened
    chosen = make("opened")
    config, dataset = TrainConfig.from_recipe(chosen), Dataset(Storage(chosen.dataset))
    job = LatentsJob(dataset, config, plan(config, dataset), chosen.resources)
    job.storage.write(f"{job.folder}/recipe.json", json.dumps(job.identity).encode())
    apply = job.model()
    for entry in dataset.manifest.shards:
        job.commit(unit := job.unit(entry), [apply(piece) for piece in job.prepare(unit)])
    latents = reader(job.storage, job.encoder)
    ahead = TrainingData(dataset, config.data, 0, layer=None, latents=latents, parts=CogvideoxFamily.reads)
    clips, stored = (family.prepare([some.sample(index) for index in range(4)]) for some in (data, ahead))
    assert torch.equal(clips["frames"], stored["frames"])
    draws = (torch.Generator().manual_seed(0) for _ in range(2))
    with torch.no_grad():
        first, second = (family.loss(family.model, batch, next(draws))[0] for batch in (clips, stored))
    assert float(first) == pytest.approx(float(second), rel=1e-2)


def test_buckets_of_other_shapes_and_v_prediction_train(make: Make) -> None:
    buckets = {"buckets": {"sizes": [[16, 16], [16, 24]]}}
    settings = {"objective": "ddpm", "sampling": {"steps": 2, "guidance": 1.0}, "frames": [5]}
    made = Path(fit(make("buckets", 1, settings, data=buckets))["run"])
    assert records(made)[0]["loss"] > 0
    drawn = open_sampler(made).draw([PROMPT], [1], size=(24, 16))
    assert drawn.arrays.shape == (1, FRAMES, 16, 24, 3)


def test_a_killed_run_ends_as_one_that_was_not(make: Make, tmp_path: Path) -> None:
    assert_killed_run_ends_as_whole(make, NET, tmp_path)


def test_two_workers_and_two_parts_learn_what_one_learns(make: Make) -> None:
    one = Path(fit(make("one", ema=None))["run"])
    engine = {"strategy": "ddp", "threads": 1, "launcher": "local", "workers": 2}
    other = Path(train(make("two", ema=None, accumulate=2, engine=engine))["run"])
    for a, b in zip(records(one), records(other), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    ours, theirs = (load_file(folder / "product" / NET) for folder in (one, other))
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, atol=2e-4, rtol=1e-3)


def test_a_product_starts_another_run(make: Make, run: Path) -> None:
    after = Path(fit(make("started", 1, ema=None, init=str(run / "product"), lr=1e-12))["run"])
    before = load_file(run / "product" / NET)
    for name, weight in load_file(after / "product" / NET).items():
        torch.testing.assert_close(weight, before[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"frames": [5, 6]},
            "train.cogvideox.frames: 6 are not a multiple of 4, and one more, as the autoencoder needs",
        ),
        ({"autoencoder": "./none"}, "train.cogvideox.autoencoder: no model at none"),
        ({"transformer": {"heads": 1, "head_width": 8}}, "train.cogvideox.transformer: heads × head_width is 8"),
        ({"sampling": {"sampler": "ddim"}}, "train.cogvideox: sampling.sampler ddim is not for objective flow"),
        ({"size": 15}, "train.cogvideox.size: 15 pixels do not divide by 8"),
    ],
)
def test_a_wrong_setting_ends_with_2_and_its_field(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], said: str
) -> None:
    wrong = make("wrong", 1, settings).model_dump(mode="json")
    wrong["train"]["run"] = str(tmp_path / "run")
    wrong["train"]["engine"]["launcher"] = "local"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(wrong))
    assert cli.run(["train", str(tmp_path / "recipe.yaml")]) == 2
    assert said in capsys.readouterr().err


def test_random_parts_have_no_latents_ahead(make: Make) -> None:
    with pytest.raises(RecipeError, match=r"^train\.cogvideox\.part: latents are precomputed"):
        TrainConfig.from_recipe(make("parts", 1, {"part": "random"}, data={"latents": "auto"}))


def test_evaluation_and_files(run: Path, tmp_path: Path) -> None:
    result = evaluate(run, count=4, batch=2)
    assert set(result["measures"]) == {"background", "colours", "count", "colour_shape", "motion", "steady"}
    summary = sample(run, [PROMPT], tmp_path / "out.png", seeds=[3])
    assert (summary["frames"], summary["fps"], summary["size"]) == (FRAMES, 8.0, [SIDE, SIDE])
    assert Path(summary["mp4"][0]).stat().st_size > 100


def test_a_clip_depends_on_its_seed_alone(run: Path) -> None:
    drawer = open_sampler(run)
    one, two = (drawer.draw([PROMPT] * n, [5, 6][:n], batch=2).arrays for n in (1, 2))
    assert one.shape == (1, FRAMES, SIDE, SIDE, 3)
    assert np.abs(one[0].astype(int) - two[0]).max() <= 1
    assert np.abs(two[0].astype(int) - two[1]).max() > 1


_ELSEWHERE = """
import sys
import numpy as np, torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
length = pipeline.transformer.config.max_text_seq_length
made = pipeline(sys.argv[2], num_inference_steps=2, guidance_scale=2.0, max_sequence_length=length,
                generator=[torch.Generator("cpu").manual_seed(3)], output_type="np").frames[0]
assert not [name for name in sys.modules if name.split(".")[0] == "capstan"]
np.save(sys.argv[3], made)
print(type(pipeline).__name__)
"""


def test_diffusers_alone_draws_the_clip_that_we_draw(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    assert export(run, folder)["pipeline"] == "CogVideoXPipeline"
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": ""}
    command = [sys.executable, "-c", _ELSEWHERE, str(folder), PROMPT, str(tmp_path / "made.npy")]
    out = warm_python.run(
        command, check=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500
    )
    assert out.stdout.split() == ["CogVideoXPipeline"]
    for place in (run, folder):
        ours = open_sampler(place).draw([PROMPT], [3]).arrays[0] / 255
        assert np.abs(np.load(tmp_path / "made.npy") - ours).max() <= 0.5 / 255 + 1e-3
