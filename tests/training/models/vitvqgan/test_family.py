"""The family vitvqgan: transformers, codes of length 1, runs that resume, and exports that open elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_runs import assert_killed_run_ends_as_whole, made_elsewhere, small_run
from tiny_runs import records

from capstan.pipeline.config import Recipe, WorldSource
from capstan.pipeline.errors import RecipeError
from capstan.training.config import TrainConfig
from capstan.training.evaluate import evaluate
from capstan.training.export import export
from capstan.training.models.own_model import load_own
from capstan.training.models.vitvqgan.family import VitVqgan, VitvqganFamily
from capstan.training.models.vitvqgan.modeling_vitvqgan import ViTVQConfig, ViTVQModel
from capstan.training.models.vqgan.model import nearest
from capstan.training.product import family_of
from capstan.training.trainer import fit

TOWER = {"width": 16, "layers": 1, "heads": 2}
SMALL = {"patch_size": 4, "encoder": TOWER, "decoder": TOWER, "codes": 16, "code_channels": 4}

Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def make(squares: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    root = tmp_path_factory.mktemp("vitvqgan")

    def recipe(run: str, steps: int = 4, vitvqgan: dict[str, Any] | None = None, **section: Any) -> Recipe:
        base = small_run("vitvqgan", root / run, steps)
        settings = {"discriminator": {"start": 1, "channels": 4, "layers": 1}} | SMALL | (vitvqgan or {})
        return Recipe(dataset=str(squares), train=base | {"vitvqgan": settings} | section)

    return recipe


@pytest.fixture(scope="module")
def run(make: Make) -> Path:
    return Path(fit(make("run"))["run"])


@pytest.fixture
def model() -> ViTVQModel:
    torch.manual_seed(0)
    tower = TOWER | {"mlp": 4.0}
    config = ViTVQConfig(
        image_size=16, patch_size=4, encoder=tower, decoder=tower, num_vq_embeddings=16, latent_channels=4
    )
    return ViTVQModel(config).eval()


def test_latents_and_codes_have_length_one_and_the_nearest_has_the_largest_cosine(model: ViTVQModel) -> None:
    latents = model.encode(torch.randn(3, 3, 16, 16)).latents
    assert latents.shape == (3, 4, 4, 4)
    torch.testing.assert_close(latents.norm(dim=1), torch.ones(3, 4, 4))
    torch.testing.assert_close(model.codebook.norm(dim=1), torch.ones(16))
    with torch.no_grad():
        model.codes.weight[3] *= 7  # its length says nothing
    assert torch.equal(model.nearest(latents), nearest(latents, model.codebook))


def test_a_patch_is_decoded_where_it_was(model: ViTVQModel) -> None:
    """With the tokens alone, without blocks, each code paints its own patch."""
    model.decoder = torch.nn.Identity()
    indices = torch.zeros(1, 4, 4, dtype=torch.long)
    before = model.images(indices)
    indices[0, 1, 2] = 5
    changed = (model.images(indices) - before).abs().sum((0, 1)) > 0
    assert changed[4:8, 8:12].all()
    assert changed.sum() == 16


def test_images_codes_and_images_agree_with_what_training_sees(model: ViTVQModel) -> None:
    images = torch.randn(2, 3, 16, 16)
    made = VitVqgan(model)(images)
    torch.testing.assert_close(made.images, model(images))
    torch.testing.assert_close(model.decode(made.latents).sample, made.images)
    assert torch.equal(made.indices, model.tokens(images))
    made.images.sum().backward()
    assert model.patches.weight.grad.abs().max() > 0  # the gradient passes through the choice …
    assert model.codes.weight.grad is None or model.codes.weight.grad.abs().max() == 0  # … and moves no code


def test_it_learns(make: Make) -> None:
    log = records(Path(fit(make("learns", 40, {"discriminator": None}, lr=3e-3, warmup=5))["run"]))
    assert log[-1]["psnr"] > log[0]["psnr"] + 3
    assert log[-1]["perplexity"] > 2


def test_a_killed_run_ends_as_one_that_was_not(make: Make, tmp_path: Path) -> None:
    assert_killed_run_ends_as_whole(make, "model.safetensors", tmp_path)


def test_the_export_encodes_and_decodes_without_capstan(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    assert export(run, folder)["pipeline"] == "ViTVQModel"
    assert [path.name for path in folder.glob("*.py")] == ["modeling_vitvqgan.py"]
    code = (
        "images = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)\n"
        "with torch.no_grad(): made = model.images(model.tokens(images)).numpy()"
    )
    made = made_elsewhere(code, folder, tmp_path)
    for path in (run, folder):  # an export is opened here, too
        model = load_own(ViTVQModel, path, "RUN")
        with torch.no_grad():
            ours = model(torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)).numpy()
        np.testing.assert_allclose(made, ours, atol=1e-5)


def test_it_is_measured_by_psnr_and_by_its_codes(run: Path) -> None:
    assert family_of(run / "product") is VitvqganFamily
    result = evaluate(run, count=6, world=WorldSource(scenes=10, size=16))
    assert result["kind"] == "vitvqgan"
    assert {"psnr", "perplexity", "codes_used", "colour_shape"} <= set(result["measures"])
    assert result["measures"]["codes_used"]["chance"] == pytest.approx(1 / 16, abs=1e-4)


def test_a_product_starts_another_run(make: Make, run: Path) -> None:
    before = load_own(ViTVQModel, run, "RUN").state_dict()
    for name, section in {"init": {"init": str(run)}, "pretrained": {"vitvqgan": {"pretrained": str(run)}}}.items():
        after = fit(make(name, 1, ema=None, **{"lr": 1e-12} | section))["run"]
        for key, weight in load_own(ViTVQModel, after, "RUN").state_dict().items():
            torch.testing.assert_close(weight, before[key], atol=1e-6, rtol=1e-5)
    with pytest.raises(RecipeError, match=r"^train\.init: .* has a different shape"):
        fit(make("other", 1, {"codes": 8}, init=str(run)))
    with pytest.raises(RecipeError, match=r"^train\.vitvqgan\.size: 8 pixels, and the pretrained model knows 16"):
        fit(make("small", 1, {"pretrained": str(run), "size": 8, "discriminator": None}))


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ({"encoder": {**TOWER, "heads": 3}}, r"train\.vitvqgan\.encoder: .*width 16 does not divide by heads 3"),
        ({"size": 18}, r"train\.vitvqgan\.size: 18 pixels do not divide by 4"),
        ({"codes": 1}, r"train\.vitvqgan\.codes"),
        ({"perceptual": {"network": "/no/lpips"}}, r"train\.vitvqgan\.perceptual\.network: no /no/lpips"),
        ({"pretrained": "/no/model"}, r"train\.vitvqgan\.pretrained: no model at /no/model"),
    ],
)
def test_a_wrong_setting_is_named(make: Make, section: dict[str, Any], field: str) -> None:
    with pytest.raises(RecipeError, match=field) as caught:
        fit(make(f"wrong-{next(iter(section))}", 1, section))
    assert caught.value.exit_code == 2


def test_the_codebook_is_not_cut_into_parts() -> None:
    section = {"model": "vitvqgan", "run": "unused", "steps": 1, "vitvqgan": SMALL}
    with pytest.raises(RecipeError, match=r"train\.engine\.zero: .*codebook"):
        TrainConfig.from_section(section | {"engine": {"strategy": "deepspeed", "zero": 3}})
