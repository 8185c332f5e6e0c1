"""(seed, index, vocabulary) → `MovingScene`: the truth about one clip

Every statement about a clip holds by a margin. Things never touch, in no frame; they differ in colour, so that each can
be followed; a thing stands still, or moves by at least three tenths of the image's side. If things enter one after the
other, they do so from left to right, and a thing sounds as it enters: its colour is the pitch, its shape the rhythm.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from capstan.pipeline.world.scene import (
    BACKGROUNDS,
    COLOURS,
    EDGE,
    GAP,
    SIZES,
    Scene,
    Thing,
    Vocabulary,
    dice,
    pick,
)

MOVES: Final[Mapping[str, tuple[int, int]]] = {  # direction, x to the right and y downward
    "stands still": (0, 0),
    "moves left": (-1, 0),
    "moves right": (1, 0),
    "moves up": (0, -1),
    "moves down": (0, 1),
}
STILL: Final = "stands still"
LEAST_MOVE: Final = 0.3  # of the side
_MOST_MOVE: Final = 0.45
PITCHES: Final[Mapping[str, float]] = {name: 330.0 * 1.22**k for k, name in enumerate(COLOURS)}  # hertz
# Shape → how many notes, how long each sounds, and from the start of one to the next, in seconds.
RHYTHMS: Final[Mapping[str, tuple[int, float, float]]] = {
    "circle": (1, 0.40, 0.0),
    "square": (2, 0.12, 0.20),
    "triangle": (3, 0.12, 0.20),
    "star": (4, 0.09, 0.14),
    "cross": (1, 0.12, 0.0),
}
SLOT_S: Final = 0.625  # from one thing's entry to the next one's, at least


@dataclass(frozen=True)
class Moving:
    """A thing at its first place, its move, the way it goes (dx, dy, fractions of the side), and its entry's frame.

    It goes its way from its entry to the clip's end.
    """

    thing: Thing
    move: str
    dx: float
    dy: float
    enters: int = 0

    def at(self, frame: int, frames: int) -> Thing | None:
        """Return the thing as frame number `frame` of `frames` shows it; None before it enters."""
        if frame < self.enters:
            return None
        share = (frame - self.enters) / max(1, frames - 1 - self.enters)
        return replace(self.thing, x=self.thing.x + share * self.dx, y=self.thing.y + share * self.dy)


@dataclass(frozen=True)
class MovingScene:
    """The truth about one clip: `frames` frames at `fps`; things are ordered from left to right at the start."""

    index: int
    seed: int
    background: str
    things: tuple[Moving, ...]
    frames: int
    fps: int

    def still(self, frame: int) -> Scene:
        """Return what one frame shows."""
        shown = [moving.at(frame, self.frames) for moving in self.things]
        return Scene(self.index, self.seed, self.background, tuple(thing for thing in shown if thing is not None))

    @property
    def seconds(self) -> float:
        return self.frames / self.fps


def draw_moving(
    seed: int, index: int, vocab: Vocabulary, *, frames: int = 8, fps: int = 8, entries: bool = False
) -> MovingScene:
    """Draw clip number `index` of the world `seed`; the same on every machine.

    With `entries` things enter one after the other, so that each can be heard; else all are there from the start.
    Raises ValueError if the clip is too short for that many entries.
    """
    slot = math.ceil(SLOT_S * fps)
    if entries and frames < slot * vocab.max_objects:
        raise ValueError(f"{vocab.max_objects} entries need {slot * vocab.max_objects} frames at {fps} per second")
    chance = dice("moving", seed, index, frames, fps, entries)
    background = pick(chance, list(BACKGROUNDS))
    count = vocab.min_objects + int(chance.random() * (vocab.max_objects - vocab.min_objects + 1))
    colours: list[str] = []
    while len(colours) < min(count, len(vocab.colours)):
        colour = pick(chance, vocab.colours)
        if colour not in colours:
            colours.append(colour)
    kinds = [(colour, pick(chance, vocab.shapes), pick(chance, vocab.textures)) for colour in colours]
    enters = [0] * len(kinds)
    if entries:
        spare = frames - slot * len(kinds)
        starts = sorted(int(chance.random() * (spare + 1)) for _ in kinds)
        enters = [slot * number + start for number, start in enumerate(starts)]
    things = [
        replace(moving, thing=replace(moving.thing, colour=colour, shape=shape, texture=texture))
        for moving, (colour, shape, texture) in zip(_paths(chance, enters, frames), kinds, strict=True)
    ]
    return MovingScene(index, seed, background, tuple(things), frames, fps)


def _paths(chance: random.Random, enters: list[int], frames: int) -> list[Moving]:
    """Draw things from left to right, repeating until none touches another in any frame. They have no kind yet."""
    for attempt in itertools.count():
        if attempt % 40 == 0:  # not every choice of sizes and moves fits
            sizes = [pick(chance, list(SIZES)) if len(enters) < 3 else "small" for _ in enters]
            moves = [pick(chance, list(MOVES)) for _ in enters]
        drawn = [_path(chance, size, move) for size, move in zip(sizes, moves, strict=True)]
        drawn.sort(key=lambda moving: moving.thing.x)
        drawn = [replace(moving, enters=start) for moving, start in zip(drawn, enters, strict=True)]
        beside = all(b.thing.x - a.thing.x >= GAP for a, b in itertools.pairwise(drawn))  # which is further left
        if beside and all(_apart(a, b, frames) for a, b in itertools.combinations(drawn, 2)):
            return drawn
    raise AssertionError("unreachable: three small things that stand still always fit")


def _path(chance: random.Random, size: str, move: str) -> Moving:
    low, high = SIZES[size]
    r = round(low + (high - low) * chance.random(), 4)
    across, down = MOVES[move]
    length = 0.0 if move == STILL else LEAST_MOVE + (_MOST_MOVE - LEAST_MOVE) * chance.random()
    x, dx = _line(chance, r, across * length)
    y, dy = _line(chance, r, down * length)
    return Moving(Thing("", "", size, "plain", x, y, r), move, dx, dy)


def _line(chance: random.Random, r: float, way: float) -> tuple[float, float]:
    """Draw a first coordinate from which a thing of radius r can go `way` inside the image; return it and the way."""
    first, last = r + EDGE + max(0.0, -way), 1 - r - EDGE - max(0.0, way)
    if first > last:  # a large thing cannot go so far
        way = math.copysign(1 - 2 * (r + EDGE), way)
        first = last = r + EDGE if way > 0 else 1 - r - EDGE
    return round(first + (last - first) * chance.random(), 4), round(way, 4)


def _apart(a: Moving, b: Moving, frames: int) -> bool:
    """Return whether two things are apart in every frame that shows both."""
    least = a.thing.r + b.thing.r + GAP
    for number in range(max(a.enters, b.enters), frames):
        one, other = a.at(number, frames), b.at(number, frames)
        assert one is not None
        assert other is not None
        if math.hypot(one.x - other.x, one.y - other.y) < least:
            return False
    return True
