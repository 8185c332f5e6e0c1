"""Planning: keys once, sorted, cut into units; new rows make a new batch and move nothing."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from capstan.pipeline.config import Recipe
from capstan.pipeline.records import PLAN_SCHEMA
from capstan.pipeline.source import plan as planning
from capstan.pipeline.source import plan_on_workers, reader, tables
from capstan.pipeline.source.plan import plan, read_plan
from capstan.pipeline.source.planning import external_sort, known_keys, unit_tables
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

    monkeypatch.setattr(unit_tables, "UNIT_BYTES", 3000)
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
    monkeypatch.setattr(known_keys, "_READ_BYTES", 1600)
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


def folder_of(path: Path, parts: dict[str, list[int]]) -> Path:
    path.mkdir(exist_ok=True)
    for name, numbers in parts.items():
        write(path / name, numbers)
    return path


def noted_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which the names of text files are added as they are read."""
    read, txt = list[str](), reader._TABLES["txt"]

    def noting(file: Any, *more: Any) -> Any:
        read.append(Path(file.path).name)
        return txt(file, *more)

    monkeypatch.setitem(reader._TABLES, "txt", noting)
    return read


def test_only_files_that_were_added_are_read(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan is as if all had been read: units, and counts of rows and repeats."""
    source = folder_of(tmp_path / "urls", {"a.txt": list(range(25)), "b.txt": [*range(20, 40), 20]})
    plan(recipe(source, storage), storage, progress=False)
    folder_of(source, {"c.txt": [3, 50, 51, 50]})
    shutil.copytree(storage.url, tmp_path / "whole")
    whole = Storage(str(tmp_path / "whole"))
    with monkeypatch.context() as forgetful:
        forgetful.setattr(planning, "_planned_files", lambda *_: (frozenset(), True))
        expected = plan(recipe(source, whole), whole, progress=False)
    read = noted_reads(monkeypatch)
    made = plan(recipe(source, storage), storage, progress=False)
    assert read == ["c.txt"]
    assert made == expected
    assert (made.read, made.repeats, made.rows) == (50, 8, 42)
    assert files(storage) == files(whole)


@pytest.mark.parametrize("change", ["changed", "removed", "settings"])
def test_all_files_are_read_after_any_other_change(storage: Storage, tmp_path: Path, change: str) -> None:
    source = folder_of(tmp_path / "urls", {"a.txt": list(range(25)), "b.txt": list(range(25, 40))})
    plan(recipe(source, storage), storage, progress=False)
    folder_of(source, {"c.txt": [0, 50]})
    wanted = recipe(source, storage)
    if change == "changed":
        write(source / "b.txt", list(range(30, 45)))
    elif change == "removed":
        (source / "b.txt").unlink()
    else:
        wanted = wanted.model_copy(update={"source": wanted.source.model_copy(update={"columns": "all"})})
    made = plan(wanted, storage, progress=False)
    assert made.read == {"changed": 42, "removed": 27, "settings": 42}[change]
    assert made.repeats == 1


@pytest.mark.parametrize("change", ["changed", "removed", "both"])
def test_of_a_large_source_only_what_changed_is_read(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """The plan is as if all had been read, but that it is not known how many rows repeat a key."""
    source = folder_of(tmp_path / "urls", {"a.txt": list(range(25)), "b.txt": list(range(25, 40)), "c.txt": [3, 41]})
    plan(recipe(source, storage), storage, progress=False)
    if change != "removed":
        write(source / "b.txt", list(range(30, 45)))
    if change != "changed":
        (source / "c.txt").unlink()
    shutil.copytree(storage.url, tmp_path / "whole")
    whole = Storage(str(tmp_path / "whole"))
    expected = plan(recipe(source, whole), whole, progress=False)
    read = noted_reads(monkeypatch)
    monkeypatch.setattr(plan_on_workers, "SMALL_ROWS", 10)
    monkeypatch.setattr(planning, "on_workers", lambda _: False)
    made = plan(recipe(source, storage), storage, progress=False)
    assert read == {"changed": ["b.txt"], "removed": [], "both": ["b.txt"]}[change]
    assert made == dataclasses.replace(expected, repeats=None)
    assert files(storage) == files(whole)
    assert read_plan(storage) == made

    folder_of(source, {"d.txt": [50, 51], "e.txt": [50]})
    read.clear()
    grown = plan(recipe(source, storage), storage, progress=False)
    assert read == ["d.txt", "e.txt"]
    assert (grown.read, grown.repeats, grown.rows) == (made.read + 3, None, made.rows + 2)


def test_the_counts_of_files_of_an_older_version_are_not_known(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder_of(tmp_path / "urls", {"a.txt": list(range(25)), "b.txt": list(range(25, 40))})
    plan(recipe(source, storage), storage, progress=False)
    seen = storage.read_json("state/plan/source.json", "")
    storage.write("state/plan/source.json", json.dumps(seen | {"files": list(seen["files"])}).encode())
    write(source / "b.txt", list(range(30, 45)))
    read = noted_reads(monkeypatch)
    monkeypatch.setattr(plan_on_workers, "SMALL_ROWS", 10)
    monkeypatch.setattr(planning, "on_workers", lambda _: False)
    assert plan(recipe(source, storage), storage, progress=False).repeats == 0
    assert read == ["a.txt", "b.txt"]


def test_keys_that_were_damaged_are_written_again_from_the_tables(storage: Storage, urls: Path) -> None:
    write(urls, list(range(15)))
    plan(recipe(urls, storage), storage, progress=False)
    name = "state/plan/batch-0000/keys.bin"
    whole = storage.read(name)
    storage.write(name, whole[:40] + b"x" + whole[41:])
    write(urls, list(range(20)))
    assert plan(recipe(urls, storage), storage, progress=False).rows == 20
    assert storage.read(name) == whole


def test_batches_of_older_versions_are_known(storage: Storage, urls: Path) -> None:
    write(urls, list(range(15)))
    plan(recipe(urls, storage), storage, progress=False)
    name = "state/plan/batch-0000/batch.json"
    facts = {key: value for key, value in storage.read_json(name, "").items() if key in ("batch", "units")}
    storage.write(name, json.dumps(facts).encode())
    write(urls, list(range(20)))
    assert plan(recipe(urls, storage), storage, progress=False).rows == 20
