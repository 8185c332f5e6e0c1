"""CoCa captions/s: open_clip's uncached loop, the engine's cache, and the cached step compiled."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.results import Measurement, Row, Scale

LEAST_GAIN = 5.0  # of the cache over the uncached loop


def measure(scale: Scale) -> list[Row]:
    import torch

    from benchmarks import recaption as benchmark
    from capstan.recaption.config import RecaptionConfig
    from capstan.recaption.engines.coca import CocaEngine

    batch, folder = scale(64, 2), scale.folder / "coca"
    shutil.rmtree(folder, ignore_errors=True)
    section = {"slots": ["short"], "batch": batch, "precision": scale("bf16", "fp32")}
    section["model"] = str(_captioner(folder, scale))
    engine = CocaEngine(RecaptionConfig.model_validate(section))
    loaded = benchmark._load(engine)
    prompt, limit = loaded.slots["short"]
    how = engine.preprocessing
    images = list(np.random.default_rng(0).integers(0, 256, (batch, how.height, how.width, 3), dtype=np.uint8))

    def cached(compiled: bool) -> list[list[int]]:
        from capstan.recaption.engines.coca_decoding import decode

        cache: Any = loaded.encode(images, how, batch)
        if compiled:
            cache.step = torch.compile(cache.step, dynamic=True, disable=scale.toy)
        found = decode(cache, range(batch), prompt, limit, loaded.tokens, engine.config.decoding, [0] * batch)
        return [tokens for tokens, _ in found]

    with torch.inference_mode():
        rate, tokens = timed(lambda: cached(False), batch)
        plain, expected = timed(lambda: benchmark._plain(loaded, engine, images, prompt, limit), batch, warm=0)
        rows = [
            Row("open_clip's loop, no cache", plain, "images/s", facts={"batch": batch, "tokens": limit}),
            Row("cached", rate, "images/s", facts={"same_captions": share(tokens, expected)}),
            Row("cached, × the uncached loop", rate / plain, "×", LEAST_GAIN),
        ]
        compiled, tokens_compiled = timed(lambda: cached(True), batch, warm=2)
        facts = {"same_captions": share(tokens_compiled, tokens), "gain": compiled / rate}
        rows.append(Row("cached, step compiled", compiled, "images/s", facts=facts))
    shutil.rmtree(folder)
    return rows


def _captioner(folder: Path, scale: Scale) -> Path:
    from benchmarks.recaption import random_captioner

    if not scale.toy:
        return random_captioner(folder, "coca_ViT-L-14")
    sys.path.append(str(Path(__file__).resolve().parents[2] / "tests" / "helpers"))
    from small_captioner import write_captioner

    return write_captioner(folder)


def timed(run: Callable[[], Any], images: int, warm: int = 1) -> tuple[float, Any]:
    """Return the images/s of the last run, and its result."""
    for _ in range(warm):
        run()
    start = time.perf_counter()
    result = run()  # lists of tokens: the GPU has ended
    return images / (time.perf_counter() - start), result


def share(found: list[Any], expected: list[Any]) -> float:
    return sum(a == b for a, b in zip(found, expected, strict=True)) / len(expected)


MEASUREMENTS = [Measurement("CoCa captions", 300, measure)]
