"""Frozen parts outside autocast, and images and weights that are not finite, by the part that made them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_networks as tiny
import torch

from capstan.pipeline.errors import CapstanError, RecipeError
from capstan.training.export import export
from capstan.training.models.diffusion.family import DiffusionFamily
from capstan.training.sample import open_sampler

OVERFLOW = 1e7  # times a weight: its products are beyond fp16's 65504, and far from fp32's limit


def scale(module: torch.nn.Module, by: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(by)


@pytest.fixture(scope="module")
def family(squares: Path, tmp_path_factory: pytest.TempPathFactory) -> DiffusionFamily:
    """An autoencoder and a T5 that overflow in fp16, as SDXL's and every T5 do, and a network that does not."""
    root = tmp_path_factory.mktemp("family")
    section = tiny.settings_of(
        "dit", tiny.save_towers(root / "towers"), autoencoder=tiny.save_autoencoder(squares, root)
    )
    family = tiny.family_of(squares, root / "diffusion", section)
    vae, t5 = family.vae, family.text.encoders[0].encoder
    for module in (vae.encoder.conv_in, vae.decoder.conv_in, t5.encoder.block[0].layer[-1].DenseReluDense.wo):
        scale(module, OVERFLOW)
    return family


@pytest.fixture(scope="module")
def run(family: DiffusionFamily, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_product(family, tmp_path_factory.mktemp("product"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_frozen_parts_compute_the_same_under_autocast(family: DiffusionFamily, squares: Path, dtype) -> None:
    batch = family.prepare([tiny.data_of(squares).at(number) for number in range(4)])

    def frozen() -> tuple[torch.Tensor, torch.Tensor]:
        latents = family._latents(batch, torch.Generator().manual_seed(0))
        return latents, family.text.given(batch, torch.zeros(4, dtype=torch.bool))["text_states"]

    exact = frozen()
    with torch.autocast("cpu", dtype):
        halved = frozen()
        assert family.loss(family.model, batch, torch.Generator().manual_seed(0))[0].isfinite()
    assert all(flag for flag in family.finite.values())
    assert next(iter(family.finite)).startswith("the autoencoder")
    for ours, theirs in zip(halved, exact, strict=True):
        assert torch.equal(ours, theirs)


def test_an_autoencoder_that_needs_no_upcast_computes_in_the_precision_of_training(family, squares) -> None:
    batch = family.prepare([tiny.data_of(squares).at(0)])
    before = family.vae.config.get("force_upcast", True)
    family.vae.register_to_config(force_upcast=False)
    try:
        with torch.autocast("cpu", torch.float16):
            assert not family._latents(batch, torch.Generator().manual_seed(0)).isfinite().all()
    finally:
        family.vae.register_to_config(force_upcast=before)


def test_images_drawn_under_autocast_are_finite(run: Path) -> None:
    sampler = open_sampler(run)
    exact = sampler.draw(["a red square"], [0], steps=2).arrays
    with torch.autocast("cpu", torch.float16):
        halved = sampler.draw(["a red square"], [0], steps=2).arrays
    assert np.abs(exact.astype(int) - halved.astype(int)).mean() < 16
    assert not {"decode", "forward"} & {*vars(sampler.pipeline.vae), *vars(sampler.pipeline.text_encoder)}


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (lambda pipeline: scale(pipeline.text_encoder.encoder.final_layer_norm, float("nan")), "text_encoder"),
        (lambda pipeline: scale(pipeline.transformer.proj_out, float("inf")), "transformer"),
        (lambda pipeline: scale(pipeline.vae.decoder.conv_out, float("nan")), "vae"),
        (lambda pipeline: scale(pipeline.vae.decoder.conv_out, float("inf")), "vae"),
        (
            lambda pipeline: setattr(pipeline.scheduler, "convert_model_output", lambda output, **_: output * math.nan),
            "scheduler",
        ),
    ],
)
def test_images_that_are_not_finite_name_the_part_that_made_them(
    run: Path, spoil: Callable[..., None], part: str
) -> None:
    sampler = open_sampler(run)
    spoil(sampler.pipeline)
    with pytest.raises(CapstanError, match=rf"images are not finite; .* came from the {part}\. Fix: "):
        sampler.draw(["a red square"], [0], steps=2)


def test_export_refuses_what_a_precision_cannot_hold(run: Path, family: DiffusionFamily, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"^--precision: fp16 cannot hold \d+ weights of text_encoder .*Fix: use bf16 or fp32"
    ):
        export(run, tmp_path / "out", precision="fp16")
    assert not (tmp_path / "out").exists()
    export(run, tmp_path / "out", precision="bf16")
    spoilt = tiny.save_product(family, tmp_path / "spoilt")
    sampler = open_sampler(spoilt)
    scale(sampler.pipeline.transformer.proj_out, float("nan"))
    sampler.pipeline.save_pretrained(spoilt / "product")
    with pytest.raises(CapstanError, match="transformer has weights that are not finite"):
        export(spoilt, tmp_path / "nan")
