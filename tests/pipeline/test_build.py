"""build and select end to end, on images embedded in a table; and what is left when things go wrong."""

import functools
import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from in_process import run_here
from PIL import Image
from rows_recipe import build, published, rows_recipe, sound

from capstan.pipeline import build as stages
from capstan.pipeline.config import Recipe, Resources
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import CapstanError, RecipeError
from capstan.pipeline.ingest.job import Ingest
from capstan.pipeline.pack.verify import verify
from capstan.pipeline.source.plan import plan
from capstan.pipeline.storage import Storage
from capstan.pipeline.units import Piece, Unit

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import test modules

pytestmark = pytest.mark.integration


Draw = Callable[[int], bytes]


@pytest.fixture
def make(tmp_path: Path, two_cpus: Resources, draw: Draw) -> Callable[..., Recipe]:
    """A recipe over a table of rows, see helpers/rows_recipe.py."""
    return functools.partial(rows_recipe, tmp_path, draw)


def test_every_row_has_one_outcome_and_the_kept_are_packed(make: Callable[..., Recipe]) -> None:
    recipe = make(60, least=2)
    summary = build(recipe)
    assert summary["counts"] == {"rows": 60, "kept": 38, "rejected": 12, "duplicate": 4, "failed": 6, "shards": 3}
    assert summary["failed"] == {"not_an_image": 6}
    assert sound(recipe)

    dataset = Dataset(Storage(recipe.dataset))
    ledger = dataset.ledger()
    assert len(set(ledger["key"].to_pylist())) == 60
    assert [entry.samples for entry in dataset.manifest.shards] == [13, 13, 12]
    keys = [key for shard in dataset.shard_names for key, _ in dataset.read_images(shard)]
    assert keys == sorted(keys)
    kept = ledger.filter(pa.compute.equal(ledger["outcome"], "kept"))
    assert set(kept["key"].to_pylist()) == set(keys)
    for _, jpeg in dataset.read_images("shard-000001", [0, 5]):
        with Image.open(io.BytesIO(jpeg)) as image:
            assert image.size == (64, 64)

    sizes = json.loads(Storage(recipe.dataset).read("sizes.json"))
    assert sizes == {f"shard-{n:06}.tar": samples for n, samples in enumerate([13, 13, 12])}


