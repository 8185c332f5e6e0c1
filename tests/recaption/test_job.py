"""A layer ends the same however it was made, and new data costs only itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from pipeline import units
from pipeline.config import Recipe
from pipeline.errors import Quarantined, RecipeError
from pipeline.records import make_key
from pipeline.storage import Storage
from recaption import store
from recaption.engines.coca import CocaEngine
from recaption.job import plan, recaption

Build = Callable[..., Storage]
STEPS = [[0, 1, 2, 3], [4, 5, 6], [7]]


def recipe(captioner: Path, storage: Storage, workers: int = 1, **section: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "dataset": storage.url,
            "resources": {"cpus": 1, "model_workers": workers},
            "recaption": {"model": str(captioner), **section},
        }
    )


def layer_files(storage: Storage) -> dict[str, bytes]:
    return {name: storage.read(name) for name in storage.names("captions")}


def run_here(job: units.Job, work: Iterable[units.Unit], *_: Any, **__: Any) -> units.Summary:
    """In place of units.run: in this process, one unit after the other."""
    model, done = job.model(), units.markers(job)
    assert model is not None
    todo = [unit for unit in work if unit.id not in done]
    for unit in todo:
        facts = job.commit(unit, [model(piece) for piece in job.prepare(unit)])
        job.storage.write(f"state/{job.name}/done/{unit.id}.json", json.dumps(facts).encode())
    return units.Summary(len(todo), len(done), {}, {})


@pytest.fixture
def captioned(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Runs jobs in this process and counts what the engine is asked for, by sha256."""
    asked = Counter[str]()
    caption = CocaEngine.caption

    def counted(self: CocaEngine, pictures: Any, requests: Any, *, attempt: int = 0) -> Any:
        asked.update(request.sha256 for request in requests)
        return caption(self, pictures, requests, attempt=attempt)

    monkeypatch.setattr(CocaEngine, "caption", counted)
    monkeypatch.setattr(units, "run", run_here)
    return asked


