"""Builds onto a real disk of a few hundred kilobytes, which fills up: said plainly, nothing half-written, goes on."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from small_disk import Disk

from capstan.pipeline import build as stages
from capstan.pipeline.config import Recipe, Resources
from capstan.pipeline.pack.verify import verify
from capstan.pipeline.storage import Storage
from capstan.pipeline.storage.local import PARTIAL

pytestmark = [pytest.mark.integration, pytest.mark.slow]

BLOCK = 4096  # what tmpfs gives a file


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A function: makes the disk, or makes it larger; gives where it is mounted."""
    made: list[Disk] = []

    def mount(size: int) -> Path:
        if made:
            made[0].resize(size)
        else:
            made.append(Disk(tmp_path / "disk", f"size={size}"))
        return made[0].folder

    yield mount
    for disk in made:
        disk.close()


def recipe(dataset: Path) -> Recipe:
    settings = {
        "dataset": str(dataset),
        "source": {"format": "world", "world": {"scenes": 60, "size": 192}},
        "image": {"size": 192, "min_size": 24},
        "unit": {"rows": 10},
        "shards": {"samples": 10},
        "resources": {"cpus": 2},
    }
    return Recipe.model_validate(settings)


def size_of(folder: Path, *below: str) -> int:
    files = [path for name in below for path in (folder / name).rglob("*") if path.is_file()]
    return sum(-(-path.stat().st_size // BLOCK) * BLOCK for path in files)


def published(folder: Path) -> dict[str, bytes]:
    storage = Storage(str(folder))
    return {name: storage.read(name) for name in storage.names() if not name.startswith(("state/", "staged/"))}


def test_a_full_disk_is_said_and_the_same_command_goes_on(
    tmp_path: Path, disk: Callable[[int], Path], two_cpus: Resources
) -> None:
    whole = tmp_path / "whole"
    stages.build(recipe(whole), progress=False)
    file = tmp_path / "recipe.yaml"

    def build() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "capstan", "build", str(file)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    ingested = size_of(whole, "state", "staged")
    sizes = [ingested // 2, ingested + size_of(whole, "ledger", "shards") // 2]
    for size in sizes:  # full while ingesting, and while packing
        place = disk(size)
        file.write_text(recipe(place / "dataset").model_dump_json(exclude_none=True))
        done = build()
        error = done.stderr.splitlines()[-1]
        assert done.returncode == 1, done.stderr
        assert error.startswith(f"error: cannot write to {place}/dataset/")
        assert "No space left on device" in error
        assert f"MB more on the disk at {place} and run the same command again: it resumes" in error
        assert "Traceback" not in done.stderr
        assert not (place / "dataset" / "dataset.json").exists()
        assert not list(place.rglob(f"{PARTIAL}*"))
        assert 0 < len(list(place.rglob("staged/*.tar"))) <= 6

    place = disk(64 << 20)
    done = build()
    assert done.returncode == 0, done.stderr
    assert published(place / "dataset") == published(whole)
    assert verify(Storage(str(place / "dataset"))) == []
