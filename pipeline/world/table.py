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
_URL: Final = re.compile(rf"^http://{re.escape(HOST)}/(?P<world>[^/]+)/(?P<index>[0-9]{{8,}})\.jpg$")


def world_name(world: WorldSource) -> str:
    """Return the folder in a world's URLs: it contains or hashes everything that changes the images."""
    images = world.model_dump(mode="json", exclude={"scenes", "captions"})
    return f"seed{world.seed}-{world.size}px-{fingerprint(images)[:8]}"


def url_of(world: WorldSource, index: int) -> str:
    return f"http://{HOST}/{world_name(world)}/{index:08d}.jpg"


def rows(world: WorldSource) -> Iterator[dict[str, Any]]:
    """Yield one row per scene: `url`, `caption` (as `world.captions` says), and `world_index` as a further column.

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
        yield {"url": f"{folder}/{index:08d}.jpg", "caption": caption, "world_index": index}


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
