"""Clips with their sound: both see each other, runs that resume, two workers as one, an export that opens elsewhere."""

from __future__ import annotations

import json
import os
import sys
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_networks as tiny
import torch
import warm_python
import yaml
from family_runs import assert_killed_run_ends_as_whole, made_elsewhere, small_run
from moving import shown
from moving_clips import FPS, FRAMES, SIDE, write_clips
from safetensors.torch import load_file
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
from capstan.training.models.audiovideo.family import AudiovideoFamily
from capstan.training.sample import open_sampler, sample
from capstan.training.trainer import fit

RATE = 1600
STAGE = {"encoder_hidden_size": 4, "decoder_channels": 4, "downsampling_ratios": [4, 10], "channel_multiples": [1, 2]}
PROMPT = "on a white background there is one thing: a red circle moves left."
WEIGHTS = "model.safetensors"

Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips with sound, an image run over their middle frames, and a place for runs."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("audiovideo")
    write_clips(root / "ds", [14, 10], rate=RATE)
    vae = tiny.save_autoencoder(root / "ds", root / "ae")
    settings = tiny.NETWORKS["sd"] | {"text": tiny.OWN | {"length": 48}, "autoencoder": vae}
    tiny.save_product(tiny.family_of(root / "ds", root / "assets", settings), root / "image")
    return root


@pytest.fixture(scope="module")
def make(root: Path) -> Make:
    def recipe(run: str, steps: int = 3, model: str = "audiovideo", train: Any = None, **settings: Any) -> Recipe:
        section = small_run(model, root / run, steps) | {"batch": 4, "data": {"layer": None, "holdout": 4}}
        own: dict[str, Any] = {"after": str(root / "image"), "autoencoder": str(root / "stage"), "frames": FRAMES}
        own |= {"motion": {"heads": 2}, "coupling": {"width": 16, "layers": 2, "heads": 2, "patch": 4}}
        own |= {"sampling": {"steps": 2, "guidance": 2.0}}
        section[model] = {"oobleck": STAGE, "audiovideo": own}[model] | settings
        source = {"path": "clips.tar", "parts": ["mp4", "flac"]}
        return Recipe(dataset=str(root / "ds"), source=source, train=section | (train or {}))

    return recipe


@pytest.fixture(scope="module")
def stage(make: Make) -> Path:
    return Path(fit(make("stage", 2, "oobleck"))["run"])


@pytest.fixture(scope="module")
def run(make: Make, stage: Path) -> Path:
    return Path(fit(make("run"))["run"])


@pytest.fixture
def opened(make: Make, run: Path) -> tuple[AudiovideoFamily, TrainingData]:
    """A family whose model is shaken, and its data."""
    recipe = make("opened")
    config = TrainConfig.from_recipe(recipe)
    torch.manual_seed(0)
    family = AudiovideoFamily(config, run / "assets")
    tiny.shake(family.model)
    family.to(torch.device("cpu"))
    data = TrainingData(Dataset(Storage(recipe.dataset)), config.data, 0, layer=None, parts=AudiovideoFamily.reads)
    return family, data


