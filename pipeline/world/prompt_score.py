"""Prompt → its requirements → the share that an image meets (T2I-CompBench).

`oracle.score` checks everything in a scene. This file checks only what a prompt states: the captions of a careless web
say little, and an image cannot be blamed for what was not requested. Categories follow Huang et al. 2023,
"T2I-CompBench": attribute binding, object relationship, numeracy.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from capstan.pipeline.world.captions import Facts, NamedThing, facts
from capstan.pipeline.world.oracle import Parsed, parse
from capstan.pipeline.world.scene import COLOURS, SHAPES, Thing, relation

# `followed` and its strict form count all that a prompt states; the others are one category each.
MEASURES: Final = (
    "followed",
    "followed_strict",
    "colour_shape",
    "colour_binding",
    "shape_binding",
    "shapes",
    "size",
    "texture",
    "count",
    "background",
    "relation",
)
_COUNTED: Final = re.compile(r"\b(?:no|one|two|three) things?\b", re.IGNORECASE)
_SHAPE: Final = re.compile(rf"\b(?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)})\b")


@dataclass(frozen=True)
class Wanted:
    """A prompt's requirements; None or empty if it states none. `bare` holds shapes named without a colour."""

    background: str | None
    count: int | None
    things: tuple[NamedThing, ...]
    bare: tuple[str, ...]
    relation: tuple[tuple[str, str], str, tuple[str, str]] | None

    def __bool__(self) -> bool:
        return bool(self.things or self.bare or self.background or self.count is not None)


def read(prompt: str) -> Wanted:
    """Parse an English prompt; a number of things counts only if it is stated in words.

    >>> read("drawing of circle and star").bare, read("red circle clip art").things[0].colour
    (('circle', 'star'), 'red')
    """
    stated: Facts = facts(prompt)
    named = _SHAPE.findall(" ".join(re.sub(r"[^a-z]+", " ", prompt.lower()).split()))
    bare = tuple(shape for colour, shape in named if not colour)
    count = stated.count if _COUNTED.search(prompt) else None
    return Wanted(stated.background, count, stated.things, bare, stated.relation)


def judge(wanted: Wanted, image: np.ndarray) -> dict[str, float]:
    """Score an image (uint8 RGB [side, side, 3]): each of `MEASURES` in [0, 1], nan if the prompt states nothing of it.

    colour_shape     share of requested (colour, shape) pairs that are present, each as often as requested
    colour_binding   share of things whose shape is present that have the requested colour
    shape_binding    share of things whose colour is present that have the requested shape
    shapes           share of requested shapes that are present, in any colour
    size, texture    share of things whose colour and shape are present that have the stated size or texture
    count            whether the number of things is the one stated in words
    background       whether the background has the requested colour
    relation         whether both things are present and related as stated
    followed         share of all statements that hold: each thing, its size, texture and place, the rest once
    followed_strict  the same, with every additional thing counted as a statement that does not hold: a prompt seldom
                     states the number of things, and among many things one is right by chance
    """
    return compare(wanted, parse(image))


def compare(wanted: Wanted, seen: Parsed) -> dict[str, float]:
    """Score a parsed image, as `judge` does."""
    pairs = _shared([_kind(thing) for thing in seen.things], [_kind(thing) for thing in wanted.things])
    colours = _shared([thing.colour for thing in seen.things], [thing.colour for thing in wanted.things])
    shapes = _shared([thing.shape for thing in seen.things], [thing.shape for thing in wanted.things])
    requested = [*(thing.shape for thing in wanted.things), *wanted.bare]
    all_shapes = _shared([thing.shape for thing in seen.things], requested)
    found = {_kind(thing): thing for thing in seen.things}
    size = [(t.size, found.get(_kind(t))) for t in wanted.things if t.size is not None]
    texture = [(t.texture, found.get(_kind(t))) for t in wanted.things if t.texture != "plain"]
    sizes = [there.size == value for value, there in size if there is not None]
    textures = [there.texture == value for value, there in texture if there is not None]
    places = [_is_at(thing, found) for thing in wanted.things if thing.place is not None]
    once = {
        "count": _flag(wanted.count, len(seen.things)),
        "background": _flag(wanted.background, seen.background),
        "relation": math.nan if wanted.relation is None else float(_related(wanted.relation, found)),
    }
    # A shape without a colour may be any that is present and not already matched by colour and shape.
    bare = min(all_shapes - min(all_shapes, pairs), len(wanted.bare))
    holds = pairs + bare + sum(sizes) + sum(textures) + sum(places) + sum(v for v in once.values() if v == 1)
    stated = len(requested) + len(size) + len(texture) + len(places) + sum(not math.isnan(v) for v in once.values())
    more = max(0, len(seen.things) - max(len(requested), wanted.count or 0)) if stated else 0
    return {
        "followed": _share(holds, stated),
        "followed_strict": _share(holds, stated + more),
        "colour_shape": _share(pairs, len(wanted.things)),
        "colour_binding": _share(pairs, shapes),
        "shape_binding": _share(pairs, colours),
        "shapes": _share(all_shapes, len(requested)),
        "size": _share(sum(sizes), len(sizes)),
        "texture": _share(sum(textures), len(textures)),
        **once,
    }


def _kind(thing: NamedThing | Thing) -> tuple[str, str]:
    return thing.colour, thing.shape


def _is_at(thing: NamedThing, found: dict[tuple[str, str], Thing]) -> bool:
    there = found.get(_kind(thing))
    return there is not None and there.place == thing.place


def _related(stated: tuple[tuple[str, str], str, tuple[str, str]], found: dict[tuple[str, str], Thing]) -> bool:
    a, how, b = stated
    return a in found and b in found and a != b and relation(found[a], found[b]) == how


def _shared(found: Sequence[object], wanted: Sequence[object]) -> int:
    """Count the elements of `wanted` that are in `found`, as multisets."""
    return (Counter(found) & Counter(wanted)).total()


def _flag(wanted: object, found: object) -> float:
    return math.nan if wanted is None else float(wanted == found)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
