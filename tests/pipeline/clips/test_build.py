"""Clips as rows of a dataset: what `capstan cut` wrote goes through build, select, takedown and verify like images."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
from moving import hugging_face_clips, movie, shown, tone

from capstan.pipeline.build import build, remove, repair, select
from capstan.pipeline.clips.cut import cut
from capstan.pipeline.config import Blocklist, Recipe
from capstan.pipeline.dataset.shards import Dataset, read_manifest
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.pack.verify import verify
from capstan.pipeline.storage import Storage

VIDEOS = 6


def noisy(seed: int, frames: int = 24) -> list[np.ndarray]:
    """A picture unlike those of other seeds, which moves."""
    still = np.random.default_rng(seed).integers(0, 255, (8, 12, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    return [np.roll(still, 3 * number, axis=1) for number in range(frames)]


@pytest.fixture(scope="module")
def cut_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of six videos, every second one with sound."""
    folder = tmp_path_factory.mktemp("cut")
    (folder / "in").mkdir()
    for number in range(VIDEOS):
        sound = tone(3.0, hertz=200.0 * (number + 1)) if number % 2 else None
        data = movie(noisy(number, 24 + 8 * number), sound=sound, form="matroska")
        (folder / f"in/{number}.mkv").write_bytes(data)
        (folder / f"in/{number}.txt").write_text(f"video {number}")
    made = {
        "dataset": str(folder / "clips"),
        "source": {"path": str(folder / "in")},
        "cut": {"by": "none", "fps": 8, "size": 64, "min_size": 16, "videos": 4, "seconds": [2, 9]},
        "resources": {"cpus": 1},
    }
    assert cut(Recipe.model_validate(made), progress=False)["counts"]["clips"] == VIDEOS
    return folder / "clips"


def recipe(folder: Path, clips: Path, **more: Any) -> Recipe:
    settings = {
        "dataset": str(folder / "ds"),
        "source": {"path": str(clips / "shards/*.tar"), "parts": ["mp4", "flac"]},
        "image": {"resize": "none", "min_size": 16},
        "dedup": {"exact": False, "perceptual": None},
        "shards": {"samples": 4, "random_access": True},
        "unit": {"rows": 4},
        "resources": {"cpus": 1},
    }
    return Recipe.model_validate(settings | more)


def members(tars: Iterable[Path]) -> dict[str, bytes]:
    """The members of tars by name, in order."""
    found = {}
    for path in sorted(tars):
        with tarfile.open(path) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    return found


def by_caption(files: dict[str, bytes]) -> dict[str, dict[str, bytes]]:
    """The samples among members of tars: caption → suffix → bytes."""
    samples: dict[str, dict[str, bytes]] = {}
    for name, data in files.items():
        key, _, suffix = name.partition(".")
        samples.setdefault(key, {})[suffix] = data
    return {sample["txt"].decode(): sample for sample in samples.values()}


def shards(folder: Path) -> list[Path]:
    return list((folder / "ds/shards").glob("*.tar"))


