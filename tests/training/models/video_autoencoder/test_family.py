"""A first stage of clips: it sees no later frame, leaves for diffusers alone, resumes, and learns as one worker."""

from __future__ import annotations

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
from causal_clips import FRAMES, STAGE, recipe
from family_runs import assert_killed_run_ends_as_whole
from moving_clips import SIDE, frames_of, scene, write_clips
from safetensors.torch import load_file
from tiny_runs import records

from capstan.cluster import cli
from capstan.pipeline.config import Recipe
from capstan.pipeline.errors import RecipeError
from capstan.training.config import TrainConfig
from capstan.training.evaluate import evaluate
from capstan.training.export import export
from capstan.training.launch import train
from capstan.training.models.video_autoencoder.config import VideoAutoencoderSettings, fits
from capstan.training.models.video_autoencoder.encoder import load_video_autoencoder
from capstan.training.models.video_autoencoder.family import VideoAutoencoderFamily
from capstan.training.models.video_autoencoder.model import build, reconstruct, standardise
from capstan.training.trainer import fit

Make = Callable[..., Recipe]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 clips and four images."""
    root = tmp_path_factory.mktemp("stage")
    write_clips(root / "ds", [14, 14], images=2)
    return root


@pytest.fixture(scope="module")
def make(root: Path) -> Make:
    def made(run: str, steps: int = 2, settings: dict[str, Any] | None = None, **section: Any) -> Recipe:
        return recipe(root / "ds", root / run, "video_autoencoder", steps, STAGE | (settings or {}), **section)

    return made


@pytest.fixture(scope="module")
def run(make: Make) -> Path:
    return Path(fit(make("run"))["run"])


def small() -> Any:
    torch.manual_seed(0)
    return build(VideoAutoencoderSettings(**STAGE).shape(), SIDE, -3.0).eval()


def test_latents_see_no_later_frame_and_an_image_is_a_first_frame() -> None:
    """The group normalisation sees all frames: its statistics are held still here."""
    vae = small()
    for module in vae.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda x: x  # type: ignore[method-assign]
    clip = torch.randn(1, 3, FRAMES, SIDE, SIDE)
    later = clip.clone()
    later[:, :, 3:] += 1
    with torch.no_grad():
        whole, changed, image = (vae.encode(x).latent_dist.mean for x in (clip, later, clip[:, :, :1]))
    assert whole.shape == (1, 2, 3, 8, 8)
    torch.testing.assert_close(changed[:, :, :2], whole[:, :, :2])
    assert (changed[:, :, 2] - whole[:, :, 2]).abs().max() > 1e-3
    torch.testing.assert_close(image[:, :, 0], whole[:, :, 0])


def test_only_lengths_that_come_back_whole_are_allowed() -> None:
    for frames in range(1, 18):
        vae = small()
        with torch.no_grad():
            made = vae.decode(vae.encode(torch.zeros(1, 3, frames, SIDE, SIDE)).latent_dist.mean).sample
        if fits(frames, 2):
            assert made.shape[2] == frames
    assert [frames for frames in range(1, 18) if fits(frames, 2)] == [1, 5, 9, 13, 17]


def test_latents_have_a_mean_square_of_one_and_clips_are_unchanged() -> None:
    vae, clips = small(), np.stack([frames_of(scene(index), SIDE)[:FRAMES] for index in range(6)])
    before = reconstruct(vae, clips, 4)
    signed = torch.from_numpy(clips).permute(0, 4, 1, 2, 3) / 127.5 - 1
    scale = standardise(vae, signed)
    assert (scale - 1).abs().max() > 0.05
    with torch.no_grad():
        posterior = vae.encode(signed).latent_dist
    squares = (posterior.mean.square() + posterior.var).mean((0, 2, 3, 4))
    torch.testing.assert_close(squares, torch.ones(2), atol=1e-3, rtol=1e-3)
    assert np.abs(reconstruct(vae, clips, 4).astype(int) - before).max() <= 1


def test_an_image_counts_as_one_frame_in_the_loss(make: Make, run: Path) -> None:
    family = VideoAutoencoderFamily(TrainConfig.from_recipe(make("loss")), run / "assets")
    clips = torch.randint(0, 255, (2, FRAMES, 3, SIDE, SIDE), dtype=torch.uint8)
    batch = {"clips": clips, "frames": torch.tensor([1, FRAMES])}
    changed = {**batch, "clips": clips.clone()}
    changed["clips"][0, 1:] = 0
    with torch.no_grad():
        one, other = (family.loss(family.model, some, torch.Generator().manual_seed(1)) for some in (batch, changed))
        alone = family.loss(family.model, {"clips": clips[:1], "frames": torch.tensor([1])}, torch.Generator())
    assert float(one[0]) == float(other[0])
    assert 0 < float(alone[1]["reconstruction"]) < 2


def test_a_killed_run_ends_as_one_that_was_not(make: Make, tmp_path: Path) -> None:
    assert_killed_run_ends_as_whole(make, WEIGHTS, tmp_path)


def test_two_workers_and_two_parts_learn_what_one_learns(make: Make) -> None:
    one = Path(fit(make("one", ema=None))["run"])
    engine = {"strategy": "ddp", "threads": 1, "launcher": "local", "workers": 2}
    other = Path(train(make("two", ema=None, accumulate=2, engine=engine))["run"])
    for a, b in zip(records(one), records(other), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    ours, theirs = (load_file(folder / "product" / WEIGHTS) for folder in (one, other))
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"frames": 6}, "train.video_autoencoder: frames 6 are not a multiple of 4, and one more; use e.g. 5"),
        ({"time_ratio": 8}, "train.video_autoencoder: time_ratio 8 needs more levels"),
        ({"norm_num_groups": 3}, "train.video_autoencoder: block_out_channels 4 does not divide by norm_num_groups"),
        ({"size": 15}, "train.video_autoencoder.size: 15 pixels do not divide by 2"),
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


def test_a_product_starts_another_run_and_other_folders_are_refused(make: Make, run: Path) -> None:
    after = Path(fit(make("started", 1, ema=None, init=str(run), lr=1e-12))["run"])
    assert load_video_autoencoder(str(after), "x").config.temporal_compression_ratio == 2
    with pytest.raises(RecipeError, match=r"^x: no model at"):
        load_video_autoencoder(str(run.parent / "none"), "x")


def test_evaluation_has_the_oracle_over_decoded_frames(run: Path) -> None:
    measures = evaluate(run, count=4, batch=2)["measures"]
    assert {"psnr", "background", "motion"} <= set(measures)
    assert measures["psnr"]["value"] > 0
    assert (run / "evaluation.png").stat().st_size > 1000


_ELSEWHERE = """
import sys
import numpy as np, torch
from diffusers import AutoencoderKLCogVideoX
torch.set_num_threads(1)
vae = AutoencoderKLCogVideoX.from_pretrained(sys.argv[1])
clips = torch.from_numpy(np.load(sys.argv[2])).permute(0, 4, 1, 2, 3) / 127.5 - 1
with torch.no_grad():
    made = vae.decode(vae.encode(clips).latent_dist.mean).sample
assert not [name for name in sys.modules if name.split(".")[0] == "capstan"]
np.save(sys.argv[3], made.permute(0, 2, 3, 4, 1).numpy())
"""


def test_diffusers_alone_decodes_the_clip_that_we_decode(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "export")
    clips = np.stack([frames_of(scene(index), SIDE)[:FRAMES] for index in range(2)])
    np.save(tmp_path / "clips.npy", clips)
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": ""}
    files = [tmp_path / name for name in ("export", "clips.npy", "made.npy")]
    command = [sys.executable, "-c", _ELSEWHERE, *map(str, files)]
    warm_python.run(command, check=True, cwd=tmp_path, env=environment, timeout=500)
    theirs = ((np.load(tmp_path / "made.npy").clip(-1, 1) + 1) * 127.5).round()
    ours = VideoAutoencoderFamily.codec(run / "product", torch.device("cpu")).reconstruct(clips, 2)
    assert np.abs(theirs - ours).max() <= 1
