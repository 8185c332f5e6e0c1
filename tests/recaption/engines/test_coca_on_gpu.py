"""CoCa on a GPU: fp32 writes the CPU's captions, bf16 nearly all of them; no caption depends on its batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gpu import NEEDS_GPU
from small_captioner import write_captioner

from capstan.recaption.config import RecaptionConfig
from capstan.recaption.engines import Request, make

pytestmark = NEEDS_GPU

COUNT = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_captioner(tmp_path_factory.mktemp("captioner") / "m")


def captions(model: Path, device: str, precision: str, batch: int, method: str = "greedy") -> list[str]:
    section = {"model": str(model), "slots": ["short"], "device": device, "precision": precision, "batch": batch}
    engine = make(RecaptionConfig.model_validate(section | {"decoding": {"method": method}}))
    images = list(np.random.default_rng(0).integers(0, 256, (COUNT, 32, 32, 3), dtype=np.uint8))
    found = engine.caption(images, [Request(f"{n:064x}", ("short",)) for n in range(COUNT)])
    return [caption["short"].raw for caption in found]


def test_fp32_writes_what_a_cpu_writes(model: Path) -> None:
    assert captions(model, "cuda", "fp32", 4) == captions(model, "cpu", "fp32", 4)


@pytest.mark.parametrize("method", ["greedy", "top_p", "beam"])
def test_bf16_writes_the_same_in_batches_of_one_size(model: Path, method: str) -> None:
    first = captions(model, "cuda", "bf16", 4, method)
    assert first == captions(model, "cuda", "bf16", 4, method)
    assert len(set(first)) > 1


def test_bf16_mostly_agrees_with_fp32(model: Path) -> None:
    full, half = (captions(model, "cuda", precision, 4) for precision in ("fp32", "bf16"))
    starts = [a[:2] == b[:2] for a, b in zip(full, half, strict=True)]
    assert sum(starts) >= COUNT // 2
