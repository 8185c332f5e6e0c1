"""Scene ↔ captions: true descriptions, careless alt texts, and a fact reader.

All wording depends on the scene's seed and index only. `facts` reads the captions of `short` and `descriptive`, and the
same phrases in any caption.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from capstan.pipeline.world.scene import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    Thing,
    Vocabulary,
    dice,
    draw_scene,
    pick,
    pick_share,
    relation,
)
from capstan.pipeline.world.translate import LANGUAGES, translate

COUNTS: Final = ("no", "one", "two", "three")
_HEADS: Final = (
    "a picture with a {background} background and {count} {things}:",
    "on a {background} background there {are} {count} {things}:",
)


def short(scene: Scene) -> str:
    """Return every thing's colour and shape: "a red circle and a blue square"."""
    return _listed([_with_article(f"{thing.colour} {thing.shape}") for thing in scene.things])


def descriptive(scene: Scene) -> str:
    """Describe the whole scene in two sentences of 20 to 50 words: background, count and things, in this order."""
    chance = dice("descriptive", scene.seed, scene.index)
    count = len(scene.things)
    head = pick(chance, _HEADS).format(
        background=scene.background,
        count=COUNTS[count],
        things="thing" if count == 1 else "things",
        are="is" if count == 1 else "are",
    )
    body = _listed([_with_article(_phrase(thing)) for thing in scene.things])
    if count == 1:
        return f"{head} {body}. there is nothing else in the picture."
    a, b = scene.things[:2]
    if chance.random() < 0.5:
        a, b = b, a
    return f"{head} {body}. the {a.colour} {a.shape} is {relation(a, b)} the {b.colour} {b.shape}."


def _phrase(thing: Thing) -> str:
    texture = "" if thing.texture == "plain" else f"{thing.texture} "
    return f"{thing.size} {texture}{thing.colour} {thing.shape} {thing.place}"


def _with_article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


# Kinds of alt text on careless web pages, and how often each occurs.
ALT_KINDS: Final[Mapping[str, float]] = {
    "fragment": 0.30,  # honest, but names no colours
    "partial": 0.20,  # names one thing correctly and omits the others
    "file_name": 0.15,
    "spam": 0.10,
    "other": 0.10,  # another image's caption
    "language": 0.10,  # German, Spanish or French
    "honest": 0.05,
}
_SPAM: Final = (
    "BUY NOW!! Free shipping on all orders",
    "Click here to win a prize",
    "50% OFF – today only – best price guaranteed",
    "Subscribe to our newsletter for more",
    "image may be subject to copyright",
)
_FILE_NAMES: Final = ("IMG_{0:04d}.JPG", "DSC{0:05d}.jpg", "untitled-{0}.png", "banner_{0}_final.jpg", "Screenshot {0}")


def alt_kind(scene: Scene, row: int | None = None) -> str:
    """Return the kind (`ALT_KINDS`) of this row's alt text; `row` is the scene's index unless its image is a copy."""
    drawn = pick_share(_alt_dice(scene, row), ALT_KINDS)
    return drawn or "honest"


def alt(scene: Scene, vocab: Vocabulary | None = None, row: int | None = None) -> str:
    """Return the alt text of a careless web page. `vocab` is the world's (for another image's caption)."""
    chance = _alt_dice(scene, row)
    kind = pick_share(chance, ALT_KINDS)
    if kind == "fragment":
        return _fragment(scene, chance)
    if kind == "partial":
        thing = pick(chance, scene.things)
        return f"{thing.colour} {thing.shape} clip art"
    if kind == "file_name":
        return pick(chance, _FILE_NAMES).format(int(chance.random() * 10_000))
    if kind == "spam":
        return pick(chance, _SPAM)
    if kind == "other":
        elsewhere = scene.index + 1 + int(chance.random() * 1_000_000)
        return short(draw_scene(scene.seed, elsewhere, vocab or Vocabulary()))
    if kind == "language":
        return translate(scene, pick(chance, LANGUAGES))
    return short(scene)


def _alt_dice(scene: Scene, row: int | None) -> random.Random:
    return dice("alt", scene.seed, scene.index if row is None else row)


def _fragment(scene: Scene, chance: random.Random) -> str:
    shapes = [thing.shape for thing in scene.things]
    return pick(chance, (_listed(shapes), f"{shapes[0]} icon", f"drawing of {_listed(shapes)}", "some shapes"))


