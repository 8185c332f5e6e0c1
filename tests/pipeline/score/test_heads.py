"""Heads over CLIP embeddings, in the layouts in which they are published."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from capstan.pipeline.config import HeadScore, Recipe
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.score import registry
from capstan.pipeline.score.clip_model import ClipModel
from capstan.pipeline.score.heads import Aesthetic, Nsfw, Watermark


@pytest.fixture(scope="module")
def model(clip: Path) -> ClipModel:
    return ClipModel(str(clip), None, "fp32", "score.clip")


@pytest.fixture(scope="module")
def batch() -> Any:
    raw = torch.randn(5, 16, generator=torch.Generator().manual_seed(3)) * 4
    return SimpleNamespace(raw_images=raw, images=nn.functional.normalize(raw, dim=-1))


def scored(head: Any, batch: Any) -> np.ndarray:
    head.setup("cpu")
    (values,) = head.score(batch).values()
    return np.asarray(values)


def test_laions_linear_aesthetic_head(model: ClipModel, batch: Any, linear_head: Path) -> None:
    layer = nn.Linear(16, 1)
    layer.load_state_dict(torch.load(linear_head, weights_only=True))
    found = scored(Aesthetic(HeadScore(weights=str(linear_head)), model), batch)
    np.testing.assert_allclose(found, layer(batch.images).detach()[:, 0], rtol=1e-5)


def test_laions_mlp_aesthetic_head(model: ClipModel, batch: Any, tmp_path: Path) -> None:
    """sac+logos+ava1-l14-linearMSE.pth: `layers` is a Sequential of linear layers with dropout between."""
    sizes = [16, 32, 12, 8, 4, 1]
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.Dropout(0.2)]
    mlp = nn.ModuleDict({"layers": nn.Sequential(*layers[:-3], layers[-2])}).eval()  # no dropout before the last
    torch.save(mlp.state_dict(), tmp_path / "mlp.pth")
    assert "layers.7.weight" in mlp.state_dict()
    found = scored(Aesthetic(HeadScore(weights=str(tmp_path / "mlp.pth")), model), batch)
    np.testing.assert_allclose(found, mlp["layers"](batch.images).detach()[:, 0], rtol=1e-4)


def test_nsfw_has_relu_between_its_layers(model: ClipModel, batch: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    mlp = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 1))
    save_file(mlp.state_dict(), tmp_path / "nsfw.safetensors")
    config = HeadScore(weights=str(tmp_path / "nsfw.safetensors"))
    found = scored(Nsfw(config, model), batch)
    np.testing.assert_allclose(found, mlp.eval()(batch.images).detach()[:, 0], rtol=1e-4)
    raw = scored(Nsfw(config.model_copy(update={"normalize": False}), model), batch)
    np.testing.assert_allclose(raw, mlp.eval()(batch.raw_images).detach()[:, 0], rtol=1e-4)


@pytest.mark.parametrize("outputs", [1, 2])
def test_watermark_is_a_probability(model: ClipModel, batch: Any, tmp_path: Path, outputs: int) -> None:
    layer = nn.Linear(16, outputs)
    torch.save({"state_dict": layer.state_dict()}, tmp_path / "head.pth")
    logits = layer(batch.images).detach()
    expected = logits.sigmoid()[:, 0] if outputs == 1 else logits.softmax(-1)[:, 1]
    found = scored(Watermark(HeadScore(weights=str(tmp_path / "head.pth")), model), batch)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_head_of_another_clip_is_refused_before_anything_is_fetched(clip: Path, tmp_path: Path) -> None:
    torch.save(nn.Linear(768, 1).state_dict(), tmp_path / "large.pth")
    score = {"clip": {"model": str(clip)}, "aesthetic": {"weights": str(tmp_path / "large.pth")}}
    with pytest.raises(RecipeError, match=r"score.aesthetic.weights: large.pth holds 1×768, not linear layers from 16"):
        registry.scorers(Recipe.model_validate({"dataset": str(tmp_path), "score": score}))


def test_no_code_in_a_weights_file_is_run(model: ClipModel, tmp_path: Path) -> None:
    torch.save(nn.Linear(16, 1), tmp_path / "model.pth")  # the module: a pickle of code
    with pytest.raises(RecipeError, match=r"score.nsfw.weights: cannot load .*model.pth"):
        Nsfw(HeadScore(weights=str(tmp_path / "model.pth")), model).setup("cpu")


def test_settings_and_weights_pin_a_head(model: ClipModel, linear_head: Path, tmp_path: Path) -> None:
    torch.save(nn.Linear(16, 1).state_dict(), tmp_path / "other.pth")
    (tmp_path / "copy.pth").write_bytes(linear_head.read_bytes())
    same = {Aesthetic(HeadScore(weights=str(file)), model).id for file in (linear_head, tmp_path / "copy.pth")}
    assert len(same) == 1
    others = [
        HeadScore(weights=str(tmp_path / "other.pth")),
        HeadScore(weights=str(linear_head), activation="relu"),
        HeadScore(weights=str(linear_head), normalize=False),
    ]
    assert len(same | {Aesthetic(config, model).id for config in others}) == 4