def test_a_finished_dataset_is_left_alone(make: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make(30)
    first = build(recipe)
    before = {path: path.stat().st_mtime_ns for path in Path(recipe.dataset).rglob("*") if path.is_file()}
    monkeypatch.setattr("capstan.pipeline.units._Run", lambda *_: pytest.fail("nothing is to be done"))
    again = build(recipe)
    assert {path: path.stat().st_mtime_ns for path in Path(recipe.dataset).rglob("*") if path.is_file()} == before
    assert again["counts"] == first["counts"]
    assert again["failed"] == first["failed"]


def test_a_grown_table_and_a_second_source_cost_only_their_new_rows(
    tmp_path: Path, site: Any, two_cpus: Resources
) -> None:
    def table(name: str, numbers: range) -> str:
        lines = [f"{site.url(n)}\tpicture {n}" for n in numbers]
        (tmp_path / name).write_text("\n".join(["url\tcaption", *lines]))
        return str(tmp_path / name)

    def recipe(*paths: str) -> Recipe:
        settings = {"dataset": str(tmp_path / "dataset"), "source": {"path": list(paths)}}
        return Recipe.model_validate(settings | {"fetch": {"allow_private": True}, "unit": {"rows": 10}})

    def paths(numbers: range) -> list[str]:
        return sorted(f"/{n}.jpg" for n in numbers)

    first = recipe(table("a.tsv", range(12)))
    assert build(first)["counts"]["kept"] == 12
    assert site.new_asked() == paths(range(12))
    before = published(first)

    assert build(recipe(table("a.tsv", range(15))))["counts"]["kept"] == 15
    assert site.new_asked() == paths(range(12, 15))

    both = recipe(str(tmp_path / "a.tsv"), table("b.tsv", range(10, 20)))
    assert build(both)["counts"]["kept"] == 20
    assert site.new_asked() == paths(range(15, 20))
    assert {name: data for name, data in before.items() if name.startswith("shards/shard")}.items() <= published(
        both
    ).items()
    assert sound(both)


def test_images_must_have_the_hash_that_their_source_says(
    make: Callable[..., Recipe], tmp_path: Path, draw: Draw
) -> None:
    recipe = make(1)
    good = [draw(n) for n in range(6)]
    digests = [hashlib.new(name, data).hexdigest() for name, data in zip(KINDS, good, strict=False)]
    hashes = [*digests[:3], digests[3].upper(), None, "no hash"]
    write = {
        "image": [*good[:2], good[0] + b"\0", *good[3:]],
        "caption": [str(n) for n in range(6)],
        "checksum": hashes,
    }
    pq.write_table(pa.table(write), tmp_path / "hashed.parquet")
    source = {"path": str(tmp_path / "hashed.parquet"), "image": "image", "hash": "checksum"}
    recipe = Recipe.model_validate(recipe.model_dump() | {"source": source, "select": []})
    assert build(recipe)["failed"] == {"corrupt": 2}
    ledger = {row["caption"]: row for row in Dataset(Storage(recipe.dataset)).ledger().to_pylist()}
    assert {caption for caption, row in ledger.items() if row["outcome"] == "kept"} == {"0", "1", "3", "4"}
    assert f"the source says {hashes[2]}" in ledger["2"]["detail"]
    assert "'no hash' is not an md5" in ledger["5"]["detail"]
    assert json.loads(ledger["1"]["extra"]) == {"checksum": hashes[1]}


KINDS = ["md5", "sha1", "sha256", "sha512"]


def test_images_in_many_tars_are_found(make: Callable[..., Recipe], tmp_path: Path, draw: Draw) -> None:
    """A unit's rows lie at random over the files; each gets its own image and caption."""
    for number in range(4):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for n in range(number * 10, number * 10 + 10):
                for suffix, data in (("jpg", draw(n)), ("txt", f"image {n}".encode())):
                    info = tarfile.TarInfo(f"{n}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        recipe = make(1)
    source = {"path": [str(tmp_path / "[0-9].tar")]}
    recipe = Recipe.model_validate(recipe.model_dump() | {"source": source, "select": []})
    assert build(recipe)["counts"]["kept"] == 40
    for row in Dataset(Storage(recipe.dataset)).ledger().to_pylist():
        assert row["sha256"] == hashlib.sha256(draw(int(row["caption"].split()[1]))).hexdigest()


def test_files_that_are_too_large_empty_or_gone_are_rows_with_a_reason(
    storage: Storage, tmp_path: Path, draw: Draw
) -> None:
    images = tmp_path / "pictures"
    images.mkdir()
    planned = {
        "large": bytes(50_000),
        "empty": b"",
        "gone": b"x",
        "good": draw(1),
        "mended": bytes(60_000),
        "grown": b"x",
    }
    for name, data in planned.items():
        (images / f"{name}.jpg").write_bytes(data)
    (images / "listed.jpg").write_bytes(draw(3))
    (images / "listed.json").write_text('{"caption": ["one", "two"]}')
    settings = {"dataset": storage.url, "source": {"path": str(images)}, "fetch": {"max_bytes": 49_999}}
    ingest = Ingest(Recipe.model_validate(settings), storage)
    (unit,) = ingest.units(plan(ingest.recipe, storage, progress=False).units)
    (images / "gone.jpg").unlink()
    (images / "mended.jpg").write_bytes(draw(2))
    (images / "grown.jpg").write_bytes(bytes(50_000))
    (mark,) = ingest.prepare(unit)
    rows = {Path(row["url"]).stem: row for row in storage.read_table(mark["table"]).to_pylist()}
    assert {name: row["reason"] for name, row in rows.items()} == {
        "large": "too_large_bytes",
        "empty": "empty",
        "gone": "read_error",
        "good": "",
        "mended": "",
        "grown": "too_large_bytes",
        "listed": "bad_caption",
    }
    assert rows["listed"]["detail"] == '["one","two"] is not text'
    assert "50000 bytes" in rows["large"]["detail"]


class Fails(Ingest):
    """Cannot do the second unit."""

    def prepare(self, unit: Unit) -> Iterator[Piece]:
        if unit.id.endswith("1"):
            raise OSError("the disk is on fire")
        yield from super().prepare(unit)


def test_a_quarantined_unit_is_failed_rows_until_it_heals(make: Callable[..., Recipe]) -> None:
    recipe, whole = make(40), make(40, name="whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "Ingest", Fails)
        summary = build(recipe)
    assert summary["quarantined"] == {"0000-000001": "OSError: the disk is on fire"}
    assert sound(recipe)
    ledger = Dataset(Storage(recipe.dataset)).ledger()
    assert ledger["reason"].to_pylist().count("read_error") == 16

    again = stages.select(recipe, progress=False)
    assert again["counts"] == summary["counts"]

    healed = build(recipe)
    build(whole)
    assert healed["quarantined"] == {}
    assert published(recipe) == published(whole)


def test_other_image_settings_stage_anew(make: Callable[..., Recipe]) -> None:
    build(make(30))
    recipe, fresh = make(30, image={"size": 48}), make(30, name="fresh", image={"size": 48})
    build(recipe)
    build(fresh)
    assert published(recipe) == published(fresh)
    assert len(Storage(recipe.dataset).names("staged")) == 4  # the old images are gone


def test_a_bucket_ends_with_the_bytes_of_a_folder(make: Callable[..., Recipe], bucket: dict[str, Any]) -> None:
    local, remote = make(40), make(40, **bucket)
    build(local)
    build(remote)
    there = Storage(remote.dataset, remote.storage)
    assert verify(there) == []
    assert {name: there.read(name) for name in published(local)} == published(local)
    assert stages.select(make(40, least=4, **bucket), progress=False)["counts"]["kept"] < 30
    assert verify(there) == []


def test_select_needs_something_staged(make: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match="dataset: nothing is staged"):
        stages.select(make(5), progress=False)


def test_verify_names_what_is_wrong(make: Callable[..., Recipe]) -> None:
    recipe = make(40)
    build(recipe)
    storage = Storage(recipe.dataset)
    good = published(recipe)

    def problems(name: str, data: bytes | None) -> str:
        if data is None:
            storage.delete(name)
        else:
            storage.write(name, data)
        found = "\n".join(verify(storage))
        for original, content in good.items():
            storage.write(original, content)
        if name not in good:
            storage.delete(name)
        return found

    tar, table = "shards/shard-000001.tar", "shards/shard-000001.parquet"
    raw = good[tar]
    flipped = raw[:700] + bytes([raw[700] ^ 1]) + raw[701:]
    assert f"{tar}: its SHA-256" in problems(tar, flipped)
    assert "missing (found x" in problems(tar, b"x" + raw[1:])
    assert f"{tar}: 1000 bytes" in problems(tar, raw[:1000])
    assert f"{tar}: missing" in problems(tar, None)
    assert f"{table}: its SHA-256" in problems(table, good["shards/shard-000000.parquet"])
    assert "shards/odd.tar: not listed" in problems("shards/odd.tar", raw)
    assert "sizes.json: does not match" in problems("sizes.json", b"{}")
    ledger = next(name for name in good if name.startswith("ledger/"))
    assert f"{ledger}: missing" in problems(ledger, None)
    assert sound(recipe)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The unit map in this process: these builds have little to do."""
    for module in ("build", "score.job", "pack.job"):
        monkeypatch.setattr(f"capstan.pipeline.{module}.run", run_here)


@pytest.mark.parametrize("name", ["header.csv", "empty.txt", "none.parquet"])
def test_a_source_without_rows_is_an_empty_dataset(
    tmp_path: Path, here: None, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    if name.endswith(".parquet"):
        pq.write_table(
            pa.table({"url": pa.array([], pa.string()), "caption": pa.array([], pa.string())}), tmp_path / name
        )
    else:
        (tmp_path / name).write_text("url,caption\n" if name.endswith(".csv") else "")
    recipe = Recipe.model_validate(
        {
            "dataset": str(tmp_path / "ds"),
            "source": {"path": str(tmp_path / name)},
            "score": {"caption": {}},
            "select": [{"name": "words", "where": "caption_words >= 1 AND width >= 8"}],
        }
    )
    counts = stages.build(recipe, progress=False)["counts"]
    assert counts == {"rows": 0, "kept": 0, "rejected": 0, "duplicate": 0, "failed": 0, "shards": 0}
    assert "the source has no rows" in caplog.text
    assert stages.build(recipe, progress=False)["counts"] == counts


@pytest.mark.parametrize(
    ("columns", "source", "message"),
    [
        ({"url": ["/data/1.jpg", "/data/2.jpg"]}, {}, "all 2 rows failed as bad_url.*source.url"),
        ({"url": ["http://127.0.0.1:9/1.jpg", "http://10.0.0.1/2.jpg"]}, {}, "private_address.*fetch.allow_private"),
        ({"image": ["a cat", "a dog"]}, {"image": "image"}, "all 2 rows failed as not_an_image.*source.image"),
        ({"image": [b"", None]}, {"image": "image"}, "all 2 rows failed as empty.*source.image"),
    ],
)
def test_rows_that_all_fail_by_the_recipe_end_the_build(
    tmp_path: Path, here: None, columns: dict[str, Any], source: dict[str, Any], message: str
) -> None:
    pq.write_table(pa.table({**columns, "caption": ["one", "two"]}), tmp_path / "t.parquet")
    settings = {"dataset": str(tmp_path / "ds"), "source": {"path": str(tmp_path / "t.parquet"), **source}}
    with pytest.raises(CapstanError, match=message) as caught:
        stages.build(Recipe.model_validate(settings), progress=False)
    assert caught.value.exit_code == 1
    assert len(Dataset(Storage(str(tmp_path / "ds"))).ledger()) == 2
