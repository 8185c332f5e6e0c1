"""New batches are added to a dataset: its files are those of a selection of all rows, and no other is written."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from in_process import run_all_here
from PIL import Image

from capstan.pipeline import build, units
from capstan.pipeline.config import Blocklist, Recipe, Resources
from capstan.pipeline.pack import added
from capstan.pipeline.select import kept_runs, meeting
from capstan.pipeline.storage import Storage


def jpeg(number: int, quality: int = 95) -> bytes:
    pixels = np.random.default_rng(number + 100).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC).save(file, "JPEG", quality=quality)
    return file.getvalue()


def batch(folder: Path, number: int) -> None:
    """Write a source of 12 rows; some repeat rows of the batches before it, or each other."""
    first = 100 * number
    images = [jpeg(first + n) for n in range(7)] + [jpeg(first + 2), jpeg(first + 3, 80)]
    images += [jpeg(first - 99), jpeg(first - 98, 80), b"no image"]
    rows = [{"image": image, "caption": f"{number}-{place}"} for place, image in enumerate(images)]
    pq.write_table(pa.Table.from_pylist(rows), folder / f"rows{number}.parquet")


def recipe(folder: Path, dataset: str, batches: int, **sections: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "dataset": str(folder / dataset),
            "source": {"path": [str(folder / f"rows{number}.parquet") for number in range(batches)], "image": "image"},
            "image": {"size": 32, "min_size": 8},
            "select": [{"name": "all", "where": "width >= 8"}],
            "shards": {"samples": 4},
            "unit": {"rows": 5},
            **sections,
        }
    )


@pytest.fixture
def grow(
    tmp_path: Path, two_cpus: Resources, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Storage, list[str]]]:
    """Build three batches one after the other; return the storage, and how the last two were selected."""
    monkeypatch.setattr(units, "run", run_all_here)
    monkeypatch.setattr(kept_runs, "LEAST", 1)

    def grow(name: str, whole: bool = False, then: Callable[[Storage, int], None] | None = None, **sections: Any):
        how = list[str]()
        with monkeypatch.context() as patch:
            once = added.added_units

            def chosen(*arguments: Any) -> list[Any]:
                found = [] if whole else once(*arguments)
                how.append("added" if found else "whole")
                return found

            patch.setattr(added, "added_units", chosen)
            for number in range(3):
                batch(tmp_path, number)
                build.build(recipe(tmp_path, name, number + 1, **sections), progress=False)
                if then is not None:
                    then(Storage(str(tmp_path / name)), number)
        return Storage(str(tmp_path / name)), how[1:]

    return grow


def content(storage: Storage) -> dict[str, bytes]:
    names = [*storage.names("shards"), *storage.names("ledger"), *storage.names(".nv-meta")]
    return {name: storage.read(name) for name in names}


def outcomes(storage: Storage) -> set[str]:
    return {reason for name in storage.names("ledger") for reason in storage.read_table(name)["reason"].to_pylist()}


@pytest.mark.parametrize("dedup", [{}, {"perceptual": None}, {"exact": False, "perceptual": None}])
def test_files_are_those_of_a_selection_of_all_rows(grow: Callable[..., Any], dedup: dict[str, Any]) -> None:
    (storage, how), (other, _) = grow("added", dedup=dedup), grow("whole", whole=True, dedup=dedup)
    assert how == ["added", "added"]
    assert content(storage) == content(other)
    ours, theirs = (build.read_manifest(one) for one in (storage, other))
    assert ours is not None
    assert theirs is not None
    assert ours == theirs
    assert outcomes(storage) >= {"exact"} if dedup.get("exact", True) else {"not_an_image"}
    assert outcomes(storage) >= {"perceptual"} if dedup == {} else {"not_an_image"}
    assert build.verify(storage, progress=False) == []


def test_nothing_of_earlier_batches_is_written(grow: Callable[..., Any]) -> None:
    before: dict[str, int] = {}

    def note(storage: Storage, number: int) -> None:
        root = storage.local_path()
        assert root is not None
        files = {name: (root / name).stat().st_mtime_ns for name in storage.names("ledger") + storage.names("shards")}
        tables = {name: time for name, time in files.items() if not name.endswith("sizes.json")}
        assert {name: tables[name] for name in before} == before
        before.update(tables)

    assert grow("added", then=note, score={"caption": {}})[1] == ["added", "added"]


@pytest.mark.parametrize(
    "sections",
    [
        {"select": [{"name": "few", "at_most": 3, "per": "width"}]},
        {"select": [{"name": "best", "top": 0.5, "by": "width"}]},
    ],
)
def test_where_rows_depend_on_new_ones_all_are_selected(grow: Callable[..., Any], sections: dict[str, Any]) -> None:
    assert grow("whole", **sections)[1] == ["whole", "whole"]


def test_after_a_takedown_all_rows_are_selected_once(grow: Callable[..., Any], tmp_path: Path) -> None:
    def take_down(storage: Storage, number: int) -> None:
        if number == 0:
            rows = storage.read_table(storage.names("ledger")[0], ["key", "outcome"]).to_pylist()
            key = next(row["key"] for row in rows if row["outcome"] == "kept")
            (tmp_path / "keys.txt").write_text(key + "\n")
            build.remove(storage.url, Blocklist(keys=str(tmp_path / "keys.txt")), progress=False)

    (storage, how) = grow("added", then=take_down)
    assert how == ["whole", "added"]
    assert content(storage) == content(grow("whole", whole=True, then=take_down)[0])


@pytest.mark.parametrize(("how", "few"), [("damaged", True), ("damaged", False), ("lost", True)])
def test_a_ledger_table_that_cannot_be_read_is_written_again(
    how: str, few: bool, grow: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """New rows would meet its rows, since no run holds them: all rows are selected, and the build succeeds."""
    for module in (units, meeting):
        monkeypatch.setattr(module, "done_here", lambda work: few)

    def damage(storage: Storage, number: int) -> None:
        if number == 1:
            kept_runs.forget(storage, None)
            name = storage.names("ledger")[0]
            data = storage.read(name)
            storage.delete(name)
            if how == "damaged":
                storage.write(name, data[:-9] + b"no footer")

    storage, _ = grow("added", then=damage)
    assert content(storage) == content(grow("whole", whole=True)[0])
    assert build.verify(storage, progress=False) == []


def test_files_of_a_selection_that_was_killed_are_removed(grow: Callable[..., Any]) -> None:
    left = ["state/duplicates/meet-new", "state/duplicates/meet-000000003", "state/columns/values/semantic-centres"]

    def leave(storage: Storage, number: int) -> None:
        assert not {*left} & {*storage.names("state")}
        for name in left:
            storage.write(name, b"of a selection that was killed")

    grow("whole", then=leave, select=[{"name": "few", "at_most": 3, "per": "width"}])
