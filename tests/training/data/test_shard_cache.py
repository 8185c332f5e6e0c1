"""Whole shards of a bucket are copied ahead, once a machine, within the bound; what is read is the same."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3 import S3

from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage import Storage
from capstan.training.config import Data
from capstan.training.data.dataset import TrainingData
from capstan.training.data.shard_cache import ShardCache


class Counted(Storage):
    """Counts the requests for parts of files."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.asked: list[tuple[str, int, int]] = []

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        self.asked.append((name, start, stop))
        return super().read_range(name, start, stop)


@pytest.fixture
def files(tmp_path: Path) -> Counted:
    """Five files of 1000 bytes each."""
    storage = Counted(str(tmp_path / "files"))
    for number in range(5):
        storage.write(str(number), bytes([number]) * 1000)
    return storage


def wait_for(condition) -> None:
    for _ in range(12_000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("did not happen in time")


def copies(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in folder.iterdir() if path.is_file() and len(path.name) == 32]


def test_the_least_recently_used_goes_unless_it_is_in_use(files: Counted, tmp_path: Path) -> None:
    cache = ShardCache(files, tmp_path / "cache", 3500)
    held = cache.fetch("0", "a")
    for name in ("1", "2"):
        assert cache.fetch(name, "a").data[:] == files.read(name)
    cache.open("1", "a")  # used again: now 2 is the oldest that nobody holds
    assert cache.fetch("3", "a").data[:1] == b"\3"
    assert held.data[:1] == b"\0"
    assert sorted(copy[0] for copy in copies(tmp_path / "cache")) == [0, 1, 3]
    assert cache.open("2", "a") is None
    assert cache.open("1", "another content") is None


def test_where_all_is_in_use_there_is_no_copy(files: Counted, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = ShardCache(files, tmp_path / "cache", 2500)
    held = [cache.fetch(name, "a") for name in "01"]
    assert cache.fetch("2", "a") is None
    assert "has no space" in caplog.text
    assert sum(map(len, copies(tmp_path / "cache"))) == 2000
    held.clear()
    assert cache.fetch("2", "a") is not None


def test_processes_share_a_folder_and_copy_each_file_once(files: Counted, tmp_path: Path) -> None:
    """Several at once; the log of what each has copied has every file once, and the bound holds all the time."""
    code = (
        "import sys; from pathlib import Path; from capstan.pipeline.storage import Storage\n"
        "from capstan.training.data.shard_cache import ShardCache\n"
        "class Slow(Storage):\n"
        "    def read_range(self, name, start, stop):\n"
        "        import time; time.sleep(0.05); print(name, flush=True)\n"
        "        return super().read_range(name, start, stop)\n"
        "cache = ShardCache(Slow(sys.argv[1]), Path(sys.argv[2]), 10_000)\n"
        "for name in '01234': assert cache.fetch(name, 'a').data[:] == bytes([int(name)]) * 1000\n"
    )
    command = [sys.executable, "-c", code, files.url, str(tmp_path / "cache")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    said = [process.communicate(timeout=300)[0].split() for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert sorted([*said[0], *said[1]]) == list("01234")


def test_a_killed_copy_leaves_nothing_that_counts(files: Counted, tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from capstan.pipeline.storage import Storage\n"
        "from capstan.training.data.shard_cache import ShardCache\n"
        "class Killed(Storage):\n"
        "    def read_range(self, *_): os._exit(9)\n"
        "ShardCache(Killed(sys.argv[1]), Path(sys.argv[2]), 1500).fetch('0', 'a')\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, files.url, str(tmp_path / "cache")]
    assert subprocess.run(command, env=environment, check=False).returncode == 9
    assert any(path.name.startswith(".partial-") for path in (tmp_path / "cache").iterdir())
    cache = ShardCache(files, tmp_path / "cache", 1500)
    assert cache.fetch("0", "a").data[:] == files.read("0")


def test_a_copy_that_is_not_what_the_manifest_says_is_not_published(
    files: Counted, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ShardCache(files, tmp_path / "cache", 10_000)
    cache.prefetch("0", "a", "0" * 64)
    wait_for(lambda: "capstan verify" in caplog.text)
    cache.close()
    assert copies(tmp_path / "cache") == []


def test_a_folder_that_cannot_be_made_is_named(files: Counted, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match=r"train\.data\.cache\.folder"):
        ShardCache(files, tmp_path / "file" / "cache", 1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with (
        pytest.MonkeyPatch.context() as patch,
        S3(tmp_path_factory.mktemp("s3"), "capstan-key", "capstan-secret") as s3,
    ):
        for name, value in s3.env.items():
            patch.setenv(name, value)
        yield s3


@pytest.mark.integration
def test_training_on_a_bucket_reads_whole_shards_ahead(server: S3, make_dataset, tmp_path: Path) -> None:
    folder, how = make_dataset(server.folder / "bucket" / "ds", [20] * 6), Data(layer=None, block=2)
    local = TrainingData(Dataset(Storage(str(folder))), how, 7, layer=None)
    storage = Counted("s3://bucket/ds", server.storage())
    dataset = Dataset(storage)
    tar = dataset.manifest.shards[0].bytes
    cache = ShardCache(storage, tmp_path / "cache", 4 * tar)  # two windows of two shards
    data = TrainingData(dataset, how, 7, layer=None, cache=cache)
    here = tmp_path / "cache"

    assert data.at(0) == local.at(0)  # at once, by a request of its own
    for number in range(1, 120):
        if number % 40 in (1, 0):
            wait_for(lambda: not cache._requested)  # what is ahead is there
        assert data.at(number) == local.at(number)
        assert sum(map(len, copies(here))) <= cache.limit
    tars = [(name, stop - start == tar) for name, start, stop in storage.asked if name.endswith(".tar")]
    copied = Counter(name for name, whole in tars if whole)
    assert copied.keys() == {entry.tar for entry in dataset.manifest.shards}
    assert copied.total() <= 6 + 2  # each once, and those that the next epoch begins with
    assert sum(not whole for _, whole in tars) <= 1  # the first sample, unless its copy was sooner there
    cache.close()


def test_a_cache_too_small_to_read_ahead_says_so(
    make_dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = Dataset(Storage(str(make_dataset(tmp_path / "ds", [4, 4]))))
    cache = ShardCache(dataset.storage, tmp_path / "cache", dataset.manifest.shards[0].bytes)
    assert cache.fits(dataset, 1)
    assert not cache.fits(dataset, 2)
    assert "too small to prefetch shards. Fix: set train.data.cache.gib:" in caplog.text
