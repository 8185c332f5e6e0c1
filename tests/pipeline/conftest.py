"""One Ray for all tests of this floor: starting it takes about 4 s."""

import io
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config import Recipe, Resources
from pipeline.job import build
from pipeline.storage import Storage

TWO_CPUS = Resources(cpus=2)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[Resources]:
    """Ray on two logical CPUs; gives the resources to run with."""
    import ray

    from pipeline.units import start_ray

    start_ray(TWO_CPUS)
    yield TWO_CPUS
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
def odd_dataset(tmp_path_factory: pytest.TempPathFactory, ray_session: Resources) -> Path:
    """A dataset of 23 samples in three shards, with odd captions and odd extra columns. Not to be changed: copy it."""
    folder = tmp_path_factory.mktemp("odd")
    rows = [
        {
            "image": picture(number),
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
            "shards": {"samples": 10},
        }
    )
    assert build(recipe, progress=False)["counts"]["kept"] == len(rows)
    return folder / "dataset"


def picture(seed: int) -> bytes:
    """A small JPEG, of another size for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 6 + seed, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(np.kron(pixels, np.ones((9, 9, 1), np.uint8))).save(file, "JPEG", quality=90)
    return file.getvalue()