@dataclass(frozen=True)
class NamedThing:
    """A caption's statements about one thing; None for what it omits."""

    colour: str
    shape: str
    size: str | None = None
    texture: str = "plain"  # descriptions do not mention a plain texture
    place: str | None = None


@dataclass(frozen=True)
class Facts:
    """A caption's statements about a scene; `relation` is ((colour, shape), relation, (colour, shape))."""

    background: str | None
    count: int | None
    things: tuple[NamedThing, ...]
    relation: tuple[tuple[str, str], str, tuple[str, str]] | None


def _one_of(words: Sequence[str]) -> str:
    return "(" + "|".join(sorted(words, key=len, reverse=True)) + ")"


_KIND: Final = f"{_one_of(list(COLOURS))} {_one_of(SHAPES)}"
_ALL_PLACES: Final = [place for row in PLACES for place in row]
_BACKGROUND: Final = re.compile(rf"\b{_one_of(list(BACKGROUNDS))} background\b")
_COUNT: Final = re.compile(rf"\b{_one_of(COUNTS)} things?\b")
_RELATION: Final = re.compile(rf"\bthe {_KIND} is {_one_of(list(RELATIONS))} the {_KIND}\b")
_THING: Final = re.compile(
    rf"\b(?:{_one_of(list(SIZES))} )?(?:{_one_of(TEXTURES)} )?{_KIND}\b(?: {_one_of(_ALL_PLACES)}\b)?"
)


_STATING: Final = frozenset(
    word
    for phrase in (*COLOURS, *SHAPES, *SIZES, *TEXTURES, *BACKGROUNDS, *COUNTS, *_ALL_PLACES, *RELATIONS)
    for word in phrase.split()
) - {"the", "of", "in", "at", "on"}


def stated_words(text: str) -> frozenset[str]:
    """Return the words of a caption with which it could state a fact: colours, shapes, sizes, numbers, places."""
    return _STATING.intersection(re.findall(r"[a-z]+", text.lower()))


def facts(text: str) -> Facts:
    """Extract the facts that a caption states, in any order; never raises."""
    plain = " ".join(re.sub(r"[^a-z]+", " ", text.lower()).split())
    background, count = _BACKGROUND.search(plain), _COUNT.search(plain)
    stated = _RELATION.search(plain)
    things = tuple(
        NamedThing(colour, shape, size, texture or "plain", place)
        for size, texture, colour, shape, place in (
            match.groups() for match in _THING.finditer(_RELATION.sub(" ", plain))
        )
    )
    if count:
        number: int | None = COUNTS.index(count[1])
    else:
        number = len(things) or None
    return Facts(
        background=background[1] if background else None,
        count=number,
        things=things,
        relation=((stated[1], stated[2]), stated[3], (stated[4], stated[5])) if stated else None,
    )


def compare(found: Facts, scene: Scene) -> dict[str, float]:
    """Measure how much of the scene a caption states correctly, each value in [0, 1].

    `colours` and `colour_shape` are shares of the scene's things. `size`, `texture` and `place` are shares of the
    things that the caption names with the right colour and shape (nan if there are none). `relation` is nan for a scene
    of one thing, and 0 if the caption states none.
    """
    truth = {(thing.colour, thing.shape): thing for thing in scene.things}
    named = {(thing.colour, thing.shape): thing for thing in found.things}
    both = [(named[kind], truth[kind]) for kind in truth if kind in named]
    total = len(scene.things)
    return {
        "background": float(found.background == scene.background),
        "count": float(found.count == total),
        "colours": overlap([t.colour for t in found.things], [t.colour for t in scene.things]),
        "colour_shape": len(both) / total,
        "size": _share([a.size == b.size for a, b in both]),
        "texture": _share([a.texture == b.texture for a, b in both]),
        "place": _share([a.place == b.place for a, b in both]),
        "relation": math.nan if total < 2 else float(_holds(found, truth)),
    }


def _holds(found: Facts, truth: Mapping[tuple[str, str], Thing]) -> bool:
    if found.relation is None:
        return False
    a, stated, b = found.relation
    return a in truth and b in truth and a != b and relation(truth[a], truth[b]) == stated


def overlap(found: Sequence[str], wanted: Sequence[str]) -> float:
    """Return the share of `wanted` (a multiset) that is in `found`."""
    return (Counter(found) & Counter(wanted)).total() / len(wanted)


def _share(right: Sequence[bool]) -> float:
    return sum(right) / len(right) if right else math.nan
