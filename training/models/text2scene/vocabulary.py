"""The column `objects` → what a model can say, and a sample's things as numbers"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from capstan.pipeline.errors import RecipeError
from capstan.pipeline.world.render import outline
from capstan.pipeline.world.scene import BACKGROUNDS, COLOURS, SHAPES
from capstan.training.family import Samples
from capstan.training.models.text2scene.config import Text2sceneSettings
from capstan.training.models.text2scene.modeling_text2scene import (
    END,
    PARTS,
    Text2SceneConfig,
    Thing,
    fitting,
    words_of,
)

OBJECTS: Final = "objects"  # the column
NONE: Final = ""  # the value of an attribute that a thing does not have
_COUNTED: Final = 20_000  # samples from which vocabularies are made
_INKS: Final = ("colour", "color")


def things_of(extra: str, background: str | None) -> list[Thing]:
    """Return the things that a sample's columns (JSON) name; the background first, as a thing of the whole canvas.

    Things without a label or a box of four numbers are left out. The column may hold JSON or its text.
    """
    columns = json.loads(extra)
    listed = columns.get(OBJECTS) or []
    listed = json.loads(listed) if isinstance(listed, str) else listed
    things = [dict(thing) for thing in listed if isinstance(thing, dict) and _is_thing(thing)]
    behind = columns.get(background) if background is not None else None
    if isinstance(behind, str) and behind:
        ink = next((name for thing in things for name in _INKS if name in thing), _INKS[0])
        things.insert(0, {"label": background, "box": [0.0, 0.0, 1.0, 1.0], ink: behind})
    return things


def _is_thing(thing: Mapping[str, Any]) -> bool:
    label, box = thing.get("label"), thing.get("box")
    numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(edge, int | float) for edge in box)
    return isinstance(label, str) and bool(label.strip()) and numbers


def make_vocabulary(settings: Text2sceneSettings, samples: Samples, folder: Path) -> dict[str, Any]:
    """Return words, labels, attributes, colours and outlines of a dataset (`Text2SceneConfig`'s arguments).

    `folder` holds the images of `parts/`, if any. Raises RecipeError if the dataset has no things to learn.
    """
    labels, values = Counter[str](), dict[str, Counter[str]]()
    step = max(1, len(samples) // _COUNTED)
    for index in range(0, len(samples), step):
        for thing in things_of(samples.sample(index).extra, settings.background):
            labels[thing["label"]] += 1
            for name, value in thing.items():
                if name not in ("label", "box") and isinstance(value, str) and value:
                    values.setdefault(name, Counter())[value] += 1
    if not labels.keys() - {settings.background}:
        hint = 'give its table a column objects, e.g. [{"label": "cat", "box": [0.1, 0.2, 0.5, 0.9]}]'
        raise RecipeError("train.text2scene", "no sample of the dataset has objects with a label and a box", hint)
    attributes = {name: [NONE, *_frequent(counted, settings.values)] for name, counted in sorted(values.items())}
    known = _frequent(labels, settings.labels)
    if settings.parts is not None:
        files = [file for file in (folder / "parts").iterdir() if file.suffix in PARTS]
        known = [name for name in known if name == settings.background or fitting(files, {"label": name}, {})]
        if not set(known) - {settings.background}:
            hint = f"name files after labels of the dataset, e.g. {_frequent(labels, 1)[0]}.png"
            raise RecipeError("train.text2scene.parts", f"{settings.parts} has no image of any label", hint)
    return {
        "words": _frequent(Counter(_all_words(samples.captions())), settings.words),
        "labels": known,
        "attributes": attributes,
        "background": settings.background if settings.background in known else None,
        "ink": next((name for name in _INKS if name in attributes), _INKS[0]),
        "palette": {**COLOURS, **BACKGROUNDS, **settings.palette},
        "outlines": {name: outline(name).round(4).tolist() for name in known if name in SHAPES},
    }


def _all_words(captions: Iterable[str]) -> Iterable[str]:
    for caption in captions:
        yield from words_of(caption)


def _frequent(counted: Counter[str], most: int) -> list[str]:
    """Return the most frequent names, the first in the alphabet among equals."""
    return [name for name, _ in sorted(counted.items(), key=lambda one: (-one[1], one[0]))[:most]]


def ordered(things: Sequence[Thing], settings: Text2sceneSettings) -> list[Thing]:
    """Return the things in the order in which they are put down; the background stays first."""
    if settings.order == "given":
        return list(things)
    return sorted(things, key=lambda thing: (thing["label"] != settings.background, -_area(thing)))


def _area(thing: Thing) -> float:
    left, top, right, bottom = thing["box"]
    return float((right - left) * (bottom - top))


def as_numbers(config: Text2SceneConfig, things: Sequence[Thing]) -> dict[str, torch.Tensor]:
    """Return labels [T], attributes [T, K], places [T], sizes [T, 2] and boxes [T, 4], T = most + 1.

    The label after the last thing is END; −1 stands for what there is nothing to learn of. Boxes are those that the
    places and sizes describe, so that a model sees in training what it draws.
    """
    labels, steps = {name: number for number, name in enumerate(config.labels, start=1)}, config.most + 1
    made = {
        "labels": torch.full((steps,), -1),
        "attributes": torch.full((steps, len(config.attributes)), -1),
        "places": torch.full((steps,), -1),
        "sizes": torch.full((steps, 2), -1),
        "boxes": torch.zeros(steps, 4),
    }
    kept = [thing for thing in things if thing["label"] in labels][: config.most]
    for step, thing in enumerate(kept):
        made["labels"][step] = labels[thing["label"]]
        for k, (name, values) in enumerate(config.attributes.items()):
            value = thing.get(name, NONE)
            made["attributes"][step, k] = values.index(value) if value in values else 0
        left, top, right, bottom = (min(max(float(edge), 0.0), 1.0) for edge in thing["box"])
        column, row = (min(int((a + b) / 2 * config.grid), config.grid - 1) for a, b in ((left, right), (top, bottom)))
        made["places"][step] = row * config.grid + column
        for axis, long in enumerate((right - left, bottom - top)):
            made["sizes"][step, axis] = min(max(round(long * config.sizes) - 1, 0), config.sizes - 1)
    made["labels"][len(kept)] = END
    return made


def content_words(config: Text2SceneConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, for each word id, whether it names a label, and whether it names a value of an attribute."""
    of_labels = {word for label in config.labels for word in words_of(label)}
    of_values = {word for values in config.attributes.values() for value in values for word in words_of(value)}
    return tuple(  # type: ignore[return-value]
        torch.tensor([False, False, *(_names(word, known) for word in config.words)])
        for known in (of_labels, of_values)
    )


def _names(word: str, known: set[str]) -> bool:
    """Return whether a word is one of `known`, or its plural."""
    return word in known or any(word.endswith(end) and word.removesuffix(end) in known for end in ("s", "es"))
