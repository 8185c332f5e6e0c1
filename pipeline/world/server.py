"""The captioned world as a web site on loopback, defects included.

GET /<world>/<index>.jpg → the image, drawn on request, or one of `DEFECTS`; GET /robots.txt allows everything.
The same URL always returns the same bytes. The server is a process of its own, which ends with the process that started
it, however that ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Final

import cv2
import numpy as np
from aiohttp import web

from capstan.pipeline.config import WorldSource
from capstan.pipeline.errors import FROM_TERMINAL, CapstanError
from capstan.pipeline.world.defects import defect, file_format, shown_index
from capstan.pipeline.world.render import encode_jpeg, render
from capstan.pipeline.world.scene import Vocabulary, dice, draw_scene, vocabulary
from capstan.pipeline.world.table import world_name

ROBOTS: Final = "User-agent: *\nAllow: /\n"
TINY: Final = 16  # pixels, both sides
_PAGE: Final = "<!DOCTYPE html><html><head><title>{0}</title></head><body><p>{0}</p></body></html>\n"
_CHECK_S: Final = 0.5  # how often the server checks that its parent is alive


Respond = Callable[[WorldSource, Vocabulary, int], web.Response]


class Site:
    """Context manager that serves a world: `with Site(world) as site: ... site.address`.

    Raises (on entering): RecipeError for a vocabulary that cannot be drawn, CapstanError if the server does not start.
    """

    def __init__(self, world: WorldSource, module: str = "capstan.pipeline.world.server") -> None:
        """Prepare the site of a world that `module`, run as a program, serves."""
        vocabulary(world)
        self._world, self._module = world, module
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0

    @property
    def address(self) -> str:
        """Host and port that it listens on: "127.0.0.1:PORT"."""
        return f"127.0.0.1:{self._port}"

    def __enter__(self) -> Site:
        # -P: a folder named capstan in the working directory must not be taken for this package.
        command = [
            sys.executable,
            "-P",
            "-m",
            self._module,
            str(os.getpid()),
            self._world.model_dump_json(),
        ]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.strip().isdigit():
            self._stop()
            raise CapstanError(f"the captioned world's site did not start (exit code {self._process.returncode})")
        self._port = int(line)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def main(respond: Respond | None = None) -> None:
    """Print the port, then serve until the parent has exited. Arguments: PARENT_PID WORLD_JSON.

    `respond` makes the response for a scene; by default its image, or a defect.
    """
    for number in FROM_TERMINAL:  # a terminal sends them to all; the parent decides
        signal.signal(number, signal.SIG_IGN)
    cv2.setNumThreads(1)
    world = WorldSource.model_validate_json(sys.argv[2])
    asyncio.run(_serve(world, respond or image_or_defect, parent=int(sys.argv[1])))


async def _serve(world: WorldSource, respond: Respond, parent: int) -> None:
    vocab = vocabulary(world)

    async def image(request: web.Request) -> web.Response:
        if request.match_info["world"] != world_name(world):
            return _not_found()
        return respond(world, vocab, int(request.match_info["index"]))

    async def robots(request: web.Request) -> web.Response:
        return web.Response(text=ROBOTS)

    app = web.Application()
    app.router.add_get("/robots.txt", robots)
    app.router.add_get(rf"/{{world}}/{{index:\d{{8,12}}}}.{'mp4' if world.moving else 'jpg'}", image)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    with contextlib.suppress(BrokenPipeError):  # the parent has ended: so will this
        sys.stdout.write(f"{runner.addresses[0][1]}\n")
        sys.stdout.flush()
    while os.getppid() == parent and not stop.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), _CHECK_S)
    await runner.cleanup()


def image_or_defect(world: WorldSource, vocab: Vocabulary, index: int) -> web.Response:
    """Return the site's response for one image."""
    wrong = defect(world, index)
    if wrong == "missing":
        return _not_found()
    if wrong == "html":
        lying = dice("html", world.seed, index).random() < 0.5
        body = _PAGE.format("Please enable JavaScript to see this image").encode()
        return web.Response(body=body, content_type="image/jpeg" if lying else "text/html")
    kind, data = file_bytes(world, vocab, index)
    return web.Response(body=data, content_type=f"image/{kind}")


def _not_found() -> web.Response:
    return web.Response(status=404, text=_PAGE.format("Not found"), content_type="text/html")


def file_bytes(world: WorldSource, vocab: Vocabulary, index: int) -> tuple[str, bytes]:
    """Return (format, bytes) of the image at `index`, defects included."""
    wrong, shown = defect(world, index), shown_index(world, index)
    if wrong == "exact_duplicate":
        return file_bytes(world, vocab, shown)
    scene = draw_scene(world.seed, shown, vocab)
    chance = dice("file", world.seed, index)
    if wrong == "tiny":
        return "jpeg", encode_jpeg(render(scene, min(TINY, world.size)))
    image = render(scene, world.size)
    if wrong == "cut":
        data = encode_jpeg(image)
        return "jpeg", data[: int(len(data) * (0.4 + 0.3 * chance.random()))]
    if wrong == "near_duplicate":
        shift = 4 if chance.random() < 0.5 else -4
        return "jpeg", encode_jpeg(np.clip(image.astype(np.int16) + shift, 0, 255).astype(np.uint8), quality=80)
    if wrong == "rotated":
        return "jpeg", _rotated(image, quarter_turns=1 + int(chance.random() * 3))
    return encode(image, file_format(world, index))


def encode(image: np.ndarray, kind: str) -> tuple[str, bytes]:
    """Encode an RGB image; return (format, bytes)."""
    if kind == "jpeg":
        return kind, encode_jpeg(image)
    options = [cv2.IMWRITE_WEBP_QUALITY, 90] if kind == "webp" else []
    done, data = cv2.imencode(f".{kind}", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)
    assert done
    return kind, data.tobytes()


def _rotated(image: np.ndarray, quarter_turns: int) -> bytes:
    """Encode the image turned anticlockwise, with the EXIF orientation that makes a viewer turn it back."""
    jpeg = encode_jpeg(np.ascontiguousarray(np.rot90(image, quarter_turns)))
    orientation = {1: 6, 2: 3, 3: 8}[quarter_turns]  # 6: show it turned clockwise by 90°
    # TIFF header (big-endian), one directory entry: tag 0x0112, type SHORT, one value; no further directory.
    tiff = b"MM\0*\0\0\0\x08" + b"\0\x01" + b"\x01\x12\0\x03\0\0\0\x01" + bytes([0, orientation, 0, 0]) + b"\0\0\0\0"
    exif = b"Exif\0\0" + tiff
    assert jpeg[:2] == b"\xff\xd8"
    return jpeg[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + jpeg[2:]


if __name__ == "__main__":
    main()
