"""Names in a source from elsewhere (a column `file_name`, members of tars) are compared and kept, never opened."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from drawn import file_of, ramp
from source_files import rows

from capstan.pipeline.build import build
from capstan.pipeline.config import Recipe
from capstan.pipeline.storage import Storage

SECRET = "nobody's business"
NAMES = [
    "../secret.jpg",
    "/secret.jpg",
    "..\\secret.jpg",
    "C:\\secret.jpg",
    "file:///secret.jpg",
    "sub/../../secret.jpg",
    "nul\0.jpg",
    "line\nbreak.jpg",
    "\x1b[31mred.jpg",
    "x" * 4000 + ".jpg",
    "a" * 300 + "/" + "b" * 300 + ".jpg",
    "lone \ud800.jpg",
    "ünï.jpg",
    ".jpg",
    "...jpg",
    " .jpg",
    "",
    ".",
]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "secret.jpg").write_bytes(file_of(ramp(), "jpeg"))
    (tmp_path / "secret.txt").write_text(SECRET)
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.jpg", "A.jpg", "a.JPG"):
        (folder / name).write_bytes(file_of(ramp(), "jpeg"))
    return folder


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_names_in_metadata_only_find_images_of_the_folder(photos: Path, form: str) -> None:
    """Names that differ in case are different images; what names no image of the folder describes none."""
    named = [(name, f"hostile {number}") for number, name in enumerate(NAMES)]
    named += [("a.jpg", "small"), ("A.jpg", "large"), ("./x/../a.JPG", "shouted")]
    if form == "jsonl":
        lines = [json.dumps({"file_name": name, "caption": caption}) for name, caption in named]
        (photos / "metadata.jsonl").write_text("\n".join(lines))
    else:
        quoted = (f'"{name}",{caption}\n' for name, caption in named if name.isprintable())
        (photos / "metadata.csv").write_text("file_name,caption\n" + "".join(quoted))
    found = {row["url"].rpartition("/")[2]: row["caption"] for row in rows(photos, format="folder")}
    assert found == {"a.jpg": "small", "A.jpg": "large", "a.JPG": "shouted"}


def test_members_of_a_tar_write_nothing_but_the_dataset(photos: Path) -> None:
    names = [name for name in NAMES if name.isprintable()] + ["a.jpg", "A.jpg", "../../../tmp/x.jpg"]
    tars, target = photos.parent / "tars", io.BytesIO()
    tars.mkdir()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for number, name in enumerate(names):
            data = file_of(ramp(80 + number), "jpeg")
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (tars / "0.tar").write_bytes(target.getvalue())
    before, dataset = everything(photos.parent), photos.parent / "ds"
    settings = {"dataset": str(dataset), "source": {"path": str(tars)}, "dedup": {"perceptual": None}}
    summary = build(Recipe.model_validate(settings), progress=False)
    assert summary["counts"]["kept"] == sum(name.endswith(".jpg") and name != "...jpg" for name in names)
    assert {path: data for path, data in everything(photos.parent).items() if "/ds/" not in path} == before
    assert not Storage(str(dataset)).links()
    with tarfile.open(dataset / "shards" / "shard-000000.tar") as shard:
        assert all(name.partition(".")[0].isalnum() and len(name) < 40 for name in shard.getnames())
    assert SECRET not in json.dumps([{**row, "image": None} for row in rows(tars)])
