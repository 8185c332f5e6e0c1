"""An export draws on a GPU what `capstan sample` draws there, and what a CPU draws but for rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_networks
import torch
from gpu import NEEDS_GPU

from capstan.training.export import export
from capstan.training.sample import open_sampler

pytestmark = NEEDS_GPU

PROMPT = "a red square, number 0"


@pytest.mark.parametrize("network", list(tiny_networks.NETWORKS))
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_an_export_is_drawn_on_the_gpu(network: str, precision: str, squares: Path, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    autoencoder = tiny_networks.save_autoencoder(squares, tmp_path / "ae")
    towers = tiny_networks.save_towers(tmp_path)
    settings = tiny_networks.settings_of(network, towers, autoencoder=autoencoder)
    run = tiny_networks.save_product(tiny_networks.family_of(squares, tmp_path / "assets", settings), tmp_path / "run")
    drawn = {device: open_sampler(run, device).draw([PROMPT], [3], steps=4).arrays[0] for device in ("cuda", "cpu")}
    assert drawn["cuda"].std() > 0
    assert np.abs(drawn["cuda"].astype(int) - drawn["cpu"]).mean() < 3  # levels of 256
    export(run, tmp_path / "pipeline", precision=precision)
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pipeline", torch_dtype=dtype).to("cuda")
    made = pipeline(
        PROMPT,
        num_inference_steps=4,
        guidance_scale=open_sampler(run, "cpu").settings()["guidance"],
        generator=torch.Generator("cpu").manual_seed(3),
        output_type="np",
        **({"use_resolution_binning": False, "clean_caption": False} if network == "dit" else {}),
    ).images[0]
    assert np.isfinite(made).all()
    tolerance = 0.004 if precision == "fp32" else 0.1
    assert np.abs(made - drawn["cuda"] / 255).mean() < tolerance
