"""The recipe's `dedup` on rows: evaluation images from a folder, tars or tables; semantic repeats; their order."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from capstan.pipeline import config
from capstan.pipeline.config import Recipe
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.image.decode import StoredImage, decode
from capstan.pipeline.image.phash import read_colours
from capstan.pipeline.pack.job import selection_of
from capstan.pipeline.select.arrays.apart import NOTHING, Apart
from capstan.pipeline.select.dedup import Repeats, find_repeats
from capstan.pipeline.select.near_duplicates import REASONS
from capstan.pipeline.storage import Storage

Draw = Callable[[int], bytes]
IMAGE = config.Image(size=64)


def measured(images: list[bytes]) -> tuple[np.ndarray, ...]:
    """Return SHA-256, pHash, colours, area and batch of each."""
    found = [p for p in (decode(data, IMAGE) for data in images) if isinstance(p, StoredImage)]
    return (
        np.array([bytes.fromhex(p.sha256) for p in found], "S32"),
        np.array([p.phash for p in found], np.uint64),
        read_colours(pa.chunked_array([[p.colours for p in found]])),
        np.array([p.original_width * p.original_height for p in found]),
        np.zeros(len(found), np.int64),
    )


def repeats(
    storage: Storage,
    images: list[bytes],
    embeddings: Any = None,
    descriptors: Any = None,
    apart: Apart = NOTHING,
    **dedup: Any,
) -> Repeats:
    recipe = Recipe.model_validate({"dataset": storage.url, "image": {"size": 64}, "dedup": dedup})
    return find_repeats(recipe, storage, *measured(images), embeddings, descriptors=descriptors, apart=apart)


def again(data: bytes, quality: int = 60) -> bytes:
    """Return the same image, re-encoded."""
    file = io.BytesIO()
    Image.open(io.BytesIO(data)).save(file, "JPEG", quality=quality)
    return file.getvalue()


@pytest.fixture(params=["folder", "tar", "parquet"])
def evaluation(request: pytest.FixtureRequest, tmp_path: Path, draw: Draw) -> str:
    """Images 0 and 1."""
    folder = tmp_path / "evaluation"
    folder.mkdir()
    for number in (0, 1):
        (folder / f"{number}.jpg").write_bytes(draw(number))
    if request.param == "tar":
        with tarfile.open(tmp_path / "evaluation.tar", "w") as tar:
            for path in sorted(folder.iterdir()):
                tar.add(path, path.name)
        return str(tmp_path / "evaluation.tar")
    if request.param == "parquet":
        table = pa.table({"image": [draw(0), draw(1)], "url": ["0.jpg", "1.jpg"], "caption": ["", ""]})
        pq.write_table(table, tmp_path / "evaluation.parquet")
        return str(tmp_path / "evaluation.parquet")
    return str(folder)


def test_copies_of_evaluation_images_are_removed(storage: Storage, evaluation: str, draw: Draw) -> None:
    images = [draw(5), again(draw(1)), draw(0), draw(5)]
    found = repeats(storage, images, decontaminate=evaluation)
    assert [REASONS[kind] for kind in found.kind] == ["", "contaminated", "contaminated", "exact"]
    assert [found.evaluation[found.kept[row]].rpartition("#")[2] for row in (1, 2)] == ["1.jpg", "0.jpg"]
    # Without the perceptual step only identical files are found.
    exact = repeats(storage, images, decontaminate=evaluation, perceptual=None)
    assert [REASONS[kind] for kind in exact.kind] == ["", "", "contaminated", "exact"]


def test_a_contaminated_row_is_not_an_original_for_others(storage: Storage, tmp_path: Path, draw: Draw) -> None:
    """A copy of a removed row is judged by itself."""
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.jpg").write_bytes(draw(2))
    found = repeats(storage, [draw(2), draw(2), again(draw(2))], decontaminate=str(tmp_path / "one"), perceptual=None)
    assert [REASONS[kind] for kind in found.kind] == ["contaminated", "contaminated", ""]


def test_the_evaluation_set_is_decoded_once_and_again_when_it_changes(
    storage: Storage, tmp_path: Path, draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(draw(2))
    recipe = Recipe.model_validate({"dataset": storage.url, "dedup": {"decontaminate": str(folder)}})
    repeats(storage, [draw(1)], decontaminate=str(folder))
    before = selection_of(recipe, storage, [])
    with monkeypatch.context() as without:
        without.setattr("capstan.pipeline.select.dedup.decode", lambda *_: pytest.fail("decoded again"))
        known = find_repeats(recipe.model_copy(update={"image": IMAGE}), storage, *measured([draw(2)]))
    assert known.kept.tolist() == [0]
    (folder / "b.jpg").write_bytes(draw(1))
    assert repeats(storage, [draw(1)], decontaminate=str(folder)).evaluation == ["a.jpg", "b.jpg"]
    assert selection_of(recipe, storage, []) != before


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "dedup.decontaminate: no file at"),
        ({"a.jpg": b"\xff\xd8\xff not an image"}, "dedup.decontaminate: .*a.jpg cannot be read"),
        ({"a.csv": b"url,caption\nhttp://x.org/a.jpg,a\n"}, "dedup.decontaminate: holds URLs"),
    ],
)
def test_an_unreadable_evaluation_set_is_an_error(storage: Storage, tmp_path: Path, files, message, draw) -> None:
    folder = tmp_path / "set"
    for name, data in files.items():
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    with pytest.raises(RecipeError, match=message):
        repeats(storage, [draw(1)], decontaminate=str(folder))


def test_semantic_repeats_come_last_and_follow_what_is_kept(storage: Storage, draw: Draw) -> None:
    embeddings = np.eye(8, dtype=np.float16)[[0, 1, 0, 2, 1]]
    images = [draw(0), draw(1), draw(2), draw(3), draw(1)]
    found = repeats(storage, images, embeddings, semantic=0.9)
    assert [REASONS[kind] for kind in found.kind] == ["", "", "semantic", "", "exact"]
    assert found.kept.tolist() == [-1, -1, 0, -1, 1]


def test_copies_come_before_semantic_repeats(storage: Storage, draw: Draw) -> None:
    embeddings = np.eye(8, dtype=np.float16)[[0, 1, 0, 2, 1]]
    descriptors = np.eye(8, dtype=np.float16)[[0, 0, 1, 2, 3]]
    images = [draw(0), draw(1), draw(2), draw(3), draw(1)]
    copies = {"model": "unused.onnx", "threshold": 0.9}
    found = repeats(storage, images, embeddings, descriptors, semantic=0.9, copies=copies)
    assert [REASONS[kind] for kind in found.kind] == ["", "copies", "semantic", "", "exact"]
    assert found.kept.tolist() == [-1, 0, 0, -1, 0]  # the last repeats row 1, which is a copy of row 0


def test_a_copy_of_a_repeat_that_is_apart_from_what_is_kept_is_compared_itself(storage: Storage, draw: Draw) -> None:
    """Rows 2 and 3 are copies of row 1, which repeats row 0; somebody found that they do not."""
    embeddings = np.eye(4, dtype=np.float16)[[0, 0, 0, 0, 1]]
    images = [draw(0), draw(1), draw(1), draw(1), draw(2)]
    apart = Apart.of(5, np.array([[0, 2], [0, 3]]))
    found = repeats(storage, images, embeddings, apart=apart, semantic=0.9)
    assert found.kept.tolist() == [-1, 0, -1, 2, -1]
    assert [REASONS[kind] for kind in found.kind] == ["", "semantic", "", "semantic", ""]
