"""(seed, index, vocabulary) → `Scene`: the truth about one image.

Lengths and places are fractions of the image's side, x to the right and y downward. Scenes are drawn so that every
statement about them holds by a margin: things neither touch nor leave the image, a thing's place is never between two
words, and it is never in doubt whether two things are next to or above each other.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from capstan.pipeline.config import WorldSource
from capstan.pipeline.errors import RecipeError

Colour = tuple[int, int, int]

COLOURS: Final[Mapping[str, Colour]] = {
    "red": (220, 30, 35),
    "green": (35, 165, 60),
    "blue": (30, 100, 240),
    "yellow": (250, 215, 40),
    "orange": (245, 130, 25),
    "purple": (140, 50, 185),
    "pink": (250, 140, 195),
    "cyan": (60, 205, 225),
}
BACKGROUNDS: Final[Mapping[str, Colour]] = {
    "white": (250, 250, 250),
    "black": (12, 12, 12),
    "grey": (128, 128, 128),
    "beige": (225, 208, 170),
    "navy": (15, 20, 70),
    "brown": (95, 60, 35),
}
SHAPES: Final = ("circle", "square", "triangle", "star", "cross")
TEXTURES: Final = ("plain", "striped", "dotted")  # the last two are visible at 64 pixels and more
SIZES: Final[Mapping[str, tuple[float, float]]] = {"small": (0.15, 0.17), "large": (0.23, 0.26)}  # radius, from–to

PLACES: Final = (  # rows from the top, each from left to right
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the centre", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)
RELATIONS: Final[Mapping[str, str]] = {  # relation → its inverse
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}

EDGE: Final = 0.02  # least distance from a thing's circumcircle to the image's edge
GAP: Final = 0.04  # least distance between two circumcircles
CLEAR: Final = 0.08  # least difference between |dx| and |dy| of two things

Item = TypeVar("Item")


@dataclass(frozen=True)
class Thing:
    """One drawn thing; `r` is the radius of its circumcircle around (x, y)."""

    colour: str
    shape: str
    size: str
    texture: str
    x: float
    y: float
    r: float

    @property
    def cell(self) -> tuple[int, int]:
        """Row and column of its place in `PLACES`."""
        return third(self.y), third(self.x)

    @property
    def place(self) -> str:
        row, column = self.cell
        return PLACES[row][column]


@dataclass(frozen=True)
class Scene:
    """The truth about one image; `things` are ordered from left to right, within a column from the top down."""

    index: int
    seed: int
    background: str
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class Vocabulary:
    """Everything that may appear in a world's images."""

    shapes: tuple[str, ...] = SHAPES
    colours: tuple[str, ...] = tuple(COLOURS)
    textures: tuple[str, ...] = TEXTURES
    min_objects: int = 1
    max_objects: int = 3


def vocabulary(world: WorldSource) -> Vocabulary:
    """Return the vocabulary of a recipe's `source.world`.

    Raises: RecipeError if it names something unknown, or too few colours and shapes to tell things apart.
    """
    if world.min_objects > world.max_objects:
        raise RecipeError(
            "source.world.min_objects", f"is above max_objects ({world.max_objects})", "lower it, or raise max_objects"
        )
    chosen = Vocabulary(
        shapes=_known("shapes", world.shapes, SHAPES),
        colours=_known("colours", world.colours, tuple(COLOURS)),
        textures=_known("textures", world.textures, TEXTURES),
        min_objects=world.min_objects,
        max_objects=world.max_objects,
    )
    if len(chosen.shapes) * len(chosen.colours) < chosen.max_objects:
        raise RecipeError(
            "source.world", f"has too few colours and shapes for {chosen.max_objects} different things", "add some"
        )
    return chosen


def _known(field: str, requested: Sequence[str] | None, known: tuple[str, ...]) -> tuple[str, ...]:
    if requested is None:
        return known
    unknown = [name for name in requested if name not in known]
    if unknown or not requested or len(set(requested)) < len(requested):
        problem = f"unknown: {', '.join(unknown)}" if unknown else "must name at least one, and none twice"
        raise RecipeError(f"source.world.{field}", problem, f"choose from {', '.join(known)}")
    return tuple(requested)


