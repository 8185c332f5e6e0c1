"""A product and prompts → images → numbers, one a prompt: what the oracle finds, and what a CLIP thinks of it.

    measured/<trial>/step-000500.json   {step, seconds, images, values: {set: {measure: [a number a prompt]}}}
    measured/<trial>/<set>.png          the first images of a set at the last step, side by side

A number is null where a measure is not defined for a prompt: a prompt of one thing asks for no relation.
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
from capstan.training.experiment.config import Scorer
from capstan.training.experiment.prompts import Prompt, Prompts
from capstan.training.sample import Sampler

CLIP_MEASURES: Final = ("clip_mean", "clip_min")
SHOWN: Final = 8  # images a set that are kept
_OTHERS: Final = 5  # images of other prompts that chance is measured on

Values = dict[str, dict[str, list[float | None]]]  # set → measure → one a prompt


def open_scorer(scorer: Scorer | None) -> Clip | None:
    """The CLIP that judges. Raises RecipeError."""
    if scorer is None:
        return None
    try:
        return Clip(scorer.model, scorer.pretrained)
    except RecipeError as error:  # it names an option of `captions diff`
        name = "pretrained" if error.field == "--pretrained" else "model"
        raise RecipeError(f"experiment.scorer.{name}", error.problem, error.hint) from None


def measure(sampler: Sampler, prompts: Prompts, clip: Clip | None, batch: int = 64) -> tuple[Values, dict[str, Any]]:
    """Draw each set and judge it: the values, and the images of each set, uint8 [N, H, W, 3]."""
    values, images = Values(), {}
    for name, asked in prompts.items():
        texts = [prompt.drawn or prompt.text for prompt in asked]
        images[name] = sampler.draw(texts, [prompt.seed for prompt in asked], batch=batch)
        values[name] = judged(asked, images[name], clip)
    return values, images


def judged(prompts: Sequence[Prompt], images: np.ndarray, clip: Clip | None) -> dict[str, list[float | None]]:
    """Measure → one value a prompt, of images [N, H, W, 3]."""
    columns: dict[str, list[float | None]] = {}
    wanted = [prompt.wanted for prompt in prompts if prompt.wanted is not None]
    if len(wanted) == len(prompts):
        rows = [prompt_score.judge(asked, image) for asked, image in zip(wanted, images, strict=True)]
        columns = {name: [_plain(row[name]) for row in rows] for name in prompt_score.MEASURES}
    if clip is not None:
        mean, least = clip_scores(clip, images, [prompt.text for prompt in prompts])
        columns |= {"clip_mean": [_plain(v) for v in mean], "clip_min": [_plain(v) for v in least]}
    return columns


def clip_scores(clip: Clip, images: np.ndarray, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """100 × the cosine of each image and its text's sentences: the mean over them, and the least."""
    parts = [chunks(text, clip.fits) for text in texts]
    owner = np.repeat(np.arange(len(texts)), [len(part) for part in parts])
    return scores(
        clip.images([_png(image) for image in images]),
        clip.texts([sentence for part in parts for sentence in part]),
        owner,
    )


def references(prompts: Prompts, clip: Clip | None) -> dict[str, Values]:
    """What true images score (`truth`), and images of other prompts (`chance`); nothing where there is none."""
    found: dict[str, Values] = {"truth": {}, "chance": {}}
    for name, asked in prompts.items():
        there = [prompt.image for prompt in asked if prompt.image is not None]
        if len(there) < len(asked):
            continue
        images = np.stack(there)
        found["truth"][name] = judged(asked, images, clip)
        shifts = range(1, min(_OTHERS, len(asked) - 1) + 1)
        others = [judged(asked, np.roll(images, shift, axis=0), clip) for shift in shifts]
        found["chance"][name] = {m: [_mean([o[m][i] for o in others]) for i in range(len(asked))] for m in others[0]}
    return found


def with_upsampled(prompts: Prompts, name: str, of: str, drawn: Sequence[str]) -> Prompts:
    """The sets, and one more: those of the set `of`, drawn from other texts."""
    return prompts | {name: [replace(prompt, drawn=text) for prompt, text in zip(prompts[of], drawn, strict=True)]}


class Kept:
    """The measurements of an experiment, in its folder."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def read(self, trial: str, step: int) -> dict[str, Any] | None:
        """What was measured, or None where nothing was yet."""
        name = self._name(trial, step)
        return dict(json.loads(self.storage.read(name))) if self.storage.exists(name) else None

    def write(self, trial: str, step: int, facts: Mapping[str, Any], pictures: Mapping[str, np.ndarray]) -> None:
        """Publish a measurement; last, since with it all is there."""
        for name, images in pictures.items():
            row = np.concatenate(list(images[:SHOWN]), axis=1)
            self.storage.write(f"measured/{trial}/{name}.png", _png(row))
        self.storage.write(self._name(trial, step), json.dumps(facts).encode() + b"\n")

    def images(self, trial: str, name: str) -> list[np.ndarray]:
        """The first images of a set at the last step; none where there are none yet."""
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
    """Seconds of a `with` block."""

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