@pytest.mark.integration
def test_killed_or_failed_runs_go_on_and_end_with_the_same_bytes(
    build: Build, captioner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Ray: SIGKILL once the first shard is done, then a shard that cannot be read, then other numbers of workers."""
    storage = build(STEPS)
    file = tmp_path / "recipe.json"
    file.write_text(recipe(captioner, storage).model_dump_json())
    code = (
        "import sys; from pathlib import Path; from pipeline.config import Recipe; from recaption.job import recaption;"
        "recaption(Recipe.model_validate_json(Path(sys.argv[1]).read_text()), progress=False)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(file)], start_new_session=True) as process:
        deadline = time.monotonic() + 120
        while not storage.names("captions") and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    captioned = {Path(name).stem: name for name in storage.names("captions")}
    left = {Path(name).stem for name in storage.names("shards")} - captioned.keys()
    if not left:  # all were done before the signal came
        storage.delete(captioned["shard-000002"])
    broken = max(left, default="shard-000002")
    images = len(storage.read_table(f"shards/{broken}.parquet"))
    tar = storage.local_path(f"shards/{broken}.tar")
    assert tar is not None
    whole = tar.read_bytes()
    tar.write_bytes(whole[:100])
    with pytest.raises(Quarantined, match=f"{broken}: CapstanError"):
        recaption(recipe(captioner, storage), progress=False)
    tar.write_bytes(whole)
    summary = recaption(recipe(captioner, storage, workers=2), progress=False)
    assert {name: summary[name] for name in ("shards", "images", "new", "reused", "done", "unreadable")} == {
        "shards": 3,
        "images": 8,
        "new": images,
        "reused": 0,
        "done": 8 - images,
        "unreadable": 0,
    }
    monkeypatch.setattr(units, "run", run_here)
    again = build(STEPS, "again")
    recaption(recipe(captioner, again, batch=3))
    assert layer_files(storage) == layer_files(again)


def test_rows_stand_in_the_order_of_the_shard(build: Build, captioner: Path, captioned: Counter[str]) -> None:
    storage = build(STEPS)
    summary = recaption(recipe(captioner, storage))
    assert store.latest_layer(storage) == summary["layer"]
    rows = store.read_rows(storage, summary["layer"], "shard-000000").to_pylist()
    keys = [make_key(str(number)) for number in STEPS[0]]
    assert [(row["key"], row["slot"]) for row in rows] == [(key, s) for key in keys for s in ("short", "descriptive")]
    again = recaption(recipe(captioner, storage))
    assert (again["done"], again["new"], again["layer"]) == (8, 0, summary["layer"])


def test_new_data_costs_only_itself(build: Build, captioner: Path, captioned: Counter[str]) -> None:
    storage = build(STEPS)
    recaption(recipe(captioner, storage))
    before = layer_files(storage)
    captioned.clear()
    build([*STEPS, [8, 9, 3]])  # a new shard, with one image that is captioned already
    planned = plan(recipe(captioner, storage))
    assert {name: planned[name] for name in ("done", "new", "reused", "stale")} == {
        "done": 8,
        "new": 2,
        "reused": 1,
        "stale": 0,
    }
    assert planned["eta_s"] > 0
    assert layer_files(storage) == before
    captioned.clear()
    summary = recaption(recipe(captioner, storage))
    assert (summary["new"], summary["reused"], summary["done"]) == (2, 1, 8)
    assert sum(captioned.values()) == 2
    after = layer_files(storage)
    assert {name: after[name] for name in before} == before


def test_repacked_images_keep_their_captions(build: Build, captioner: Path, captioned: Counter[str]) -> None:
    """Every shard holds other images than before, and files are overwritten that others still draw on."""
    storage = build(STEPS)
    recaption(recipe(captioner, storage))
    captioned.clear()
    build([[7, 10], [1, 0, 3, 2], [6, 5, 4, 11]])
    summary = recaption(recipe(captioner, storage))
    assert (summary["new"], summary["reused"], summary["done"], summary["images"]) == (2, 8, 0, 10)
    assert sum(captioned.values()) == 2
    fresh = build([[7, 10], [1, 0, 3, 2], [6, 5, 4, 11]], "fresh")
    recaption(recipe(captioner, fresh))
    assert layer_files(storage) == layer_files(fresh)
    assert not storage.names(f"state/recaption-{summary['layer']}/reuse")
    build(STEPS)  # and back
    captioned.clear()
    back = recaption(recipe(captioner, storage))
    assert not captioned
    assert (back["images"], back["reused"]) == (8, 8)


def test_a_stop_while_files_are_overwritten_loses_nothing(
    build: Build, captioner: Path, captioned: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, other = build(STEPS), [[6, 7], [1, 0, 3], [2, 5, 4, 11]]
    recaption(recipe(captioner, storage))
    build(other)
    written: list[str] = []
    publish = store.write_rows

    def stopping(place: Storage, layer: str, shard: str, rows: Any) -> None:
        publish(place, layer, shard, rows)
        written.append(shard)
        if len(written) in (1, 3):  # the file is there, its marker is not
            raise KeyboardInterrupt

    monkeypatch.setattr(store, "write_rows", stopping)
    captioned.clear()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            recaption(recipe(captioner, storage))
    recaption(recipe(captioner, storage))
    assert sum(captioned.values()) == 1
    fresh = build(other, "fresh")
    recaption(recipe(captioner, fresh))
    assert layer_files(storage) == layer_files(fresh)


def test_another_recipe_is_another_layer(build: Build, captioner: Path, captioned: Counter[str]) -> None:
    storage = build(STEPS)
    first = recaption(recipe(captioner, storage))["layer"]
    before = layer_files(storage)
    drawn = recipe(captioner, storage, decoding={"method": "top_p"})
    planned = plan(drawn)
    assert (planned["new"], planned["stale"], planned["reused"]) == (8, 8, 0)
    second = recaption(drawn)["layer"]
    assert first != second
    assert store.list_layers(storage) == [first, second]
    after = layer_files(storage)
    assert {name: after[name] for name in before} == before


def test_the_same_image_has_the_same_caption_wherever_it_stands(
    build: Build, captioner: Path, captioned: Counter[str]
) -> None:
    storage = build([[0, 1, 1], [2, 1, 0]])
    summary = recaption(recipe(captioner, storage, decoding={"method": "top_p"}))
    rows = [row for n in (0, 1) for row in store.read_rows(storage, summary["layer"], f"shard-00000{n}").to_pylist()]
    assert len(rows) == 12
    assert len({(row["sha256"], row["slot"], row["raw"]) for row in rows}) == 6


def test_a_broken_image_is_a_flagged_row_and_is_tried_again(
    build: Build, captioner: Path, captioned: Counter[str]
) -> None:
    storage = build([[0, -1, 1], [-2]])
    summary = recaption(recipe(captioner, storage))
    assert (summary["new"], summary["unreadable"], summary["images"]) == (2, 2, 4)
    assert summary["flags"]["unreadable"] == 4  # two slots each
    rows = store.read_rows(storage, summary["layer"], "shard-000000").to_pylist()
    bad = [row for row in rows if row["flags"] == ["unreadable"]]
    assert [(row["key"], row["text"], row["finish"]) for row in bad] == [(make_key("-1"), "", "none")] * 2
    assert make_key("-1") not in store.read_layer(storage, summary["layer"], "shard-000000")
    build([[0, -1, 1, 2]])
    assert recaption(recipe(captioner, storage))["reused"] == 2


def test_lost_files_are_made_again(build: Build, captioner: Path, captioned: Counter[str]) -> None:
    storage = build(STEPS)
    layer = recaption(recipe(captioner, storage))["layer"]
    before = layer_files(storage)
    storage.delete(store.file_name(layer, "shard-000001"))
    captioned.clear()
    recaption(recipe(captioner, storage))
    assert sum(captioned.values()) == 3
    assert layer_files(storage) == before


def test_without_a_section_or_a_dataset(captioner: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="recaption: is missing"):
        recaption(Recipe(dataset=str(tmp_path)))
    with pytest.raises(RecipeError, match="capstan build"):
        recaption(recipe(captioner, Storage(str(tmp_path))))
