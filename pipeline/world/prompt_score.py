"""A prompt's words → what they ask for → how much of it is in an image, in the categories of T2I-CompBench.

`oracle.score` asks after everything in a scene. This asks only after what a prompt says, since the captions of a
careless web say little, and an image cannot be blamed for what nobody asked for (Huang et al. 2023, "T2I-CompBench":
attribute binding, object relationship, numeracy).
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

# `followed` is the share of all that a prompt says; but for the stricter form of it the others are one category each.
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
    """What a prompt says; None or nothing where it is silent. `bare` are shapes named without a colour."""

    background: str | None
    count: int | None
    things: tuple[NamedThing, ...]
    bare: tuple[str, ...]
    relation: tuple[tuple[str, str], str, tuple[str, str]] | None

    def __bool__(self) -> bool:
        return bool(self.things or self.bare or self.background or self.count is not None)


def read(prompt: str) -> Wanted:
    """What an English prompt asks for; a number of things only where it is said in words.

    >>> read("drawing of circle and star").bare, read("red circle clip art").things[0].colour
    (('circle', 'star'), 'red')
    """
    said: Facts = facts(prompt)
    named = _SHAPE.findall(" ".join(re.sub(r"[^a-z]+", " ", prompt.lower()).split()))
    bare = tuple(shape for colour, shape in named if not colour)
    return Wanted(said.background, said.count if _COUNTED.search(prompt) else None, said.things, bare, said.relation)


def judge(wanted: Wanted, image: np.ndarray) -> dict[str, float]:
    """Each of `MEASURES` in [0, 1] for an image (uint8 RGB [side, side, 3]); nan where a prompt says nothing of it.

    colour_shape     the share of (colour, shape) pairs that are there, each as often as it is asked for
    colour_binding   of the things whose shape is there, the share in the colour asked for
    shape_binding    of the things whose colour is there, the share in the shape asked for
    shapes           the share of shapes that are there, in whatever colour
    size, texture    of the things whose colour and shape are there, the share with the size or pattern that is said
    count            whether there are as many things as the prompt says in words
    background       whether it has the colour asked for
    relation         whether both things are there and stand to each other as said
    followed         the share of all that is said and holds: each thing, its size, pattern and place, the rest once
    followed_strict  the same, where every thing beyond those that are asked for is one more that does not hold: a
                     prompt seldom says how many things there are, and of many things one is right by chance
    """
    return compare(wanted, parse(image))


def compare(wanted: Wanted, seen: Parsed) -> dict[str, float]:
    """As `judge`, for an image that has been parsed."""
    pairs = _shared([_kind(thing) for thing in seen.things], [_kind(thing) for thing in wanted.things])
    colours = _shared([thing.colour for thing in seen.things], [thing.colour for thing in wanted.things])
    shapes = _shared([thing.shape for thing in seen.things], [thing.shape for thing in wanted.things])
    asked = [*(thing.shape for thing in wanted.things), *wanted.bare]
    all_shapes = _shared([thing.shape for thing in seen.things], asked)
    found = {_kind(thing): thing for thing in seen.things}
    size = [(t.size, found.get(_kind(t))) for t in wanted.things if t.size is not None]
    texture = [(t.texture, found.get(_kind(t))) for t in wanted.things if t.texture != "plain"]
    sizes = [there.size == said for said, there in size if there is not None]
    textures = [there.texture == said for said, there in texture if there is not None]
    places = [_is_at(thing, found) for thing in wanted.things if thing.place is not None]
    once = {
        "count": _flag(wanted.count, len(seen.things)),
        "background": _flag(wanted.background, seen.background),
        "relation": math.nan if wanted.relation is None else float(_related(wanted.relation, found)),
    }
    # Shapes without a colour may be any of those that are there and not taken by a thing that is asked for by both.
    bare = min(all_shapes - min(all_shapes, pairs), len(wanted.bare))
    holds = pairs + bare + sum(sizes) + sum(textures) + sum(places) + sum(v for v in once.values() if v == 1)
    stated = len(asked) + len(size) + len(texture) + len(places) + sum(not math.isnan(v) for v in once.values())
    more = max(0, len(seen.things) - max(len(asked), wanted.count or 0)) if stated else 0
    return {
        "followed": _share(holds, stated),
        "followed_strict": _share(holds, stated + more),
        "colour_shape": _share(pairs, len(wanted.things)),
        "colour_binding": _share(pairs, shapes),
        "shape_binding": _share(pairs, colours),
        "shapes": _share(all_shapes, len(asked)),
        "size": _share(sum(sizes), len(sizes)),
        "texture": _share(sum(textures), len(textures)),
        **once,
    }


def _kind(thing: NamedThing | Thing) -> tuple[str, str]:
    return thing.colour, thing.shape


def _is_at(thing: NamedThing, found: dict[tuple[str, str], Thing]) -> bool:
    there = found.get(_kind(thing))
    return there is not None and there.place == thing.place


def _related(said: tuple[tuple[str, str], str, tuple[str, str]], found: dict[tuple[str, str], Thing]) -> bool:
    a, how, b = said
    return a in found and b in found and a != b and relation(found[a], found[b]) == how


def _shared(found: Sequence[object], wanted: Sequence[object]) -> int:
    """How many of `wanted` are in `found`, as multisets."""
    return (Counter(found) & Counter(wanted)).total()


def _flag(wanted: object, found: object) -> float:
    return math.nan if wanted is None else float(wanted == found)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
