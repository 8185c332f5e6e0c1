"""The family dvae: the relaxation and its limits, the likelihood, runs that resume, and a VQModel as the product."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import VQModel
from family_runs import assert_killed_run_ends_as_whole
from tiny_runs import records

from capstan.pipeline.config import Recipe, WorldSource
from capstan.pipeline.errors import RecipeError
from capstan.training.config import TrainConfig
from capstan.training.distributed.step import Step
from capstan.training.evaluate import evaluate
from capstan.training.export import export
from capstan.training.models.dvae.family import DvaeFamily
from capstan.training.models.dvae.model import (
    EPSILON,
    Dvae,
    farthest,
    gumbel,
    kl_from_uniform,
    logit_laplace,
    scheduled,
    squared_distances,
)
from capstan.training.models.vqgan.model import nearest
from capstan.training.product import family_of
from capstan.training.trainer import fit

SMALL = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4, "codes": 32}

Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def make(squares: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    root = tmp_path_factory.mktemp("dvae")

    def recipe(run: str, steps: int = 4, dvae: dict[str, Any] | None = None, **section: Any) -> Recipe:
        base = {"model": "dvae", "run": str(root / run), "steps": steps, "batch": 8, "lr": 1e-3, "log_every": 1}
        base |= {"ema": 0.5, "checkpoint": {"every": 1, "keep": 1}, "engine": {"strategy": "ddp", "threads": 1}}
        schedules = {"temperature": {"end": 0.5, "steps": 4}, "kl": {"steps": 4}}
        settings = SMALL | schedules | (dvae or {})
        return Recipe(dataset=str(squares), train=base | {"watch": {"trackers": []}, "dvae": settings} | section)

    return recipe


@pytest.fixture(scope="module")
def run(make: Make) -> Path:
    return Path(fit(make("run"))["run"])


@pytest.fixture
def model() -> Dvae:
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    shape = {"block_out_channels": [8, 16], "norm_num_groups": 4, "latent_channels": 4, "num_vq_embeddings": 32}
    return Dvae(VQModel(**blocks, **shape)).eval()


def test_without_noise_and_cold_it_is_the_vq_model_that_is_saved(model: Dvae) -> None:
    with torch.no_grad():
        model.table.mul_(30)
        images = torch.randn(2, 3, 16, 16)
        found = model(images, torch.zeros(2, 8, 8, 32), 1e-8)
        assert torch.equal(found.logits.argmax(-1), nearest(found.latents, model.table))
        torch.testing.assert_close(found.images, model.plain()(images).sample, atol=1e-4, rtol=1e-3)
    assert found.spread.abs().max() == 0  # no part of what is drawn


def test_warm_codes_are_mixtures_whose_gradient_reaches_encoder_and_codebook(model: Dvae) -> None:
    noise = gumbel(torch.rand(2, 8, 8, 32))
    model(torch.randn(2, 3, 16, 16), noise, 1.0).images.square().sum().backward()
    assert model.vq.encoder.conv_in.weight.grad.abs().max() > 0
    assert model.table.grad.abs().max() > 0


def test_first_codes_lie_far_from_each_other_and_can_be_told_apart(make: Make, run: Path) -> None:
    points = torch.tensor([[0.0], [0.1], [9.0], [5.0], [0.2]])
    chosen, apart = farthest(points, 3)
    assert chosen.flatten().tolist() == [9.0, 0.0, 5.0]
    assert float(apart) == pytest.approx((81 + 16) / 2)
    assert farthest(points[:1], 2)[0].flatten().tolist() == [0.0, 0.0]
    torch.manual_seed(0)
    family = DvaeFamily(TrainConfig.from_recipe(make("run")), run / "assets")
    with torch.no_grad():
        latents, table = family.model.vq.encode(family.measured()).latents, family.model.table
        distances = squared_distances(latents, table).flatten(0, 2)
        apart = [torch.cdist(table[k : k + 1], table[:k]).square().min() for k in range(1, len(table))]
    assert float(torch.stack(apart).mean()) == pytest.approx(4, rel=1e-3)
    assert distances.min(0).values.max() < 1e-3  # each is a latent


def test_codes_are_drawn_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0])
    noise = gumbel(torch.rand(20_000, 3, generator=torch.Generator().manual_seed(0)))
    drawn = torch.bincount((logits + noise).argmax(-1)) / 20_000
    torch.testing.assert_close(drawn, logits.softmax(-1), atol=0.01, rtol=0)
    assert gumbel(torch.tensor([0.0, 1.0 - 2**-24])).isfinite().all()


def test_distances_and_divergence() -> None:
    latents, codes = torch.randn(2, 4, 3, 3), torch.randn(5, 4)
    flat = latents.movedim(1, -1).reshape(-1, 4)
    torch.testing.assert_close(squared_distances(latents, codes).reshape(-1, 5), torch.cdist(flat, codes).square())
    certain = torch.tensor([100.0, 0, 0, 0]).expand(2, 3, 3, 4)
    torch.testing.assert_close(kl_from_uniform(certain), torch.full((2,), 9 * math.log(4)))
    torch.testing.assert_close(kl_from_uniform(torch.zeros(2, 3, 3, 4)), torch.zeros(2))


def test_the_likelihood_is_a_density_of_pixel_values() -> None:
    """Its integral over all φ(x) is 1, wherever the decoder's image lies and however wide it says the density is."""
    phi = torch.linspace(1e-4, 1 - 1e-4, 200_001)
    images = ((phi - EPSILON) / (1 - 2 * EPSILON)) * 2 - 1
    for made, spread in ((0.0, -1.0), (0.7, -2.0), (-1.1, -1.5)):
        each = torch.stack([logit_laplace(torch.tensor(made), torch.tensor(spread), x) for x in images[::2000]])
        log_b, mu = torch.tensor(spread), torch.logit(torch.tensor(EPSILON + (1 - 2 * EPSILON) * (made + 1) / 2))
        if abs(made) <= 1:
            given = phi[::2000]
            density = torch.exp(-(given.logit() - mu).abs() / log_b.exp()) / (2 * log_b.exp()) / (given * (1 - given))
            torch.testing.assert_close((-each).exp(), density, rtol=1e-3, atol=1e-6)
    best = min(torch.linspace(-1, 1, 41), key=lambda x: float(logit_laplace(x, torch.tensor(0.0), torch.tensor(0.5))))
    assert float(best) == pytest.approx(0.5)


