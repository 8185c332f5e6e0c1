"""Sounds from captions: runs that resume, two workers as one, and an export that diffusers alone draws as we do."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sounding
import torch
import warm_python
from family_runs import assert_killed_run_ends_as_whole, small_run
from safetensors.torch import load_file

from capstan.cluster import cli
from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage import Storage
from capstan.training.config import TrainConfig
from capstan.training.data.dataset import TrainingData
from capstan.training.encode import encode
from capstan.training.evaluate import evaluate
from capstan.training.export import export
from capstan.training.launch import train
from capstan.training.models.audio.config import SoundSampling
from capstan.training.models.audio.family import AudioFamily
from capstan.training.models.audio.model import noised, scheduler_of
from capstan.training.models.oobleck.config import OobleckSettings
from capstan.training.models.oobleck.family import OobleckFamily, load_oobleck
from capstan.training.models.oobleck.model import build, reconstruct, spectral_difference, standardise
from capstan.training.precomputed.latents import LatentsJob, plan, reader
from capstan.training.sample import open_sampler, sample
from capstan.training.trainer import fit

STAGE = {"rate": 1000, "encoder_hidden_size": 4, "decoder_channels": 4, "downsampling_ratios": [4, 10]}
STAGE |= {"channel_multiples": [1, 2], "fft_sizes": [64, 16]}
AUDIO: dict[str, Any] = {"seconds": 1, "longest": 8, "sampling": {"steps": 3, "guidance": 2.0}}
AUDIO |= {"transformer": {"layers": 1, "heads": 2, "head_width": 8, "condition_width": 16, "time_width": 8}}
AUDIO |= {"text": {"length": 12, "width": 16, "layers": 1, "heads": 2}}
PROMPT = "the sound of a red circle"

Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("audio")
    sounding.write_sounds(root / "ds", [20, 12])
    return root


@pytest.fixture(scope="module")
def make(root: Path) -> Make:
    def recipe(run: str, steps: int = 2, model: str = "audio", **settings: Any) -> Recipe:
        section = small_run(model, root / run, steps) | {"data": {"layer": None, "holdout": 4}}
        own = {"oobleck": STAGE, "audio": AUDIO | {"autoencoder": str(root / "stage")}}[model]
        section[model] = own | settings
        return Recipe(dataset=str(root / "ds"), source={"path": "clips", "parts": ["flac"]}, train=section)

    return recipe


@pytest.fixture(scope="module")
def stage(make: Make) -> Path:
    return Path(fit(make("stage", model="oobleck"))["run"])


@pytest.fixture(scope="module")
def run(make: Make, stage: Path) -> Path:
    return Path(fit(make("run"))["run"])


def test_a_killed_first_stage_ends_as_one_that_was_not(make: Make, tmp_path: Path) -> None:
    def stages(run: str, steps: int) -> Recipe:
        return make(f"stages/{run}", steps, "oobleck")

    assert_killed_run_ends_as_whole(stages, "diffusion_pytorch_model.safetensors", tmp_path)


def test_a_killed_run_ends_as_one_that_was_not(make: Make, stage: Path, tmp_path: Path) -> None:
    assert_killed_run_ends_as_whole(make, "transformer/diffusion_pytorch_model.safetensors", tmp_path)


def test_a_first_stage_trained_on_pieces_is_measured_on_whole_sounds(make: Make) -> None:
    run = Path(fit(make("pieces", 1, "oobleck", seconds=0.3))["run"])
    codec = OobleckFamily.codec(run / "product", torch.device("cpu"))
    assert (codec.values, codec.rate) == (2000, 1000)  # two seconds
    measures = evaluate(run, count=4)["measures"]
    assert {"snr", "pitch", "count"} <= set(measures)


def test_latents_have_a_mean_square_of_one_and_sounds_are_unchanged(stage: Path) -> None:
    torch.manual_seed(0)
    vae = build(OobleckSettings(**STAGE).shape(), channels=1, rate=1000)
    sounds = torch.randn(6, 1, 400) / 4
    before = reconstruct(vae, sounds, 4)
    scale = standardise(vae, sounds)
    assert (scale - 1).abs().max() > 0.05
    assert (vae.encode(sounds).latent_dist.mean.square().mean((0, 2)) - 1).abs().max() < 1e-4
    assert (reconstruct(vae, sounds, 4) - before).abs().max() < 1e-4
    loaded = load_oobleck(str(stage), "x")
    assert loaded.config.sampling_rate == 1000


def test_a_signal_passes_new_weights() -> None:
    """With torch's own it is a hundred times weaker after the encoder, and nothing is learnt for hundreds of steps."""
    torch.manual_seed(0)
    shape = {"encoder_hidden_size": 16, "downsampling_ratios": [4, 10], "channel_multiples": [1, 2]}
    vae = build(shape | {"decoder_channels": 16, "decoder_input_channels": 8}, channels=1, rate=2000)
    sounds = torch.sin(torch.arange(2000) * 0.7).view(1, 1, -1)
    posterior = vae.encode(sounds).latent_dist
    assert posterior.mean.std() > 0.1
    assert posterior.std.mean() < 0.05


