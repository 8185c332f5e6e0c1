"""A product and prompts → images → one value per prompt, by oracle and CLIP.

    measured/<trial>/step-000500.json   {step, seconds, pictures, values: {set: {measure: [one value per prompt]}}}
    measured/<trial>/<set>.png          the first images of a set at the last step, side by side

A value is null if the measure is not defined for a prompt: a prompt of one thing has no relation.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
from PIL import Image

from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage import Storage
from capstan.pipeline.world import prompt_score
from capstan.recaption.compare.clip import Clip
from capstan.recaption.compare.metrics import chunks, scores
from capstan.training.drawing.drawer import Drawer
from capstan.training.experiment.config import Scorer
from capstan.training.experiment.prompts import Prompt, Prompts

CLIP_MEASURES: Final = ("clip_mean", "clip_min")
SHOWN: Final = 8  # images kept per set
_OTHERS: Final = 5  # other prompts whose images give the chance level

Values = dict[str, dict[str, list[float | None]]]  # set → measure → one per prompt


def open_scorer(scorer: Scorer | None) -> Clip | None:
    """Open the CLIP that scores images, or return None. Raises RecipeError."""
    if scorer is None:
        return None
    try:
        return Clip(scorer.model, scorer.pretrained)
    except RecipeError as error:  # its field is an option of `captions diff`
        name = "pretrained" if error.field == "--pretrained" else "model"
        raise RecipeError(f"experiment.scorer.{name}", error.problem, error.hint) from None


def measure(sampler: Drawer, prompts: Prompts, clip: Clip | None, batch: int = 64) -> tuple[Values, dict[str, Any]]:
    """Generate and score the images of each set; return the values and the images by set, uint8 [N, H, W, 3]."""
    values, images = Values(), {}
    for name, of_set in prompts.items():
        texts = [prompt.drawn or prompt.text for prompt in of_set]
        images[name] = sampler.draw(texts, [prompt.seed for prompt in of_set], batch=batch).images
        values[name] = score_images(of_set, images[name], clip)
    return values, images


def score_images(prompts: Sequence[Prompt], images: np.ndarray, clip: Clip | None) -> dict[str, list[float | None]]:
    """Return measure → one value per prompt, for images [N, H, W, 3]."""
    columns: dict[str, list[float | None]] = {}
    wanted = [prompt.wanted for prompt in prompts if prompt.wanted is not None]
    if len(wanted) == len(prompts):
        rows = [prompt_score.judge(one, image) for one, image in zip(wanted, images, strict=True)]
        columns = {name: [_plain(row[name]) for row in rows] for name in prompt_score.MEASURES}
    if clip is not None:
        mean, least = clip_scores(clip, images, [prompt.text for prompt in prompts])
        columns |= {"clip_mean": [_plain(v) for v in mean], "clip_min": [_plain(v) for v in least]}
    return columns


def clip_scores(clip: Clip, images: np.ndarray, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return 100 × the cosine of each image and its text's sentences: the mean over them, and the minimum."""
    parts = [chunks(text, clip.fits) for text in texts]
    owner = np.repeat(np.arange(len(texts)), [len(part) for part in parts])
    return scores(
        clip.images([_png(image) for image in images]),
        clip.texts([sentence for part in parts for sentence in part]),
        owner,
    )


def references(prompts: Prompts, clip: Clip | None) -> dict[str, Values]:
    """Return scores of true images (`truth`) and of images of other prompts (`chance`), for sets with true images."""
    values: dict[str, Values] = {"truth": {}, "chance": {}}
    for name, of_set in prompts.items():
        true_images = [prompt.image for prompt in of_set if prompt.image is not None]
        if len(true_images) < len(of_set):
            continue
        images = np.stack(true_images)
        values["truth"][name] = score_images(of_set, images, clip)
        shifts = range(1, min(_OTHERS, len(of_set) - 1) + 1)
        others = [score_images(of_set, np.roll(images, shift, axis=0), clip) for shift in shifts]
        count = range(len(of_set))
        values["chance"][name] = {m: [_mean([other[m][i] for other in others]) for i in count] for m in others[0]}
    return values


def with_upsampled(prompts: Prompts, name: str, of: str, drawn: Sequence[str]) -> Prompts:
    """Return the sets plus the set `name`: the prompts of the set `of`, with the expanded texts `drawn`."""
    return prompts | {name: [replace(prompt, drawn=text) for prompt, text in zip(prompts[of], drawn, strict=True)]}


class Measurements:
    """The measurements of an experiment, in its folder."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def read(self, trial: str, step: int) -> dict[str, Any] | None:
        """Return a measurement, or None if it does not exist yet."""
        name = self._name(trial, step)
        return dict(json.loads(self.storage.read(name))) if self.storage.exists(name) else None

    def write(self, trial: str, step: int, facts: Mapping[str, Any], pictures: Mapping[str, np.ndarray]) -> None:
        """Publish a measurement: the images first, as the JSON file marks it as complete."""
        for name, images in pictures.items():
            row = np.concatenate(list(images[:SHOWN]), axis=1)
            self.storage.write(f"measured/{trial}/{name}.png", _png(row))
        self.storage.write(self._name(trial, step), json.dumps(facts).encode() + b"\n")

    def images(self, trial: str, name: str) -> list[np.ndarray]:
        """Return the first images of a set at the last step; empty if there are none yet."""
        path = f"measured/{trial}/{name}.png"
        if not self.storage.exists(path):
            return []
        with Image.open(io.BytesIO(self.storage.read(path))) as row:
            pixels = np.asarray(row.convert("RGB"))
        return np.split(pixels, pixels.shape[1] // pixels.shape[0], axis=1)

    @staticmethod
    def _name(trial: str, step: int) -> str:
        return f"measured/{trial}/step-{step:06d}.json"


class Clock:
    """A timer of a `with` block: `seconds`, after it."""

    def __enter__(self) -> Clock:
        self._since, self.seconds = time.monotonic(), 0.0
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = round(time.monotonic() - self._since, 2)


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG")
    return file.getvalue()


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 4)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 4) if known else None