def dice(*parts: int | str) -> random.Random:
    """Return a random generator that depends on `parts` only.

    Only its `random()` is used here: Python guarantees that this method's numbers stay the same on every platform and
    in every later version.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "big"))


def pick(chance: random.Random, items: Sequence[Item]) -> Item:
    """Return one of `items`, all equally likely."""
    return items[int(chance.random() * len(items))]


def pick_share(chance: random.Random, shares: Mapping[str, float]) -> str | None:
    """Return a name drawn by its share; None for the remainder to 1."""
    drawn = chance.random()
    for name, share in shares.items():
        drawn -= share
        if drawn < 0:
            return name
    return None


def draw_scene(seed: int, index: int, vocab: Vocabulary) -> Scene:
    """Draw scene number `index` of the world `seed`; the same on every machine."""
    chance = dice("scene", seed, index)
    background = pick(chance, list(BACKGROUNDS))
    count = vocab.min_objects + int(chance.random() * (vocab.max_objects - vocab.min_objects + 1))
    kinds: list[tuple[str, str]] = []
    while len(kinds) < count:
        kind = pick(chance, vocab.colours), pick(chance, vocab.shapes)
        if kind not in kinds:  # a colour and a shape together name one thing
            kinds.append(kind)
    textures = [_texture(chance, vocab.textures) for _ in kinds]
    things = [
        Thing(colour, shape, size, texture, x, y, r)
        for (colour, shape), texture, (size, x, y, r) in zip(kinds, textures, _layout(chance, count), strict=True)
    ]
    things.sort(key=lambda thing: (thing.cell[1], thing.cell[0]))
    return Scene(index, seed, background, tuple(things))


def _texture(chance: random.Random, textures: Sequence[str]) -> str:
    """Draw a texture: half of the things are plain if plain is allowed."""
    others = [texture for texture in textures if texture != "plain"]
    if not others or ("plain" in textures and chance.random() < 0.5):
        return "plain"
    return pick(chance, others)


def _layout(chance: random.Random, count: int) -> list[tuple[str, float, float, float]]:
    """Draw (size, x, y, r) for each thing, repeating until all margins are kept."""
    for attempt in itertools.count():
        if attempt % 50 == 0:  # not every choice of sizes fits in the image
            sizes = [pick(chance, list(SIZES)) for _ in range(count)]
        spots: list[tuple[str, float, float, float]] = []
        for size in sizes:
            r = _between(chance, *SIZES[size])
            spot = (size, _coordinate(chance, r), _coordinate(chance, r), r)
            if not all(_clear(spot[1:], other[1:]) for other in spots):
                break
            spots.append(spot)
        else:
            return spots
    raise AssertionError("unreachable: three small things always fit")


def _coordinate(chance: random.Random, r: float) -> float:
    """Draw a coordinate well inside the first, second or last third, for a thing of radius r."""
    low, high = pick(chance, [(r + EDGE, 0.37), (0.45, 0.55), (0.63, 1 - r - EDGE)])
    return _between(chance, low, high)


def _between(chance: random.Random, low: float, high: float) -> float:
    return round(low + (high - low) * chance.random(), 4)


def third(coordinate: float) -> int:
    """Return 0, 1 or 2: in which part of a side, of the three that places name, a coordinate lies."""
    return 0 if coordinate < 0.41 else 2 if coordinate > 0.59 else 1


def _clear(a: tuple[float, float, float], b: tuple[float, float, float]) -> bool:
    """Return whether things at (x, y, r) are apart, in different places, and clearly next to or above each other."""
    dx, dy = abs(a[0] - b[0]), abs(a[1] - b[1])
    apart = math.hypot(dx, dy) >= a[2] + b[2] + GAP
    places = (third(a[0]), third(a[1])) != (third(b[0]), third(b[1]))
    return apart and places and abs(dx - dy) >= CLEAR


def relation(a: Thing, b: Thing) -> str:
    """Return where `a` is, seen from `b`: the larger of the two distances decides."""
    return relation_of(a.x - b.x, a.y - b.y)


def relation_of(dx: float, dy: float) -> str:
    """Return the relation of two things from how far the first is to the right of and below the second."""
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"
