"""One Ray for the tests of this floor that need it. A real S3 server, and a web site of images."""

import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from capstan.pipeline.build import build
from capstan.pipeline.config import Recipe, Resources
from capstan.pipeline.storage import Storage


@pytest.fixture(scope="session")
def two_cpus() -> Resources:
    """Resources of a small run, whatever machine tests run on."""
    return Resources(cpus=2)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[Resources]:
    """Ray on two logical CPUs; yields the resources to run with."""
    import ray

    from capstan.pipeline.units import start_ray

    resources = Resources(cpus=2, executor="ray")
    start_ray(resources)
    yield resources
    ray.shutdown()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """An empty dataset folder."""
    return Storage(str(tmp_path / "dataset"))


@pytest.fixture(scope="session")
def die():
    """Ends the calling process at once, as the kernel does when memory is out."""

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    return kill


ODD_CAPTIONS = [
    "a plain caption",
    "Ünïcödé, 汉字, عربى, 🦊 and a zero\u200bwidth space",
    " ",
    ".",
    """quotes: "double", 'single', `back`, \\backslash\\ and %s {braces}""",
    "two\nlines\r\nand a\ttab",
    "null",
    "0.25",
    '{"json": [1, 2]}',
    "long " * 5000,
]


@pytest.fixture(scope="session")
def odd_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 23 samples in three shards, with odd captions and odd extra columns. Not to be changed: copy it."""
    folder = tmp_path_factory.mktemp("odd")
    rows = [
        {
            "image": odd_image(number),
            "caption": ODD_CAPTIONS[number % len(ODD_CAPTIONS)],
            "number": number,
            "sometimes": None if number % 2 else 0.5 * number,
            "key": "mine",
            "a.dotted name": {"nested": [number, None]},
            "bytes": b"\xff\x00",
        }
        for number in range(23)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    recipe = Recipe.model_validate(
        {
            "dataset": str(folder / "dataset"),
            "source": {"path": str(folder / "rows.parquet"), "image": "image"},
            "image": {"size": 48, "min_size": 8},
            "dedup": {"exact": False, "perceptual": None},
            "shards": {"samples": 10, "random_access": True},
        }
    )
    assert build(recipe, progress=False)["counts"]["kept"] == len(rows)
    return folder / "dataset"


@pytest.fixture(scope="session")
def hostile_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of the rows in helpers/hostile.py: some kept, dropped, repeated and failed. Not to be changed."""
    folder = tmp_path_factory.mktemp("hostile")
    rows = [hostile.row(number, image) for number in range(hostile.ROWS)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    recipe = Recipe.model_validate(hostile.recipe(str(folder), str(folder / "rows.parquet")))
    build(recipe, progress=False)
    return Path(recipe.dataset)


def odd_image(seed: int) -> bytes:
    """A small JPEG, of another size for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 6 + seed, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(np.kron(pixels, np.ones((9, 9, 1), np.uint8))).save(file, "JPEG", quality=90)
    return file.getvalue()


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """`dataset` and `storage` of a recipe in a bucket of a real S3 server on loopback."""
    (tmp_path / "s3" / "bucket").mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = ["rclone", "serve", "s3", "--auth-key", "capstan-key,capstan-secret", "--addr", address, "."]
    server = subprocess.Popen(
        [str(Path(sys.executable).with_name(command[0])), *command[1:]], cwd=tmp_path / "s3", stderr=subprocess.DEVNULL
    )
    options = {"key": "capstan-key", "secret": "capstan-secret", "endpoint_url": f"http://{address}"}
    for _ in range(200):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", int(address.split(":")[1])), 1):
            break
        time.sleep(0.1)
    yield {"dataset": "s3://bucket/some/dataset", "storage": options}
    server.terminate()
    server.wait()


class Images(ThreadingHTTPServer):
    """A web site of images, /0.jpg, /1.jpg, ..., that look different. `broken` maps paths to the status that they
    answer with; `asked` lists the paths that were asked for, robots.txt left out; `slow_s` delays each answer.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.broken: dict[str, int] = {}
        self.asked: list[str] = []
        self.slow_s = 0.0

    def url(self, number: int) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{number}.jpg"

    def new_asked(self) -> list[str]:
        """The paths asked for since the last call, sorted."""
        asked, self.asked = sorted(self.asked), []
        return asked


class _Answer(BaseHTTPRequestHandler):
    server: Images

    def do_GET(self) -> None:
        if self.path == "/robots.txt":
            self.send_error(404)
            return
        self.server.asked.append(self.path)
        time.sleep(self.server.slow_s)
        if status := self.server.broken.get(self.path):
            self.send_error(status)
            return
        data = image(int(self.path.strip("/").removesuffix(".jpg")))
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def image(seed: int) -> bytes:
    """A small JPEG; those of different seeds look different to a perceptual hash."""
    blocks = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(np.kron(blocks, np.ones((16, 16, 1), np.uint8))).save(file, "JPEG", quality=90)
    return file.getvalue()


@pytest.fixture
def site() -> Iterator[Images]:
    with Images() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def draw() -> Callable[[int], bytes]:
    """The images of the site."""
    return image
