"""Planning on workers: the same bytes as in one process, whoever is killed; and nothing is left behind."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capstan.pipeline.config import Recipe
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.source import SourceReader
from capstan.pipeline.source import plan_on_workers as on_workers
from capstan.pipeline.source.plan import Plan, plan
from capstan.pipeline.source.planning import unit_tables
from capstan.pipeline.storage import Storage


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan everything on workers, in many units of each job."""
    for name, value in {"SMALL_ROWS": 0, "_READ_ROWS": 1, "_KEYS_AT_ONCE": 300, "_GROUP_BYTES": 60_000}.items():
        monkeypatch.setattr(on_workers, name, value)


def recipe(path: Path, folder: Path, workers: int = 2, **more: Any) -> Recipe:
    settings: dict[str, Any] = {"dataset": str(folder), "source": {"path": str(path)}, "unit": {"rows": 70}}
    resources = {"executor": "processes", "cpus": workers}
    return Recipe.model_validate(settings | {"resources": resources} | more)


def write(folder: Path, files: dict[str, range]) -> Path:
    """Write files of rows; some of their captions are empty, and every tenth row is also in the file `again`."""
    folder.mkdir(exist_ok=True)
    for name, numbers in files.items():
        captions = ["" if number % 3 else f"number {number}" for number in numbers]
        table = {"url": [f"http://example.org/{number}" for number in numbers], "caption": captions}
        pq.write_table(pa.table(table), folder / f"{name}.parquet")
    return folder


def planned(wanted: Recipe) -> tuple[Plan, dict[str, bytes]]:
    """Plan; return the plan, and all that is left of planning."""
    storage = Storage(wanted.dataset, wanted.storage)
    made = plan(wanted, storage, progress=False)
    return made, {name: storage.read(name) for name in storage.names("state")}


FILES = {"a": range(1000), "b": range(1000, 1800), "c": range(0, 1800, 10), "d": range(1800, 1801), "e": range(0)}
MORE = {"f": range(1500, 2500), "g": range(2400, 2600)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "rows", FILES)


def test_any_number_of_workers_plans_what_one_process_does(
    source: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "urls.txt").write_text("http://example.org/10\nhttp://example.org/1000\n")
    block = {"blocklist": {"urls": str(tmp_path / "urls.txt")}}
    folders = {workers: tmp_path / f"dataset-{workers}" for workers in (0, 1, 2, 4)}

    def all_planned() -> dict[int, Any]:
        found = {}
        for workers, folder in folders.items():
            with monkeypatch.context() as patch:
                if not workers:
                    patch.setattr(on_workers, "SMALL_ROWS", 1 << 40)
                found[workers] = planned(recipe(source, folder, max(1, workers), **block))
        return found

    first = all_planned()
    assert [(made.rows, made.read, made.repeats) for made, _ in first.values()] == [(1801, 1981, 180)] * 4
    assert first[1] == first[2] == first[4] == first[0]
    write(source, MORE)
    second = all_planned()
    assert [(made.rows, len({u.batch for u in made.units})) for made, _ in second.values()] == [(2600, 2)] * 4
    assert second[1] == second[2] == second[4] == second[0]


def test_units_with_embedded_images_are_cut_alike(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_tables, "UNIT_BYTES", 3000)
    (tmp_path / "images").mkdir()
    for number in range(3):
        images = [bytes([n, number % 2]) * (100 + 20 * n) for n in range(30)]
        pq.write_table(pa.table({"image": images, "caption": [""] * 30}), tmp_path / f"images/{number}.parquet")
    image = {"source": {"path": str(tmp_path / "images"), "image": "image"}}
    made = planned(recipe(tmp_path / "images", tmp_path / "workers", **image))
    monkeypatch.setattr(on_workers, "SMALL_ROWS", 1 << 40)
    assert made == planned(recipe(tmp_path / "images", tmp_path / "alone", **image))
    assert made[0].repeats == 30
    assert len(made[0].units) > 10


def test_a_bucket_ends_with_the_bytes_of_a_folder(
    source: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch, bucket: dict[str, Any]
) -> None:
    made = planned(recipe(source, tmp_path / "unused", **bucket))
    monkeypatch.setattr(on_workers, "SMALL_ROWS", 1 << 40)
    assert made == planned(recipe(source, tmp_path / "alone"))


