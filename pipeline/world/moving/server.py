"""The moving world as a web site on loopback: GET /<world>/<index>.mp4 → the clip, drawn on request. Needs PyAV."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from capstan.pipeline.config import WorldSource
from capstan.pipeline.config.cut import Cut
from capstan.pipeline.media.codec import Scaler, VideoWriter, with_sound
from capstan.pipeline.world.moving.render import frames_of, samples_of
from capstan.pipeline.world.moving.table import scene_at
from capstan.pipeline.world.scene import Vocabulary
from capstan.pipeline.world.server import Site, main

_CUT: Final = Cut(chroma="444", crf=4)  # next to nothing is lost before the clips are cut


class MovingSite(Site):
    """Context manager that serves the clips of a world, as `Site` serves images."""

    def __init__(self, world: WorldSource) -> None:
        super().__init__(world, __spec__.name)


def clip(world: WorldSource, vocab: Vocabulary, index: int) -> web.Response:
    """Return the site's response for one clip, with its sound if the world has any."""
    assert world.moving is not None
    scene, rate = scene_at(world, vocab, index), world.moving.sound
    scaler = Scaler(world.size, world.size, "yuv444p")
    writer = VideoWriter(world.size, world.size, world.moving.fps, _CUT)
    try:
        for frame in frames_of(scene, world.size):
            writer.add(scaler.from_rgb(frame))
        mp4 = writer.finish()
        mp4 = mp4 if rate is None else with_sound(mp4, samples_of(scene, rate), rate)
        return web.Response(body=mp4, content_type="video/mp4")
    finally:
        writer.close()


if __name__ == "__main__":
    main(clip)
