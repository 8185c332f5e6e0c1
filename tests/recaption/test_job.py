"""A layer ends the same however it was made, and new data costs only itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from caption_runs import STEPS, Build, layer_files, recipe
from in_process import run_here
from small_dataset import image

from capstan.pipeline import units
from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.shards import sha256_of
from capstan.pipeline.errors import CapstanError, Quarantined, RecipeError
from capstan.pipeline.lease import lease
from capstan.pipeline.records import make_key
from capstan.pipeline.storage import Storage
from capstan.recaption import store
from capstan.recaption.engines.coca import CocaEngine
from capstan.recaption.job import plan, recaption


@pytest.mark.integration
def test_killed_or_failed_runs_go_on_and_end_with_the_same_bytes(
    build: Build, captioner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Ray: SIGKILL once the first shard is done, then a shard that cannot be read, then other numbers of workers."""
    storage = build(STEPS)
    file = tmp_path / "recipe.json"
    file.write_text(recipe(captioner, storage).model_dump_json())
    code = (
        "import sys; from pathlib import Path; from capstan.pipeline.config import Recipe;"
        "from capstan.recaption.job import recaption;"
        "recaption(Recipe.model_validate_json(Path(sys.argv[1]).read_text()), progress=False)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(file)], start_new_session=True) as process:
        deadline = time.monotonic() + 300
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
    with pytest.raises(Quarantined, match=f"{broken}: DamagedFile"):
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
    assert not storage.names(store.aside(summary["layer"]))
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

    def stopping(place: Storage, name: str, rows: Any) -> None:
        publish(place, name, rows)
        written.append(name)
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


def test_what_people_corrected_stays_over_new_captions(build: Build, captioner: Path, captioned: Counter[str]) -> None:
    storage = build(STEPS)
    layer = recaption(recipe(captioner, storage))["layer"]
    corrected = {make_key("0"): {"short": "a cat"}}
    store.write_given_layer(storage, "mine", corrected, over=layer)
    before = layer_files(storage)
    build([*STEPS, [8]])
    assert not store.is_captioned(storage, "mine", "shard-000003")
    assert recaption(recipe(captioner, storage))["new"] == 1
    assert {name: data for name, data in layer_files(storage).items() if name in before} == before
    rows = store.rows_of_shard(storage, "mine", "shard-000000").to_pylist()
    below = store.rows_of_shard(storage, layer, "shard-000000").to_pylist()
    assert [row["text"] for row in rows if (row["key"], row["slot"]) == (make_key("0"), "short")] == ["a cat"]
    assert sorted((row["key"], row["slot"]) for row in rows) == sorted((row["key"], row["slot"]) for row in below)
    assert store.rows_of_shard(storage, "mine", "shard-000003").equals(
        store.rows_of_shard(storage, layer, "shard-000003")
    )


def test_the_same_image_has_the_same_caption_wherever_it_stands(
    build: Build, captioner: Path, captioned: Counter[str]
) -> None:
    storage = build([[0, 1, 1], [2, 1, 0]])
    summary = recaption(recipe(captioner, storage, decoding={"method": "top_p"}))
    assert captioned.keys() == {sha256_of(image(number)) for number in (0, 1, 2)}
    assert set(captioned.values()) == {1}  # also where two new shards hold it
    assert (summary["new"], summary["images"], summary["done"]) == (3, 6, 0)
    assert not storage.names(store.aside(summary["layer"]))
    rows = [row for n in (0, 1) for row in store.read_rows(storage, summary["layer"], f"shard-00000{n}").to_pylist()]
    assert len(rows) == 12
    assert len({(row["sha256"], row["slot"], row["raw"]) for row in rows}) == 6


def test_a_broken_image_is_a_flagged_row_and_is_tried_again_by_every_run(
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
    before = layer_files(storage)
    captioned.clear()
    planned = plan(recipe(captioner, storage))
    assert (planned["new"], planned["done"], planned["reused"], planned["eta_s"]) == (
        1,
        0,
        3,
        0.0,
    )  # both are the same bytes
    summary = recaption(recipe(captioner, storage))
    assert (summary["new"], summary["unreadable"], summary["reused"], summary["done"]) == (0, 2, 2, 0)
    assert not captioned  # the engine is asked for nothing
    assert layer_files(storage) == before
    build([[0, -1, 1, 2]])
    assert recaption(recipe(captioner, storage))["reused"] == 2


def test_what_could_not_be_read_in_passing_is_captioned_by_the_next_run(
    build: Build, captioner: Path, captioned: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(self: CocaEngine, jpeg: bytes) -> Any:
        raise MemoryError

    storage = build([[0, 1], [2]])
    with monkeypatch.context() as patched:
        patched.setattr(CocaEngine, "prepare", out_of_memory)
        assert recaption(recipe(captioner, storage))["unreadable"] == 3
    assert plan(recipe(captioner, storage))["new"] == 3
    summary = recaption(recipe(captioner, storage))
    assert (summary["new"], summary["unreadable"], summary["done"]) == (3, 0, 0)
    assert plan(recipe(captioner, storage))["done"] == 3
    fresh = build([[0, 1], [2]], "fresh")
    recaption(recipe(captioner, fresh))
    assert layer_files(storage) == layer_files(fresh)


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


def test_no_layer_is_written_twice_or_during_a_takedown(build: Build, captioner: Path, captioned: Counter[str]) -> None:
    storage = build(STEPS[:1])
    layer = plan(recipe(captioner, storage))["layer"]
    captioned.clear()
    for command, part in (("remove", ""), ("recaption", f"captions/{layer}")):
        with lease(storage, command, part), pytest.raises(CapstanError, match=f"capstan {command}"):
            recaption(recipe(captioner, storage), progress=False)
    assert not captioned
    assert layer_files(storage) == {}
    with lease(storage, "recaption", "captions/another"):
        assert recaption(recipe(captioner, storage), progress=False)["new"] == len(STEPS[0])