KILLED = """
import os, signal, sys
from capstan.pipeline.config import Recipe
from capstan.pipeline.source import plan_on_workers as on_workers
from capstan.pipeline.source.plan import plan
from capstan.pipeline.storage import Storage
from capstan.pipeline.units import MarkerLog
for name, value in {"SMALL_ROWS": 0, "_READ_ROWS": 1, "_KEYS_AT_ONCE": 300, "_GROUP_BYTES": 60_000}.items():
    setattr(on_workers, name, value)
mark, left = MarkerLog.mark_all, [int(sys.argv[2])]
def mark_all(self, *more, **named):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    mark(self, *more, **named)
MarkerLog.mark_all = mark_all
recipe = Recipe.model_validate_json(sys.argv[1])
plan(recipe, Storage(recipe.dataset), progress=False)
"""


@pytest.mark.parametrize(("marks", "job"), [(2, "plan-read"), (6, "plan-keys"), (13, "plan-units")])
def test_a_killed_plan_resumes(
    source: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch, marks: int, job: str
) -> None:
    wanted = recipe(source, tmp_path / "killed")
    ended = subprocess.run([sys.executable, "-c", KILLED, wanted.model_dump_json(), str(marks)], check=False)
    assert ended.returncode == -9
    storage = Storage(wanted.dataset)
    assert not storage.exists("state/plan/batch-0000/batch.json")
    done = [name for name in storage.names("state/planning") if "/done/" in name]
    assert len(done) == marks
    assert any(f"/{job}/" in name for name in done)
    made = planned(wanted)
    monkeypatch.setattr(on_workers, "SMALL_ROWS", 1 << 40)
    assert made == planned(recipe(source, tmp_path / "whole"))


def test_what_a_killed_plan_left_is_not_used_for_another_source(
    source: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(source, tmp_path / "killed")
    subprocess.run([sys.executable, "-c", KILLED, wanted.model_dump_json(), "6"], check=False)
    write(source, MORE)
    made = planned(wanted)
    monkeypatch.setattr(on_workers, "SMALL_ROWS", 1 << 40)
    assert made == planned(recipe(source, tmp_path / "whole"))


def test_tables_of_a_killed_plan_are_not_part_of_a_smaller_one(
    source: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(source, tmp_path / "killed")
    subprocess.run([sys.executable, "-c", KILLED, wanted.model_dump_json(), "13"], check=False)
    last = "state/plan/batch-0000/unit-0000-000099.parquet"  # whatever the kill left, one unit more than is planned
    Storage(wanted.dataset).write(last, b"of a larger plan")
    for file in sorted(source.iterdir())[1:]:
        file.unlink()
    monkeypatch.setattr(on_workers, "SMALL_ROWS", 1 << 40)  # in one process, which knows nothing of the jobs
    made = planned(wanted)
    assert made == planned(recipe(source, tmp_path / "whole"))
    assert last not in made[1]


def test_a_file_that_cannot_be_read_ends_with_the_same_error(
    source: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = (source / "b.parquet").read_bytes()
    (source / "b.parquet").write_bytes(data[:4] + bytes(2000) + data[2004:])
    with pytest.raises(RecipeError, match=r"b\.parquet") as there:
        planned(recipe(source, tmp_path / "workers"))
    assert Storage(str(tmp_path / "workers")).names("state") == []
    monkeypatch.setattr(on_workers, "SMALL_ROWS", 1 << 40)
    with pytest.raises(RecipeError) as here:
        planned(recipe(source, tmp_path / "alone"))
    assert str(there.value) == str(here.value)


def test_warnings_of_workers_are_logged(tmp_path: Path, small: None, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "rows").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"rows/{name}.tsv").write_text(f'url\tcaption\nhttp://{name}/\t"quoted"\n')
    made, _ = planned(recipe(tmp_path / "rows", tmp_path / "dataset"))
    assert made.rows == 2
    assert [f"{name}.tsv" in caplog.text for name in ("a", "b")] == [True, True]


def test_small_sources_and_single_files_are_planned_in_one_process(source: Path, small: None) -> None:
    parts = SourceReader(recipe(source, source / "dataset")).parts()
    assert parts is not None
    assert [part.rows for part in parts] == [1000, 800, 180, 1, 0]
    assert on_workers.on_workers(parts)
    assert not on_workers.on_workers(parts[:1])
    assert not on_workers.on_workers(None)
