"""A CLIP on a GPU embeds as on a CPU, in every precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gpu import NEEDS_GPU
from small_clip import write_clip

from capstan.pipeline.score.clip_model import ClipModel

pytestmark = NEEDS_GPU


@pytest.mark.parametrize(("precision", "least"), [("fp32", 0.9999), ("bf16", 0.99), ("fp16", 0.999)])
def test_embeddings_point_where_a_cpu_s_do(precision: str, least: float, tmp_path: Path) -> None:
    folder = write_clip(tmp_path / "clip", 0)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8)
    words = [f"a red square, number {n}" for n in range(16)]
    there = ClipModel(str(folder), None, precision, "score.clip").load("cuda")
    here = ClipModel(str(folder), None, "fp32", "score.clip").load("cpu")
    for found, expected in ((there.images(pixels), here.images(pixels)), (there.texts(words), here.texts(words))):
        assert found.dtype == torch.float32
        similar = torch.nn.functional.cosine_similarity(found.cpu(), expected.cpu())
        assert similar.min() > least