@pytest.fixture(scope="module")
def built(cut_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a dataset of clips. Not to be changed: copy it."""
    folder = tmp_path_factory.mktemp("built")
    assert build(recipe(folder, cut_folder), progress=False)["counts"]["kept"] == VIDEOS
    return folder


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built / "ds", tmp_path / "ds")
    return tmp_path


def test_every_clip_is_a_sample_with_its_video_and_sound(built: Path, cut_folder: Path) -> None:
    before, files = by_caption(members(cut_folder.glob("shards/*.tar"))), members(shards(built))
    after = by_caption(files)
    assert after.keys() == before.keys()
    for caption, sample in after.items():
        assert sample["mp4"] == before[caption]["mp4"]
        assert sample.get("flac") == before[caption].get("flac")
        fields, known = json.loads(sample["json"]), json.loads(before[caption]["json"])
        for name in ("fps", "frames", "start_s", "end_s", "parent", "codec", "sample_rate", "channels"):
            assert fields[name] == known[name], name
        assert isinstance(fields["fps"], float)
        assert None not in fields.values()
    suffixes = [name.partition(".")[2] for name in files]
    assert "".join(suffix[0] for suffix in suffixes).replace("jmfjt", "") == ""


def test_the_tables_locate_each_part_and_have_the_clips_facts(built: Path) -> None:
    dataset = Dataset(Storage(str(built / "ds")))
    for name in dataset.shard_names:
        tar = (built / f"ds/shards/{name}.tar").read_bytes()
        for row in dataset.table(name).to_pylist():
            frames = shown(tar[row["mp4_offset"] : row["mp4_offset"] + row["mp4_size"]])
            assert len(frames) == row["frames"]
            assert tar[row["flac_offset"] :][:4] == b"fLaC"
        for key, jpeg, parts in dataset.read_samples(name):
            assert jpeg[:2] == b"\xff\xd8"
            assert parts["mp4"][4:8] == b"ftyp"
            assert len(key) == 32
    assert sorted(dataset.ledger()["frames"].to_pylist()) == [24 + 8 * number for number in range(VIDEOS)]


def test_a_dataset_of_clips_verifies(built: Path) -> None:
    assert verify(Storage(str(built / "ds"))) == []


@pytest.mark.parametrize("part", [b"ftyp", b"fLaC", b"mdat"])
def test_damage_in_a_part_is_found_and_repaired(copied: Path, cut_folder: Path, part: bytes) -> None:
    path = sorted(shards(copied))[0]
    whole = path.read_bytes()
    at = whole.index(part) + 8
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    storage = Storage(str(copied / "ds"))
    assert any(path.name in problem for problem in verify(storage))
    assert repair(str(copied / "ds"), progress=False)["ok"]
    assert path.read_bytes() == whole


def test_damage_in_a_staged_part_is_found_when_it_is_packed(copied: Path, cut_folder: Path) -> None:
    before = members(shards(copied))
    for path in (copied / "ds/staged").glob("*.tar"):
        data = bytearray(path.read_bytes())
        data[data.index(b"mdat") + 40] ^= 1
        path.write_bytes(data)
    shutil.rmtree(copied / "ds/shards")
    summary = build(recipe(copied, cut_folder), progress=False)
    assert summary["quarantined"] or summary["counts"]["kept"] == VIDEOS
    summary = build(recipe(copied, cut_folder), progress=False)
    assert (summary["counts"]["kept"], summary["quarantined"]) == (VIDEOS, {})
    assert members(shards(copied)) == before


def test_clips_are_selected_by_their_facts(copied: Path, cut_folder: Path) -> None:
    conditions = [
        {"name": "long", "where": "end_s - start_s >= 4"},
        {"name": "heard", "where": "sample_rate > 0"},
    ]
    made = recipe(copied, cut_folder, select=conditions)
    assert select(made, progress=False)["counts"]["kept"] == 3
    assert verify(Storage(str(copied / "ds"))) == []
    assert by_caption(members(shards(copied))).keys() == {"video 1", "video 3", "video 5"}
    without = Recipe.model_validate(made.model_dump() | {"source": {"path": "x.tar"}})
    with pytest.raises(RecipeError, match=r"source\.parts"):
        build(without, progress=False)


def test_clips_are_scored_and_selected_by_their_scores(copied: Path, cut_folder: Path) -> None:
    conditions = [{"name": "moves", "where": "video_motion >= 5"}, {"name": "loud", "where": "sound_loudness > -40"}]
    made = recipe(copied, cut_folder, select=conditions, score={"video": {}, "sound": {}, "image": {}})
    assert build(made, progress=False)["counts"]["kept"] == 3
    storage = Storage(str(copied / "ds"))
    assert verify(storage) == []
    rows = Dataset(storage).ledger().to_pylist()
    assert all((row["sound_silence"] == 1) == (row["channels"] == 0) for row in rows)
    assert all(row["video_static"] == 0 and row["image_quality"] > 80 for row in rows)
    assert {row["score_error"] for row in rows} == {""}


def test_shards_do_not_depend_on_the_workers_or_on_freed_files(built: Path, cut_folder: Path, tmp_path: Path) -> None:
    made = recipe(tmp_path, cut_folder, keep_staged=False, resources={"cpus": 2, "executor": "processes"})
    build(made, progress=False)
    assert not list((tmp_path / "ds/staged").glob("*.tar"))
    assert members(shards(tmp_path)) == members(shards(built))
    build(made.model_copy(update={"shards": made.shards.model_copy(update={"samples": 3})}), progress=False)
    assert verify(Storage(str(tmp_path / "ds"))) == []
    assert by_caption(members(shards(tmp_path))) == by_caption(members(shards(built)))


def test_a_takedown_removes_every_part(copied: Path, cut_folder: Path) -> None:
    dataset = Dataset(Storage(str(copied / "ds")))
    row = dataset.ledger().filter(pc.equal(dataset.ledger()["caption"], "video 3")).to_pylist()[0]
    video = by_caption(members(shards(copied)))["video 3"]
    (copied / "keys.txt").write_text(row["key"])
    remove(str(copied / "ds"), Blocklist(keys=str(copied / "keys.txt")), progress=False)
    storage = Storage(str(copied / "ds"))
    assert verify(storage) == []
    left = b"".join(path.read_bytes() for path in (copied / "ds").rglob("*") if path.is_file())
    for suffix in ("jpg", "mp4", "flac"):
        assert video[suffix] not in left
    assert len(by_caption(members(shards(copied)))) == VIDEOS - 1
    manifest = read_manifest(storage)
    assert manifest is not None
    assert manifest.complete


def test_parts_that_are_no_videos_fail(tmp_path: Path, cut_folder: Path) -> None:
    (tmp_path / "in").mkdir()
    first = sorted(cut_folder.glob("shards/*.tar"))[0]
    with tarfile.open(first) as source, tarfile.open(tmp_path / "in/a.tar", "w", tarfile.USTAR_FORMAT) as target:
        done = False
        for member in source:
            data = source.extractfile(member).read()  # type: ignore[union-attr]
            if member.name.endswith(".mp4") and not done:
                data, done = b"#!/bin/sh\nrm -rf ~\n", True
            member.size = len(data)
            target.addfile(member, io.BytesIO(data))
    shutil.copytree(tmp_path / "in", tmp_path / "shards")
    summary = build(recipe(tmp_path, tmp_path), progress=False)
    assert summary["failed"] == {"corrupt": 1}
    assert summary["counts"]["kept"] == len(by_caption(members([first]))) - 1
    assert verify(Storage(str(tmp_path / "ds"))) == []


def test_without_parts_only_images_are_taken(tmp_path: Path, cut_folder: Path) -> None:
    build(recipe(tmp_path, cut_folder, source={"path": str(cut_folder / "shards/*.tar")}), progress=False)
    assert {name.partition(".")[2] for name in members(shards(tmp_path))} == {"jpg", "json", "txt"}
    assert "mp4_size" not in Dataset(Storage(str(tmp_path / "ds"))).table("shard-000000").column_names


def test_the_folder_of_the_clips_is_not_that_of_the_dataset(cut_folder: Path) -> None:
    made = recipe(cut_folder, cut_folder, dataset=str(cut_folder))
    with pytest.raises(RecipeError, match="holds the clips"):
        build(made, progress=False)


# Other people's readers -----------------------------------------------------------------------------------------------


def test_webdataset(built: Path) -> None:
    import webdataset

    tars = [str(path) for path in sorted(shards(built))]
    read = list(webdataset.WebDataset(tars, shardshuffle=False).decode("pil"))
    assert len(read) == VIDEOS
    for sample in read:
        assert len(shown(sample["mp4"])) == sample["json"]["frames"]
        assert sample["flac"][:4] == b"fLaC"


def test_hugging_face(built: Path, tmp_path: Path) -> None:
    tars = [str(path) for path in sorted(shards(built))]
    expected = by_caption(members(shards(built)))
    read = hugging_face_clips(tars, str(tmp_path), json.loads(expected["video 0"]["json"]))
    assert len(read) == VIDEOS
    for row in read:
        assert (row["mp4"], row["flac"]) == (expected[row["txt"]]["mp4"], expected[row["txt"]]["flac"])
        assert row["json"] == json.loads(expected[row["txt"]]["json"])
        assert row["jpg"].size == (row["json"]["width"], row["json"]["height"])


def test_energon_by_number_and_by_key(built: Path) -> None:
    from megatron.energon import WorkerConfig, get_savable_loader, get_train_dataset
    from megatron.energon.epathlib import EPath
    from megatron.energon.flavors.webdataset.itar_reader import SqliteITarEntryReader

    workers = WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = get_train_dataset(
        built / "ds", worker_config=workers, batch_size=None, shuffle_buffer_size=None, max_samples_per_sequence=None,
        repeat=False,
    )  # fmt: skip
    samples = list(get_savable_loader(dataset))
    expected = by_caption(members(shards(built)))
    assert sorted(sample.caption for sample in samples) == sorted(expected)
    reader = SqliteITarEntryReader(EPath(built / "ds"), key_is_full_entryname=True)
    for sample in expected.values():
        key = json.loads(sample["json"])["key"]
        assert reader[f"{key}.mp4"][0] == sample["mp4"]
        assert reader[f"{key}.flac"][0] == sample["flac"]