def test_spectra_differ_where_pitches_do() -> None:
    time = torch.arange(4000) / 4000
    tone, late, other = (
        torch.sin(2 * torch.pi * f * (time + t)).view(1, 1, -1) for f, t in ((440, 0), (440, 0.3), (500, 0))
    )
    assert spectral_difference(tone, tone, [256, 64]) == 0
    assert spectral_difference(late, tone, [256, 64]) < spectral_difference(other, tone, [256, 64])


def test_the_scheduler_undoes_the_noise_of_training() -> None:
    sampling = SoundSampling(sigma_min=0.1, sigma_max=50)
    latents = torch.randn(32, 2, 5)
    task = noised(latents, sampling, torch.Generator().manual_seed(1))
    scheduler = scheduler_of(sampling)
    sigma = (4 * task.levels).exp()
    assert sigma.min() >= 0.1 - 1e-4
    assert sigma.max() <= 50 * 1.01
    for row in range(4):
        sample_ = task.noisy[row] * (1 + sigma[row] ** 2).sqrt()
        torch.testing.assert_close(scheduler.precondition_inputs(sample_, sigma[row]), task.noisy[row])
        torch.testing.assert_close(scheduler.precondition_noise(sigma[row]), task.levels[row])
        found = scheduler.precondition_outputs(sample_, task.target[row], sigma[row])
        torch.testing.assert_close(found, latents[row], rtol=1e-3, atol=1e-3)


def test_two_workers_and_two_parts_learn_what_one_learns(make: Make, stage: Path) -> None:
    def trained(run: str, fit: Callable[[Recipe], Any], **section: Any) -> dict[str, torch.Tensor]:
        recipe = make(run)
        made = fit(recipe.model_copy(update={"train": recipe.train | section}))
        return load_file(Path(made["run"]) / "product" / "transformer" / "diffusion_pytorch_model.safetensors")

    engine = {"strategy": "ddp", "threads": 1, "launcher": "local", "workers": 2}
    one = trained("one", fit, ema=None)
    two = trained("two", train, ema=None, accumulate=2, engine=engine)
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4


def test_a_sound_depends_on_its_seed_alone_and_is_written_as_wav(run: Path, tmp_path: Path) -> None:
    drawer = open_sampler(run)
    one, two = (drawer.draw([PROMPT] * n, [5, 6][:n], batch=2) for n in (1, 2))
    assert one.arrays.shape == (1, 1000, 1)
    assert one.rate == 1000
    assert np.abs(one.arrays[0] - two.arrays[0]).max() < 1e-4
    assert np.abs(two.arrays[0] - two.arrays[1]).max() > 1e-4
    summary = sample(run, [PROMPT], tmp_path / "sound.png", seeds=[5, 6])
    assert summary["wav"] == [str(tmp_path / f"sound-{number}.wav") for number in range(2)]
    assert (tmp_path / "sound.png").stat().st_size > 500
    assert (tmp_path / "sound-1.wav").stat().st_size == 44 + 2 * 1000
    with pytest.raises(RecipeError, match=r"^--size"):
        drawer.draw([PROMPT], [5], size=(8, 8))


ELSEWHERE = """
import sys, numpy as np, torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
assert type(pipeline).__name__ == "StableAudioPipeline"
generator = torch.Generator("cpu").manual_seed(5)
made = pipeline(sys.argv[2], num_inference_steps=3, guidance_scale=2.0, generator=generator, output_type="np").audios
assert not [name for name in sys.modules if name.split(".")[0] == "capstan"]
np.save(sys.argv[3], made)
"""