def test_schedules_follow_the_step(make: Make) -> None:
    assert [round(scheduled(1.0, 0.0, 4, step), 3) for step in (0, 2, 4, 9)] == [1.0, 0.5, 0.0, 0.0]
    log = records(Path(fit(make("schedules", 5))["run"]))
    assert log[0]["temperature"] == 1.0
    assert log[0]["kl_weight"] == 0.0
    assert (log[-1]["temperature"], log[-1]["kl_weight"]) == (0.5, 6.6)
    assert log[1]["temperature"] == pytest.approx(scheduled(1.0, 0.5, 4, 1))


def test_it_learns_and_keeps_its_codes(make: Make) -> None:
    cold = {"temperature": {"end": 0.1, "steps": 40}, "kl": {"steps": 40, "end": 0.1}}
    log = records(Path(fit(make("learns", 60, cold, lr=3e-3, warmup=5))["run"]))
    assert log[-1]["psnr"] > log[0]["psnr"] + 4
    assert log[0]["perplexity"] > 8  # the first codes are latents
    assert log[-1]["perplexity"] > 4


def test_a_killed_run_ends_as_one_that_was_not(make: Make, tmp_path: Path) -> None:
    assert_killed_run_ends_as_whole(make, "diffusion_pytorch_model.safetensors", tmp_path)


def test_the_product_is_a_vq_model(make: Make, run: Path, tmp_path: Path) -> None:
    assert family_of(run / "product") is DvaeFamily
    assert export(run, tmp_path / "export")["pipeline"] == "dvae"
    vq = VQModel.from_pretrained(tmp_path / "export")
    assert vq.decoder.conv_out.out_channels == 3
    images = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    codec = DvaeFamily.codec(run / "product", torch.device("cpu"))
    with torch.no_grad():
        np.testing.assert_allclose(vq(images).sample, codec.images(codec.tokens(images)), atol=1e-5)
    result = evaluate(run, count=6, world=WorldSource(scenes=10, size=16))
    assert result["kind"] == "dvae"
    assert {"psnr", "perplexity", "codes_used"} <= set(result["measures"])
    for name, section in {"init": {"init": str(run)}, "pretrained": {"dvae": {"pretrained": str(run)}}}.items():
        after = fit(make(name, 1, ema=None, **{"lr": 1e-12} | section))["run"]
        again = VQModel.from_pretrained(Path(after) / "product").state_dict()
        for key, weight in vq.state_dict().items():
            torch.testing.assert_close(again[key], weight, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ({"temperature": {"start": 0.1, "end": 0.5}}, r"train\.dvae\.temperature: .*the temperature falls"),
        ({"kl": {"end": -1}}, r"train\.dvae\.kl\.end"),
        ({"codes": 1}, r"train\.dvae\.codes"),
        ({"commitment": 0.25}, r"train\.dvae\.commitment"),
        ({"size": 17}, r"train\.dvae\.size: 17 pixels do not divide by 2"),
        ({"pretrained": "/no/model"}, r"train\.dvae\.pretrained: no model at /no/model"),
    ],
)
def test_a_wrong_setting_is_named(make: Make, section: dict[str, Any], field: str) -> None:
    with pytest.raises(RecipeError, match=field) as caught:
        fit(make(f"wrong-{next(iter(section))}", 1, section))
    assert caught.value.exit_code == 2


def test_the_codebook_is_not_cut_into_parts() -> None:
    section = {"model": "dvae", "run": "unused", "steps": 1, "dvae": SMALL}
    with pytest.raises(RecipeError, match=r"train\.engine\.zero: .*codebook"):
        TrainConfig.from_section(section | {"engine": {"strategy": "deepspeed", "zero": 3}})


def test_the_step_sets_the_schedules_of_a_family(make: Make, run: Path) -> None:
    family = DvaeFamily(TrainConfig.from_recipe(make("run")), run / "assets")
    family.begin_step(family.model, [], Step(number=400))
    assert (family.temperature, family.kl_weight) == (0.5, 6.6)
