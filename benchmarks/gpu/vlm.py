"""Captions/s of a vision-language model of Qwen2-VL 7B's shape with random weights, by the engine `transformers`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu import data
from benchmarks.gpu.results import Measurement, Row, Scale

TEXT = {
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32_768,
    "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
}
VISION = {"embed_dim": 1280, "hidden_size": 3584, "depth": 32, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14}
SIZES = {"patch_size": 14, "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}}


def measure(scale: Scale) -> list[Row]:
    import torch

    from capstan.recaption.config import RecaptionConfig
    from capstan.recaption.engines import Request, make

    sys.path.append(str(Path(__file__).resolve().parents[2] / "tests" / "helpers"))
    import vision_models

    real: dict[str, Any] = {"text": TEXT, "vision": VISION, "sizes": SIZES, "std": 0.02}
    if torch.cuda.is_available():
        real |= {"device": "cuda", "dtype": torch.bfloat16}
    folder = data.made(scale.folder / "vlm", lambda place: vision_models.qwen2_vl(place, **scale(real, {})))
    batch, tokens = scale(32, 2), scale(128, 3)
    section = {"engine": "transformers", "model": str(folder), "slots": ["short"], "batch": batch}
    engine = make(RecaptionConfig.model_validate(section | {"max_tokens": tokens}))
    side = scale(448, 28)
    images = list(np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), dtype=np.uint8))
    requests = [Request(f"{number:064x}", ("short",)) for number in range(batch)]

    def once() -> tuple[float, int]:
        start = time.perf_counter()
        found = engine.caption(images, requests)
        return time.perf_counter() - start, sum(caption["short"].tokens for caption in found)

    once()
    seconds, written = once()
    facts = {"batch": batch, "pixels": side, "tokens_each": written / batch}
    rows = [Row("captions", batch / seconds, "images/s", facts=facts), Row("tokens", written / seconds, "tokens/s")]
    if torch.cuda.is_available():
        rows.append(Row("peak memory", torch.cuda.max_memory_allocated() / 2**30, "GiB"))
    return rows


MEASUREMENTS = [Measurement("VLM of 7 B", 420, measure)]
