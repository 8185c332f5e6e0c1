"""`capstan cut`: videos from folders, tars, tables and the web → clips that other tools read, and a row per video."""

from __future__ import annotations

import gc
import io
import json
import signal
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import web_site
from moving import BLUE, GREEN, RED, hugging_face_clips, middle, movie, seconds_of, shown, tone

from capstan.cluster import cli
from capstan.pipeline.clips import job as clips_job
from capstan.pipeline.clips.clip import CutFile, cut_file
from capstan.pipeline.clips.cut import cut
from capstan.pipeline.config import Recipe
from capstan.pipeline.config.cut import Cut
from capstan.pipeline.dataset.shards import CLIPS
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.ingest.guarded import guarded

TWO = movie(seconds_of([RED, BLUE]), sound=tone(5.0), form="matroska")
ONE = movie(seconds_of([GREEN], each=3.0))


def recipe(folder: Path, source: Any, **more: Any) -> Recipe:
    settings = {
        "dataset": str(folder / "clips"),
        "source": source if isinstance(source, Mapping) else {"path": str(source)},
        "cut": {"fps": 8, "size": 64, "min_size": 16, "videos": 2} | more.pop("cut", {}),
        "resources": {"cpus": 1},
    }
    return Recipe.model_validate(settings | more)


def ledger(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of the ledger, by the last part of their URL."""
    tables = [pq.read_table(path) for path in sorted((folder / "clips/ledger").glob("*.parquet"))]
    return {row["url"].rpartition("/")[2]: row for table in tables for row in table.to_pylist()}


def samples(folder: Path) -> list[dict[str, bytes]]:
    """The samples of all tars, in order: suffix → bytes, and `key`."""
    found: list[dict[str, Any]] = []
    for path in sorted((folder / "clips/shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                if not found or found[-1]["key"] != key:
                    found.append({"key": key})
                content = tar.extractfile(member)
                assert content is not None
                found[-1][suffix] = content.read()
    return found


def files(folder: Path) -> dict[str, bytes]:
    """What a reader sees of a dataset of clips."""
    root = folder / "clips"
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.tar"))} | {
        str(path.relative_to(root)): path.read_bytes() for path in sorted(root.glob("ledger/*.parquet"))
    }


def write_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "two.mkv").write_bytes(TWO)
    (folder / "two.txt").write_text("red, then blue")
    (folder / "one.MP4").write_bytes(ONE)
    (folder / "one.json").write_text(json.dumps({"caption": "green", "license": "CC0-1.0"}))
    (folder / "page.mov").write_bytes(b"<!doctype html>" * 20)
    (folder / "empty.webm").write_bytes(b"")
    (folder / "half.mp4").write_bytes(ONE[:-900])
    return folder


def test_a_folder_of_videos(tmp_path: Path) -> None:
    summary = cut(recipe(tmp_path, write_folder(tmp_path / "in")), progress=False)
    assert summary["counts"] == {"videos": 5, "failed": 3, "clips": 3, "seconds": 8.0}
    assert summary["failed"] == {"empty": 1, "no_video": 1, "truncated": 1}
    rows = ledger(tmp_path)
    assert {name: (row["outcome"], row["reason"], row["clips"]) for name, row in rows.items()} == {
        "two.mkv": ("kept", "", 2),
        "one.MP4": ("kept", "", 1),
        "page.mov": ("failed", "no_video", 0),
        "empty.webm": ("failed", "empty", 0),
        "half.mp4": ("failed", "truncated", 0),
    }
    two = rows["two.mkv"]
    assert (two["codec"], two["sound_codec"], two["width"], two["height"], two["fps"]) == ("h264", "flac", 96, 64, 8.0)
    assert json.loads(rows["one.MP4"]["extra"]) == {"license": "CC0-1.0"}
    found = samples(tmp_path)
    assert [sorted(sample.keys() - {"key"}) for sample in found if sample["txt"] == b"red, then blue"] == [
        ["flac", "jpg", "json", "mp4", "txt"]
    ] * 2
    for sample in found:
        fields = json.loads(sample["json"])
        assert fields["key"] == sample["key"]
        assert fields["caption"] == sample["txt"].decode()
        assert len(shown(sample["mp4"])) == fields["frames"]
        assert fields["end_s"] - fields["start_s"] == fields["frames"] / fields["fps"]
        assert None not in fields.values()
        assert fields["parent"] in {row["key"] for row in rows.values()}
    assert len({sample["key"] for sample in found}) == 3


def test_the_manifest_lists_all_that_is_there(tmp_path: Path) -> None:
    cut(recipe(tmp_path, write_folder(tmp_path / "in")), progress=False)
    manifest = json.loads((tmp_path / "clips" / CLIPS).read_text())
    assert manifest["complete"]
    assert sum(shard["samples"] for shard in manifest["shards"]) == manifest["counts"]["clips"] == 3
    assert sum(table["rows"] for table in manifest["ledger"]) == 5
    names = {f"shards/{shard['name']}.tar" for shard in manifest["shards"]}
    names |= {f"ledger/{table['name']}.parquet" for table in manifest["ledger"]}
    assert names == files(tmp_path).keys()


@pytest.mark.parametrize("setting", [{"cpus": 2, "executor": "processes"}, {"cpus": 1, "executor": "processes"}])
def test_bytes_do_not_depend_on_the_workers(tmp_path: Path, setting: dict[str, Any]) -> None:
    source = write_folder(tmp_path / "in")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    cut(recipe(tmp_path / "a", source, cut={"videos": 1}), progress=False)
    cut(recipe(tmp_path / "b", source, cut={"videos": 1}, resources=setting), progress=False)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_second_run_does_nothing_and_other_settings_do_it_again(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in")
    cut(recipe(tmp_path, source), progress=False)
    first = files(tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "clips/shards").iterdir()}
    again = cut(recipe(tmp_path, source), progress=False)
    assert again["counts"]["clips"] == 3
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "clips/shards").iterdir()} == stamps
    assert cut(recipe(tmp_path, source, cut={"seconds": [2.8, 8]}), progress=False)["counts"]["clips"] == 1
    assert len(samples(tmp_path)) == 1
    cut(recipe(tmp_path, source), progress=False)
    assert files(tmp_path) == first


def test_new_videos_are_added_and_old_ones_are_not_cut_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_folder(tmp_path / "in")
    cut(recipe(tmp_path, source), progress=False)
    before = files(tmp_path)
    (source / "new.mp4").write_bytes(movie(seconds_of([BLUE], each=4.0)))
    summary = cut(recipe(tmp_path, source), progress=False)
    assert (summary["counts"]["videos"], summary["counts"]["clips"]) == (6, 4)
    assert {name: data for name, data in files(tmp_path).items() if name in before} == before


def test_a_tar_and_a_table_of_embedded_videos(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        for name, data in {
            "a.mp4": ONE,
            "a.txt": b"green",
            "b.jpg": b"no video",
            "c.mkv": TWO,
            "c.json": b"{}",
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert cut(recipe(tmp_path, tmp_path / "in.tar"), progress=False)["counts"] == {
        "videos": 2, "failed": 0, "clips": 3, "seconds": 8.0
    }  # fmt: skip
    (tmp_path / "other").mkdir()
    pq.write_table(pa.table({"video": [ONE, b"x"], "caption": ["green", "none"]}), tmp_path / "in.parquet")
    embedded = recipe(tmp_path / "other", {"path": str(tmp_path / "in.parquet"), "image": "video"})
    assert cut(embedded, progress=False)["counts"]["clips"] == 1


def test_each_video_is_fetched_once_and_retried_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with web_site.Site() as site:
        urls = [site.page("/one.mp4", ONE), site.page("/two.mkv", TWO), site.page("/busy.mp4", b"", status=404)]
        pq.write_table(pa.table({"url": urls, "caption": ["green", "both", "?"]}), tmp_path / "urls.parquet")
        made = recipe(tmp_path, tmp_path / "urls.parquet", fetch={"retries": 0, "robots": False, "timeout_s": 5})
        resolve = {web_site.HOST: f"127.0.0.1:{site.port}"}
        create = clips_job.CutVideos.__init__
        monkeypatch.setattr(
            clips_job.CutVideos, "__init__", lambda self, recipe, storage: create(self, recipe, storage, resolve)
        )
        summary = cut(made, progress=False)
        assert summary["failed"] == {"http_404": 1}
        assert [site.asked(path) for path in ("/one.mp4", "/two.mkv", "/busy.mp4")] == [1, 1, 1]
        site.page("/busy.mp4", ONE + b"\0\0\0\x08free")
        assert cut(made, progress=False)["failed"] == {"http_404": 1}
        summary = cut(made, retry="http_404", progress=False)
        assert (summary["failed"], summary["counts"]["clips"]) == ({}, 4)
        assert ledger(tmp_path)["busy.mp4"]["outcome"] == "kept"


def test_videos_of_a_blocklist_are_neither_fetched_nor_listed(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in")
    sum_of_two = cut_file(TWO, Cut(fps=8, min_size=16), 95)
    assert isinstance(sum_of_two, CutFile)
    (tmp_path / "sums.txt").write_text(sum_of_two.sha256)
    summary = cut(recipe(tmp_path, source, blocklist={"sha256": str(tmp_path / "sums.txt")}), progress=False)
    assert summary["counts"]["clips"] == 1
    row = ledger(tmp_path)["two.mkv"]
    assert (row["outcome"], row["reason"], row["sha256"]) == ("rejected", "removed", "")


def test_webdataset_and_hugging_face_read_the_clips(tmp_path: Path) -> None:
    import webdataset

    cut(recipe(tmp_path, write_folder(tmp_path / "in")), progress=False)
    tars = [str(path) for path in sorted((tmp_path / "clips/shards").glob("*.tar"))]
    read = list(webdataset.WebDataset(tars, shardshuffle=False).decode("pil"))
    assert len(read) == 3
    for sample in read:
        assert len(shown(sample["mp4"])) == sample["json"]["frames"]
        assert middle(shown(sample["mp4"])[0]) == pytest.approx(sample["jpg"].getpixel((48, 32)), abs=12)
    rows = hugging_face_clips(tars, str(tmp_path / "hf"), read[0]["json"])
    assert {row["__key__"]: row["mp4"] for row in rows} == {s["__key__"]: s["mp4"] for s in read}


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RecipeError, match="no file at"):
        cut(recipe(tmp_path, tmp_path / "nothing"), progress=False)
    (tmp_path / "clips").mkdir(exist_ok=True)
    (tmp_path / "clips/dataset.json").write_text("{}")
    with pytest.raises(RecipeError, match="choose another folder for the clips"):
        cut(recipe(tmp_path, write_folder(tmp_path / "in")), progress=False)
    path = tmp_path / "recipe.yaml"
    path.write_text("dataset: x\nsource: {path: in}\ncut: {seconds: [8, 2]}\n")
    assert cli.run(["cut", str(path)]) == 2
    assert "cut: seconds must be [shortest, longest]" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["hangs", "dies"])
def test_a_file_that_ends_or_stops_the_codec_costs_its_own_row(how: str) -> None:
    def decoder(data: bytes) -> Any:
        time.sleep(60 if how == "hangs" else 0)
        signal.raise_signal(signal.SIGKILL)

    with guarded(decoder, is_retry=True, seconds=3.0) as decode:
        assert decode(ONE).reason == "corrupt"


def test_nothing_leaks() -> None:
    """Two hundred files, a third of them broken, need no more memory than a few."""
    settings = Cut(fps=8, min_size=16, size=64)
    broken = [ONE[:-900], TWO[: len(TWO) // 2], TWO[:700] + bytes(500) + TWO[1200:]]
    process = psutil.Process()

    def some() -> float:
        for data in (TWO, ONE, *broken) * 5:
            cut_file(data, settings, 95)
        gc.collect()
        return process.memory_info().rss / 2**20

    some()
    before, handles = some(), process.num_fds()
    assert max(some() for _ in range(6)) - before < 12, "MiB"
    assert process.num_fds() == handles
