"""MovingScene ↔ captions: what is seen, how it moves, in which order it enters; and what is heard"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from capstan.pipeline.world.captions import COUNTS
from capstan.pipeline.world.moving.scene import MOVES, MovingScene
from capstan.pipeline.world.scene import BACKGROUNDS, COLOURS, SHAPES

ORDER: Final = ("first", "then", "last")


@dataclass(frozen=True)
class StatedThing:
    """What a caption says of a thing, in the order in which it names them; "" for a move that it does not name."""

    colour: str
    shape: str
    move: str = ""


@dataclass(frozen=True)
class Stated:
    """What a caption says of a clip; None for what it does not say."""

    background: str | None
    count: int | None
    things: tuple[StatedThing, ...]


def short(scene: MovingScene) -> str:
    """Return every thing with its move: "a red circle moves left and a blue square stands still"."""
    parts = [f"{_named(m.thing.colour, m.thing.shape)} {m.move}" for m in scene.things]
    return _listed(parts)


def descriptive(scene: MovingScene) -> str:
    """Describe a whole clip: background, count, and each thing with its move; with entries, in their order."""
    count = len(scene.things)
    what = f"{COUNTS[count]} {'thing' if count == 1 else 'things'}"
    head = f"on a {scene.background} background there {'is' if count == 1 else 'are'} {what}: "
    if not any(moving.enters for moving in scene.things):
        return f"{head}{short(scene)}."
    words = ORDER if count == 3 else ("first", "last") if count == 2 else ("first",)
    parts = [
        f"{word} {_named(m.thing.colour, m.thing.shape)} enters and {m.move}"
        for word, m in zip(words, scene.things, strict=True)
    ]
    return f"{head}{', '.join(parts)}."


def heard(scene: MovingScene) -> str:
    """Return what is heard, by the things that sound: "the sound of a red circle, then a blue square"."""
    return "the sound of " + ", then ".join(_named(m.thing.colour, m.thing.shape) for m in scene.things)


def _named(colour: str, shape: str) -> str:
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}"


def _listed(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


_THING: Final = re.compile(
    rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b(?: (?:enters and )?({'|'.join(MOVES)})\b)?"
)
_BACKGROUND: Final = re.compile(rf"\b({'|'.join(BACKGROUNDS)}) background\b")
_COUNT: Final = re.compile(rf"\b({'|'.join(COUNTS)}) things?\b")


def read(text: str) -> Stated:
    """Extract what a caption says, in any wording that names things as the captions here do; never raises."""
    plain = " ".join(re.sub(r"[^a-z]+", " ", text.lower()).split())
    background, count = _BACKGROUND.search(plain), _COUNT.search(plain)
    things = tuple(StatedThing(colour, shape, move or "") for colour, shape, move in _THING.findall(plain))
    number = COUNTS.index(count[1]) if count else len(things) or None
    return Stated(background[1] if background else None, number, things)