def noisy(family: AudiovideoFamily, count: int = 2) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    video = torch.randn(count, 4, FRAMES, SIDE // 2, SIDE // 2, generator=draw)
    sound = torch.randn(count, 2, family.form.values // 40, generator=draw)
    return [video, sound, torch.full((count,), 0.5), family.text.ids([PROMPT] * count)["ids"]]


def test_a_new_model_draws_the_image_models_frames_and_no_sound(make: Make, run: Path, root: Path) -> None:
    from diffusers import UNet2DConditionModel

    family = AudiovideoFamily(TrainConfig.from_recipe(make("new")), run / "assets")
    family.model.eval()
    unet = UNet2DConditionModel.from_pretrained(root / "image/product/unet")
    video, sound, times, ids = noisy(family)
    with torch.no_grad():
        seen, heard = family.model(video, sound, times, ids)
        text = family.text({PROMPT: 0, PROMPT + " ": 1})["text_states"][:1].expand(2, -1, -1)
        for frame in range(FRAMES):
            one = unet(video[:, :, frame], times * 1000, text).sample
            torch.testing.assert_close(seen[:, :, frame], one, atol=1e-4, rtol=1e-3)
    assert heard.abs().max() == 0


def test_frames_hear_the_sound_and_the_sound_sees_the_frames(opened: Any) -> None:
    family, _ = opened
    family.model.eval()
    video, sound, times, ids = noisy(family)
    with torch.no_grad():
        seen, heard = family.model(video, sound, times, ids)
        other_sound = sound.clone()
        other_sound[0, :, -1] += 1
        other_video = video.clone()
        other_video[0, :, -1] += 1
        seen_then, _ = family.model(video, other_sound, times, ids)
        _, heard_then = family.model(other_video, sound, times, ids)
    assert (seen_then[0, :, 0] - seen[0, :, 0]).abs().max() > 1e-6
    assert (heard_then[0, :, 0] - heard[0, :, 0]).abs().max() > 1e-6
    torch.testing.assert_close(seen_then[1], seen[1])
    torch.testing.assert_close(heard_then[1], heard[1])


def test_the_sound_is_the_same_clips_from_the_same_time_on(make: Make, run: Path, opened: Any) -> None:
    _, data = opened
    two = AudiovideoFamily(TrainConfig.from_recipe(make("two-frames", frames=2)), run / "assets")
    two.form = type(two.form)(RATE, 1, 400)
    whole, part = (family.prepare([data.sample(0)]) for family in (opened[0], two))
    assert torch.equal(part["frames"][0], whole["frames"][0, 2:4])  # the middle of six frames
    assert torch.equal(part["sounds"][0], whole["sounds"][0, 2 * RATE // FPS :][:400])
    assert whole["sounds"].abs().max() > 1000


def test_both_losses_are_those_of_straight_paths(opened: Any) -> None:
    family, data = opened
    batch = family.prepare([data.sample(index) for index in range(3)])

    def still(video: torch.Tensor, sound: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros_like(video), torch.zeros_like(sound)

    model = family.model
    found = type("Still", (torch.nn.Module,), {"forward": staticmethod(still)})()
    found.weight = next(model.parameters())
    loss, metrics = family.loss(found, batch, torch.Generator().manual_seed(0))
    assert float(loss) == pytest.approx(float(metrics["frames"]) + float(metrics["sound"]), rel=1e-5)
    assert 1.5 < float(metrics["sound"]) < 2.5  # noise and latents have a mean square of 1 each


def test_a_killed_run_ends_as_one_that_was_not(make: Make, stage: Path, tmp_path: Path) -> None:
    assert_killed_run_ends_as_whole(make, WEIGHTS, tmp_path)


def test_two_workers_and_two_parts_learn_what_one_learns(make: Make, stage: Path) -> None:
    one = Path(fit(make("one", train={"ema": None}))["run"])
    engine = {"strategy": "ddp", "threads": 1, "launcher": "local", "workers": 2}
    other = Path(train(make("two", train={"ema": None, "accumulate": 2, "engine": engine}))["run"])
    for a, b in zip(records(one), records(other), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    ours, theirs = (load_file(folder / "product" / WEIGHTS) for folder in (one, other))
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, atol=2e-4, rtol=1e-3)


def test_drawn_films_are_files_that_play_and_sound(run: Path, tmp_path: Path) -> None:
    summary = sample(run, [PROMPT, "a blue square"], tmp_path / "film.png")
    assert (summary["frames"], summary["fps"], summary["rate"]) == (FRAMES, FPS, RATE)
    assert len(shown(Path(summary["mp4"][0]).read_bytes())) == FRAMES
    with wave.open(summary["wav"][1]) as file:
        assert (file.getframerate(), file.getnframes()) == (RATE, 1200)
    import av

    with av.open(summary["mp4"][0]) as film:
        assert film.streams.audio[0].codec_context.name == "aac"
        assert float(film.streams.audio[0].duration * film.streams.audio[0].time_base) == pytest.approx(0.75, abs=0.03)
    assert Path(summary["gif"][0]).exists()
    alone = open_sampler(run).draw(["a blue square"], [1])
    both = open_sampler(run).draw([PROMPT, "a blue square"], [0, 1])
    assert np.abs(alone.arrays[0].astype(int) - both.arrays[1]).max() <= 1
    np.testing.assert_allclose(alone.sounds[0], both.sounds[1], atol=1e-5)


def test_an_evaluation_compares_with_other_sounds(run: Path) -> None:
    result = evaluate(run, count=4)
    assert result["oracle"]["colours"] > 0.9
    for name in ("colours", "pitch", "sounds", "in_order", "in_time", "steady"):
        assert set(result["measures"][name]) == {"value", "chance", "ceiling"}
    assert (run / "evaluation.png").stat().st_size > 1000


def test_the_export_opens_without_capstan(run: Path, tmp_path: Path) -> None:
    assert export(run, tmp_path / "export")["pipeline"] == "AudioVideoModel"
    files = {file.name for file in (tmp_path / "export").iterdir()}
    assert {"modeling_audiovideo.py", "config.json", WEIGHTS, "tokenizer.json"} <= files
    code = f"made = model.generate([{PROMPT!r}], seeds=[3]); made = np.concatenate([x.flatten() for x in made])"
    elsewhere = made_elsewhere(code, tmp_path / "export", tmp_path)
    ours = open_sampler(run).draw([PROMPT], [3])
    frames = ours.arrays[0].size
    assert np.abs(elsewhere[:frames].reshape(ours.arrays[0].shape) - ours.arrays[0].astype(float)).max() <= 1
    np.testing.assert_allclose(elsewhere[frames:].reshape(ours.sounds[0].shape), ours.sounds[0], atol=1e-5)
    again = open_sampler(tmp_path / "export").draw([PROMPT], [3])
    assert np.array_equal(again.arrays, ours.arrays)


def test_training_starts_from_another_run(make: Make, run: Path) -> None:
    before = load_file(run / "product" / WEIGHTS)
    after = load_file(Path(fit(make("more", 1, train={"init": str(run), "lr": 1e-12}))["run"]) / "product" / WEIGHTS)
    assert all(torch.allclose(after[name], before[name], atol=1e-6) for name in before)
    wide = {"width": 32, "layers": 2, "heads": 2, "patch": 4}
    with pytest.raises(RecipeError, match=r"^train\.init: .* has a different shape"):
        fit(make("wide", 1, train={"init": str(run)}, coupling=wide))


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"frames": 40}, "train.audiovideo: frames 40 are more than motion.positions 32"),
        ({"coupling": {"width": 16, "heads": 3}}, "train.audiovideo.coupling: width 16 does not divide by heads 3"),
        ({"coupling": {"width": 16, "heads": 2, "patch": 1}}, "train.audiovideo.coupling.patch: 1 is no multiple of 2"),
        ({"motion": {"heads": 3}}, "train.audiovideo.motion.heads: 3 does not divide the image model's 8 channels"),
        ({"after": "/no/run"}, "train.audiovideo.after: no model at /no/run"),
        ({"autoencoder": "/no/run"}, "train.audiovideo.autoencoder: no model at /no/run"),
        ({"size": 15}, "train.audiovideo.size: 15 pixels do not divide by 8"),
    ],
)
def test_a_wrong_setting_is_named(make: Make, stage: Path, settings: dict[str, Any], field: str) -> None:
    with pytest.raises(RecipeError, match=f"^{field}") as caught:
        fit(make(f"wrong-{next(iter(settings))}", 1, **settings))
    assert caught.value.exit_code == 2


def test_the_command_ends_with_2_and_the_field(make: Make, tmp_path: Path) -> None:
    recipe = make("wrong", 1, frames=40).model_dump(mode="json")
    (path := tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "capstan", "train", str(path)]
    out = warm_python.run(command, env=environment, capture_output=True, text=True, check=False)
    assert out.returncode == 2, out.stderr
    assert "train.audiovideo" in out.stderr


def test_clips_without_sound_are_named(make: Make, stage: Path, tmp_path: Path) -> None:
    write_clips(tmp_path / "silent", [6])
    recipe = make("silent", 1).model_copy(update={"dataset": str(tmp_path / "silent")})
    with pytest.raises(Exception, match=r"flac"):
        fit(recipe)
    assert json.loads((tmp_path / "silent/dataset.json").read_text())
