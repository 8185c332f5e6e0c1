"""`source.world.moving` → the rows (url, caption, truth) of clips"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from capstan.pipeline.config import WorldSource
from capstan.pipeline.world.moving.captions import descriptive, short
from capstan.pipeline.world.moving.scene import Moving, MovingScene, draw_moving
from capstan.pipeline.world.scene import Vocabulary, vocabulary
from capstan.pipeline.world.table import url_of


def scene_at(world: WorldSource, vocab: Vocabulary, index: int) -> MovingScene:
    """Return clip number `index` of a world that moves."""
    assert world.moving is not None
    return draw_moving(world.seed, index, vocab, frames=world.moving.frames, fps=world.moving.fps)


def rows(world: WorldSource) -> Iterator[dict[str, Any]]:
    """Yield one row per clip: `url`, `caption`, `world_index` and the truth (`truth_of`).

    Raises: RecipeError for a vocabulary that cannot be drawn, before the first row.
    """
    vocab = vocabulary(world)
    for index in range(world.scenes):
        scene = scene_at(world, vocab, index)
        caption = short(scene) if world.captions == "short" else descriptive(scene)
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
