"""`source.world` → the rows (url, caption) of the world; URL → its scene."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

from capstan.pipeline.config import WorldSource, fingerprint
from capstan.pipeline.world.captions import alt, descriptive, short
from capstan.pipeline.world.defects import shown_index
from capstan.pipeline.world.scene import Scene, draw_scene, vocabulary

HOST: Final = "world.capstan.test"  # .test is reserved (RFC 6761): no such host exists outside this machine
_URL: Final = re.compile(rf"^http://{re.escape(HOST)}/(?P<world>[^/]+)/(?P<index>[0-9]{{8,}})\.(?:jpg|mp4)$")


def world_name(world: WorldSource) -> str:
    """Return the folder in a world's URLs: it contains or hashes everything that changes the images."""
    images = world.model_dump(mode="json", exclude={"scenes", "captions"})
    return f"seed{world.seed}-{world.size}px-{fingerprint(images)[:8]}"


def url_of(world: WorldSource, index: int) -> str:
    return f"http://{HOST}/{world_name(world)}/{index:08d}.{'mp4' if world.moving else 'jpg'}"


def rows(world: WorldSource) -> Iterator[dict[str, Any]]:
    """Yield one row per scene: `url`, `caption` (as `world.captions` says), and as further columns `world_index` and
    the truth: `background` and `objects`.

    Raises: RecipeError for a vocabulary that cannot be drawn, before the first row.
    """
    vocab = vocabulary(world)
    folder = url_of(world, 0).rpartition("/")[0]
    for index in range(world.scenes):
        scene = draw_scene(world.seed, shown_index(world, index), vocab)
        if world.captions == "alt":
            caption = alt(scene, vocab, row=index)
        else:
            caption = short(scene) if world.captions == "short" else descriptive(scene)
        row = {"url": f"{folder}/{index:08d}.jpg", "caption": caption, "world_index": index}
        yield row | truth_of(scene)


def truth_of(scene: Scene) -> dict[str, Any]:
    """Return the columns that say what a scene's image shows."""
    return {"background": scene.background, "objects": objects_of(scene)}


def objects_of(scene: Scene) -> list[dict[str, Any]]:
    """Return the things of a scene, from left to right: `label`, `box` (left, top, right, bottom; the image's sides
    are 1), and what else is true of them.

    The form of a dataset with boxes, whose objects may have a label and a box alone.
    """
    return [
        {
            "label": thing.shape,
            "box": [round(centre + edge, 4) for edge in (-thing.r, thing.r) for centre in (thing.x, thing.y)],
            "colour": thing.colour,
            "size": thing.size,
            "texture": thing.texture,
        }
        for thing in scene.things
    ]


def index_of_url(world: WorldSource, url: str) -> int:
    """Return the index in one of this world's URLs.

    Raises: ValueError for any other URL.
    """
    match = _URL.match(url)
    if match is None or match["world"] != world_name(world):
        raise ValueError(f"{url} is not a URL of the world {world_name(world)}")
    return int(match["index"])


def scene_of_url(world: WorldSource, url: str) -> Scene:
    """Return the scene that the image at a URL shows (for a duplicate: the scene of its original).

    Raises: ValueError for a URL that is not this world's.
    """
    return draw_scene(world.seed, shown_index(world, index_of_url(world, url)), vocabulary(world))