def test_diffusers_alone_draws_the_export_as_we_do(run: Path, tmp_path: Path) -> None:
    assert export(run, tmp_path / "export")["pipeline"] == "StableAudioPipeline"
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": ""}
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "export"), PROMPT, str(tmp_path / "made.npy")]
    warm_python.run(command, check=True, cwd=tmp_path, env=environment, timeout=500)
    ours = open_sampler(run).draw([PROMPT], [5]).arrays
    theirs = np.load(tmp_path / "made.npy").transpose(0, 2, 1)
    assert np.abs(ours - theirs.clip(-1, 1)).max() < 1e-4


def test_runs_are_judged_by_the_oracle(run: Path, stage: Path) -> None:
    measures = evaluate(run, count=4)["measures"]
    assert set(measures) == {"pitch", "pitch_rhythm", "count", "in_order"}
    assert all(0 <= row[kind] <= 1 for row in measures.values() for kind in ("value", "chance", "ceiling"))
    assert (run / "evaluation.png").is_file()
    first = evaluate(stage, count=4)["measures"]
    assert {"snr", "pitch", "in_order"} <= set(first)


@pytest.mark.parametrize(
    ("model", "setting", "said"),
    [
        ("oobleck", {"downsampling_ratios": [4, 5]}, "train.oobleck: downsampling_ratios 5 is odd"),
        ("oobleck", {"channel_multiples": [1]}, "train.oobleck: channel_multiples must have one number for each"),
        ("audio", {"seconds": 9}, "train.audio: seconds 9 is more than longest"),
        ("audio", {"text": {"width": 15, "heads": 2}}, "train.audio.text: width 15 does not divide by heads"),
        ("audio", {"autoencoder": "./none"}, "train.audio.autoencoder: no model at none"),
    ],
)
def test_a_wrong_setting_ends_with_its_field(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, setting: dict[str, Any], said: str
) -> None:
    import yaml

    recipe = make("wrong", model=model, **setting).model_dump(mode="json")
    recipe["train"]["run"] = str(tmp_path / "run")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert cli.run(["train", str(tmp_path / "recipe.yaml")]) == 2
    assert said in capsys.readouterr().err


def test_sounds_encoded_ahead_are_those_of_the_files(make: Make, stage: Path, tmp_path: Path) -> None:
    recipe = make("ahead")
    config, dataset = TrainConfig.from_recipe(recipe), Dataset(Storage(recipe.dataset))
    job = LatentsJob(dataset, config, plan(config, dataset), recipe.resources)
    assert not {"size", "buckets"} & set(job.identity)
    job.storage.write(f"{job.folder}/recipe.json", json.dumps(job.identity).encode())
    apply = job.model()
    for entry in dataset.manifest.shards:
        job.commit(unit := job.unit(entry), [apply(piece) for piece in job.prepare(unit)])
    data = TrainingData(dataset, config.data, 0, layer=None, parts=AudioFamily.reads)
    latents = reader(job.storage, job.encoder)
    ahead = TrainingData(dataset, config.data, 0, layer=None, latents=latents, parts=AudioFamily.reads)
    (assets := tmp_path / "assets").mkdir()
    AudioFamily.make_assets(config, data, assets)
    family = AudioFamily(config, assets)
    read, stored = (family.prepare([some.sample(index) for index in range(4)]) for some in (data, ahead))
    torch.testing.assert_close(read["seconds"], stored["seconds"], atol=1e-3, rtol=0)
    with torch.no_grad():
        draws = (torch.Generator().manual_seed(0) for _ in range(2))
        first, second = (family.loss(family.model, batch, next(draws))[0] for batch in (read, stored))
    assert float(first) == pytest.approx(float(second), rel=1e-2)


@pytest.mark.parametrize(
    ("setting", "said"), [({"part": "random"}, r"^train\.audio\.part"), ({"seconds": None}, "seconds")]
)
def test_sounds_of_no_fixed_start_or_length_have_no_latents_ahead(
    make: Make, stage: Path, setting: dict[str, Any], said: str
) -> None:
    recipe = make("wrong", **setting)
    with pytest.raises(RecipeError, match=said):  # `capstan encode`, whose id is then set
        encode(recipe)
    recipe = recipe.model_copy(update={"train": recipe.train | {"data": {"layer": None, "latents": "auto"}}})
    with pytest.raises(RecipeError, match=said):
        TrainConfig.from_recipe(recipe)


def test_sounds_of_one_latent_have_none_ahead(make: Make, stage: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"^train\.audio\.seconds: 0\.04 s are less than 2 latents .*set 0\.08 or more"
    ):
        encode(make("short", seconds=0.04))
