"""`source.world.moving` → the rows (url, caption, truth) of clips"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

from capstan.pipeline.config import WorldSource
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.world.moving.captions import descriptive, heard, short
from capstan.pipeline.world.moving.scene import PITCHES, SLOT_S, Moving, MovingScene, draw_moving
from capstan.pipeline.world.scene import Vocabulary, vocabulary
from capstan.pipeline.world.table import url_of

_CAPTIONS: Final = {"short": short, "descriptive": descriptive, "heard": heard}


def scene_at(world: WorldSource, vocab: Vocabulary, index: int) -> MovingScene:
    """Return clip number `index` of a world that moves."""
    assert world.moving is not None
    moving = world.moving
    return draw_moving(world.seed, index, vocab, frames=moving.frames, fps=moving.fps, entries=moving.entries)


def moving_vocabulary(world: WorldSource) -> Vocabulary:
    """Return the vocabulary of a world that moves.

    Raises: RecipeError for one that cannot be drawn, entries that do not fit a clip, or a rate too low for a pitch.
    """
    vocab, moving = vocabulary(world), world.moving
    assert moving is not None
    needed = math.ceil(SLOT_S * moving.fps) * vocab.max_objects
    if moving.entries and moving.frames < needed:
        problem = f"{moving.frames} frames at {moving.fps} per second are too few for {vocab.max_objects} entries"
        raise RecipeError("source.world.moving.frames", problem, f"set {needed} or more, or lower max_objects")
    highest = max(PITCHES[colour] for colour in vocab.colours)
    if moving.sound is not None and moving.sound <= 2 * highest:
        problem = f"{moving.sound} samples per second cannot hold the highest pitch, {highest:.0f} Hz"
        raise RecipeError("source.world.moving.sound", problem, f"set more than {2 * highest:.0f}, or fewer colours")
    return vocab


def rows(world: WorldSource) -> Iterator[dict[str, Any]]:
    """Yield one row per clip: `url`, `caption`, `world_index` and the truth (`truth_of`).

    Raises: RecipeError for a world that cannot be drawn, before the first row.
    """
    vocab = moving_vocabulary(world)
    for index in range(world.scenes):
        scene = scene_at(world, vocab, index)
        caption = _CAPTIONS[world.captions](scene)
        yield {"url": url_of(world, index), "caption": caption, "world_index": index, **truth_of(scene)}


def truth_of(scene: MovingScene) -> dict[str, Any]:
    """Return the columns that say what a clip shows: those of a still scene, and of each thing its `move`, the way
    that it goes (`dx`, `dy`; the image's sides are 1) and `enters`, its first frame as a fraction of all.

    `box` is a thing's first place.
    """
    return {"background": scene.background, "objects": [_object(moving, scene.frames) for moving in scene.things]}


def _object(moving: Moving, frames: int) -> dict[str, Any]:
    thing = moving.thing
    return {
        "label": thing.shape,
        "box": [round(centre + edge, 4) for edge in (-thing.r, thing.r) for centre in (thing.x, thing.y)],
        "colour": thing.colour,
        "size": thing.size,
        "texture": thing.texture,
        "move": moving.move,
        "dx": moving.dx,
        "dy": moving.dy,
        "enters": moving.enters / frames,
    }
