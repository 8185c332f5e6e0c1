"""A system's product and the held-out prompts → images, scores, seconds

    measured/<system>-s<seed>/step-000003.json     at point 3: {steps, cpu_s, wall_s, seconds, parameters, values, …}
    measured/<system>-s<seed>/shown.png            the first images, at the last point

A generator draws the prompts. A first stage decodes its encoding of their true images. Both are scored by the oracle.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, TypeGuard

import numpy as np
import torch
from safetensors import safe_open

from capstan.pipeline.errors import RecipeError
from capstan.training.drawing.drawer import ClipCodec, Codec, SoundCodec
from capstan.training.experiment.measure import Clock, score_images
from capstan.training.experiment.prompts import Prompt
from capstan.training.lecture.clock import Spent
from capstan.training.metrics.metric import random_state_kept
from capstan.training.product import family_of, find_product

SHOWN_SET: Final = "shown"
GENERATOR, FIRST_STAGE = "generator", "first stage"
_BATCH: Final = 32


def measure(run: Path, prompts: Sequence[Prompt], used: Spent, field: str) -> tuple[dict[str, Any], np.ndarray]:
    """Return the facts of a measurement, and the images [N, H, W, 3]. Raises RecipeError for what draws nothing."""
    product, device = find_product(run, field), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    family = family_of(product)
    true = np.stack([prompt.image for prompt in prompts if prompt.image is not None])
    facts: dict[str, Any] = {"steps": used.steps, "cpu_s": round(used.cpu_s, 1), "wall_s": round(used.wall_s, 1)}
    facts |= {"parameters": parameters(product), "pictures": len(prompts)}
    with random_state_kept(device):
        if family is not None and family.draws in ("image", "scene"):
            drawer = family.open(product, device)
            with Clock() as clock:
                texts, seeds = [prompt.text for prompt in prompts], [prompt.seed for prompt in prompts]
                images = drawer.draw(texts, seeds, batch=_BATCH).images
            best = drawer.ceiling(_sized(true, images.shape[1]), _BATCH)
            facts |= {"kind": GENERATOR, "ceiling": score_images(prompts, best, None)}
            facts["chance"] = score_images(prompts, np.roll(images, 1, axis=0), None)
        elif family is not None and _reads_images(codec := family.codec(product, device)):
            true = _sized(true, codec.size)
            with Clock() as clock:
                images = codec.reconstruct(true, _BATCH)
            facts |= {"kind": FIRST_STAGE, "ceiling": {}, "chance": {}, "psnr": _psnr(true, images)}
            facts["others"] = {name: row["value"] for name, row in codec.measures(true, _BATCH).items()}
        else:
            problem = "neither draws images nor encodes them"
            raise RecipeError(field, f"{product} {problem}", "name a model that draws, or a first stage")
    return facts | {"seconds": clock.seconds, "values": score_images(prompts, images, None)}, images


def _reads_images(codec: Codec | SoundCodec | ClipCodec | None) -> TypeGuard[Codec]:
    return codec is not None and not isinstance(codec, SoundCodec | ClipCodec)


def parameters(product: Path) -> int:
    """Return the number of weights in a product, frozen parts included."""
    total = 0
    for file in product.rglob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            total += sum(int(np.prod(weights.get_slice(name).get_shape())) for name in weights.keys())  # noqa: SIM118
    return total


def _sized(images: np.ndarray, side: int) -> np.ndarray:
    import cv2

    if images.shape[1] == side:
        return images
    return np.stack([cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA) for image in images])


def _psnr(true: np.ndarray, made: np.ndarray) -> list[float]:
    """Return 10 log10(255² / MSE) of each image, in dB."""
    errors = ((true.astype(np.float64) - made) ** 2).mean((1, 2, 3)).clip(min=1e-10)
    return [round(float(value), 3) for value in 10 * np.log10(255**2 / errors)]
