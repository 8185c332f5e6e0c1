"""Planning: keys once, sorted, cut into units; new rows make a new batch and move nothing."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from capstan.pipeline.config import Recipe
from capstan.pipeline.records import PLAN_SCHEMA
from capstan.pipeline.source import external_sort, tables
from capstan.pipeline.source import plan as planning
from capstan.pipeline.source.plan import plan, read_plan
from capstan.pipeline.storage import Storage


def recipe(path: Path, storage: Storage, rows: int = 10) -> Recipe:
    settings: dict[str, Any] = {"dataset": storage.url, "source": {"path": str(path)}, "unit": {"rows": rows}}
    return Recipe.model_validate(settings)


def planned(storage: Storage) -> pa.Table:
    return pa.concat_tables([storage.read_table(unit.table) for unit in read_plan(storage).units])


def files(storage: Storage) -> dict[str, bytes]:
    return {name: storage.read(name) for name in storage.names("state/plan") if name.endswith(".parquet")}


@pytest.fixture
def urls(tmp_path: Path) -> Path:
    return tmp_path / "urls.txt"


def write(path: Path, numbers: list[int]) -> None:
    path.write_text("".join(f"http://example.org/{n}\n" for n in numbers))


def test_units_are_sorted_by_key_and_cut(storage: Storage, urls: Path) -> None:
    write(urls, list(range(25)))
    made = plan(recipe(urls, storage), storage, progress=False)
    assert [unit.rows for unit in made.units] == [10, 10, 5]
    assert [unit.id for unit in made.units] == ["0000-000000", "0000-000001", "0000-000002"]
    table = planned(storage)
    assert table.schema == PLAN_SCHEMA
    keys = table["key"].to_pylist()
    assert keys == sorted(keys)
    assert set(table["url"].to_pylist()) == {f"http://example.org/{n}" for n in range(25)}


def test_the_order_of_the_input_does_not_matter(storage: Storage, urls: Path, tmp_path: Path) -> None:
    write(urls, list(range(25)))
    plan(recipe(urls, storage), storage, progress=False)
    other = Storage(str(tmp_path / "other"))
    write(urls, list(reversed(range(25))))
    plan(recipe(urls, other), other, progress=False)
    assert files(storage) == files(other)


def test_repeats_are_planned_once_and_counted(storage: Storage, urls: Path) -> None:
    write(urls, [1, 2, 2, 3, 3, 3])
    made = plan(recipe(urls, storage), storage, progress=False)
    assert (made.rows, made.read, made.repeats) == (3, 6, 3)


def test_of_rows_with_one_key_the_same_one_stays_whatever_comes_first(storage: Storage, tmp_path: Path) -> None:
    lines = [f'{{"url": "http://a/", "caption": "x", "n": {n}}}' for n in range(3)]
    kept = set()
    for number, order in enumerate([lines, lines[::-1]]):
        (tmp_path / "t.jsonl").write_text("\n".join(order))
        place = Storage(str(tmp_path / f"dataset-{number}"))
        plan(recipe(tmp_path / "t.jsonl", place), place, progress=False)
        kept.add(tuple(planned(place)["extra"].to_pylist()))
    assert kept == {('{"n":0}',)}


def test_new_rows_make_a_new_batch_and_move_nothing(storage: Storage, urls: Path) -> None:
    write(urls, list(range(15)))
    plan(recipe(urls, storage), storage, progress=False)
    before = files(storage)
    write(urls, list(range(30)))
    made = plan(recipe(urls, storage), storage, progress=False)
    assert [(unit.batch, unit.rows) for unit in made.units] == [(0, 10), (0, 5), (1, 10), (1, 5)]
    assert before.items() <= files(storage).items()
    assert len(set(planned(storage)["key"].to_pylist())) == 30

    write(urls, list(range(20)))  # rows that left the source stay planned
    assert plan(recipe(urls, storage), storage, progress=False).units == made.units


def test_an_unchanged_source_is_not_read_again(storage: Storage, urls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(urls, list(range(15)))
    first = plan(recipe(urls, storage), storage, progress=False)

    def refuse(*_: object) -> None:
        raise AssertionError("the source was read again")

    monkeypatch.setattr(planning.SourceReader, "tables", refuse)
    assert plan(recipe(urls, storage), storage, progress=False) == first


def test_a_plan_that_was_cut_off_is_made_again(storage: Storage, urls: Path) -> None:
    write(urls, list(range(25)))
    plan(recipe(urls, storage), storage, progress=False)
    whole = files(storage)
    storage.delete("state/plan/batch-0000/batch.json")
    storage.delete("state/plan/source.json")
    storage.delete("state/plan/batch-0000/unit-0000-000001.parquet")
    plan(recipe(urls, storage), storage, progress=False)
    assert files(storage) == whole


def test_units_with_embedded_images_are_bounded(storage: Storage, tmp_path: Path, monkeypatch: Any) -> None:
    import pyarrow.parquet as pq

    monkeypatch.setattr(planning, "UNIT_BYTES", 3000)
    images = [bytes([n]) * 1000 for n in range(8)]
    pq.write_table(pa.table({"image": images, "caption": [""] * 8}), tmp_path / "t.parquet")
    settings = {"dataset": storage.url, "source": {"path": str(tmp_path / "t.parquet"), "image": "image"}}
    made = plan(Recipe.model_validate(settings), storage, progress=False)
    assert made.rows == 8
    assert len(made.units) > 1


def test_a_table_that_does_not_fit_into_memory_is_planned_the_same(
    storage: Storage, urls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(urls, [*range(3000), *range(2500)])
    whole = plan(recipe(urls, storage, 700), storage, progress=False)
    assert (whole.read, whole.repeats, whole.rows) == (5500, 2500, 3000)

    monkeypatch.setattr(external_sort, "RUN_BYTES", 50_000)
    monkeypatch.setattr(external_sort, "GROUP_BYTES", 20_000)
    monkeypatch.setattr(tables, "BLOCK_BYTES", 10_000)
    monkeypatch.setattr(planning, "_KEYS_BYTES", 1600)
    pieces = Storage(str(tmp_path / "pieces"))
    assert plan(recipe(urls, pieces, 700), pieces, progress=False) == whole
    assert files(pieces) == files(storage)

    write(urls, list(range(1000, 3100)))
    grown = plan(recipe(urls, pieces, 700), pieces, progress=False)
    assert grown.rows == 3100
    assert grown.units[-1].rows == 100
    assert set(planned(pieces)["url"].to_pylist()) == {f"http://example.org/{n}" for n in range(3100)}
    write(urls, list(range(4000)))
    assert plan(recipe(urls, pieces, 700), pieces, progress=False).rows == 4000
    assert len(set(planned(pieces)["key"].to_pylist())) == 4000
