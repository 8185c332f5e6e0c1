"""What an engine gives and does not give, by one that says what it is told to."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from in_process import run_here
from scripted_engine import ScriptedEngine, said
from small_dataset import image

from capstan.cluster.cli import run
from capstan.pipeline import units
from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.shards import read_manifest, sha256_of, write_manifest
from capstan.pipeline.records import make_key
from capstan.pipeline.storage import Storage
from capstan.recaption import job, store
from capstan.recaption.engines import Caption
from capstan.recaption.job import plan, recaption

Build = Callable[..., Storage]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, build: Build) -> Callable[[Any], tuple[ScriptedEngine, Recipe, Storage]]:
    """Runs jobs in this process, with this engine, over a dataset of four images."""

    def make(engine: ScriptedEngine) -> tuple[ScriptedEngine, Recipe, Storage]:
        monkeypatch.setattr(units, "run", run_here)
        monkeypatch.setattr(job, "make", lambda *_, **__: engine)
        storage = build([[0, 1], [2, 3]])
        section = {"model": "x", "slots": ["short"]}
        return engine, Recipe.model_validate({"dataset": storage.url, "recaption": section}), storage

    return make


def test_the_original_stands_in_and_is_flagged(scripted: Any) -> None:
    bad = sha256_of(image(1))
    say = lambda r, slot, attempt: said("a a a a a" if r.sha256 == bad else f"a dog {attempt}", attempt)  # noqa: E731
    engine, made, storage = scripted(ScriptedEngine(say))
    summary = recaption(made)
    assert (summary["retried"], summary["flags"]["original"], summary["flags"]["loop"]) == (1, 1, 1)
    rows = store.read_rows(storage, summary["layer"], "shard-000000").to_pylist()
    assert [(row["text"], row["raw"], row["discarded"]) for row in rows] == [
        ("a dog 0", "a dog 0", []),
        ("alt 1", "a a a a a", ["a a a a a"] * 2),
    ]
    assert store.read_layer(storage, summary["layer"], "shard-000000") == {make_key("0"): {"short": "a dog 0"}}
    assert [attempt for request, attempt in engine.asked if request.sha256 == bad] == [0, 1, 2]


def test_what_an_engine_failed_to_give_is_asked_for_by_the_next_run(scripted: Any) -> None:
    down = {sha256_of(image(2))}
    none = Caption("", 0, "none", 0, "http_503")
    engine, made, _ = scripted(ScriptedEngine(lambda r, slot, attempt: none if r.sha256 in down else said("a dog")))
    summary = recaption(made)
    assert (summary["failed"], summary["flags"]["http_503"], summary["new"]) == (1, 1, 4)
    engine.asked.clear()
    down.clear()
    assert plan(made)["new"] == 1
    engine.asked.clear()
    summary = recaption(made)
    assert [request.sha256 for request, _ in engine.asked] == [sha256_of(image(2))]
    assert (summary["failed"], summary["new"], summary["done"], summary["reused"]) == (0, 1, 2, 1)
    assert recaption(made)["done"] == 4


def test_only_the_slot_that_an_engine_failed_to_give_is_asked_for_again(scripted: Any, build: Build) -> None:
    """A filter that lets the short caption pass: what was paid for is kept, as it was written."""
    bad, down = sha256_of(image(1)), ["descriptive"]
    count = Counter[str]()

    def say(request: Any, slot: str, attempt: int) -> Caption:
        if request.sha256 == bad and slot in down:
            return Caption("", 0, "none", 0, "content_filter")
        count[request.sha256] += 1
        return said(f"a {slot} dog, told {count[request.sha256]} times")

    engine, made, storage = scripted(ScriptedEngine(say))
    made.recaption["slots"] = ["short", "descriptive"]
    layer = recaption(made)["layer"]

    def rows(shard: str = "shard-000000") -> dict[str, str]:
        return {row["slot"]: row["raw"] for row in store.read_rows(storage, layer, shard).to_pylist() if is_bad(row)}

    def is_bad(row: dict[str, Any]) -> bool:
        return bool(row["sha256"] == bad)

    assert rows() == {"short": "a short dog, told 1 times", "descriptive": ""}
    for _ in range(2):  # refused for good
        planned = plan(made)
        assert (planned["new"], planned["captions"], planned["reused"], planned["done"]) == (1, 1, 1, 2)
        engine.asked.clear()
        summary = recaption(made)
        assert {(request.sha256, request.slots) for request, _ in engine.asked} == {(bad, ("descriptive",))}
        assert rows() == {"short": "a short dog, told 1 times", "descriptive": ""}
        assert (summary["failed"], summary["new"], summary["reused"]) == (1, 1, 1)
    build([[0], [2, 3, 1], [1]])  # elsewhere now, in two shards of which the first asks
    engine.asked.clear()
    down.clear()
    assert recaption(made)["failed"] == 0
    assert {(request.sha256, request.slots) for request, _ in engine.asked} == {(bad, ("descriptive",))}
    whole = {"short": "a short dog, told 1 times", "descriptive": "a descriptive dog, told 2 times"}
    assert rows("shard-000001") == rows("shard-000002") == whole
    assert plan(made)["done"] == 5


@pytest.mark.parametrize("raw", ["<think>{}</think>\n\n{}", "{}\n</think>\n{}", "[THINK]{}[/THINK]{}"])
def test_reasoning_is_kept_raw_and_cut_from_the_text(scripted: Any, raw: str) -> None:
    raw = raw.format("I see a dog. Is it a dog?", "a dog on a red sofa")
    _, made, storage = scripted(ScriptedEngine(lambda r, slot, attempt: said(raw)))
    layer = recaption(made)["layer"]
    (row, *_) = store.read_rows(storage, layer, "shard-000000").to_pylist()
    assert (row["raw"], row["text"], row["flags"]) == (raw, "a dog on a red sofa", [])


def test_a_text_that_a_filter_cut_is_kept_and_flagged(scripted: Any) -> None:
    cut = Caption("a dog sits. it looks at", 6, "length", 0, "content_filter")
    _, made, storage = scripted(ScriptedEngine(lambda r, slot, attempt: cut))
    layer = recaption(made)["layer"]
    (row, *_) = store.read_rows(storage, layer, "shard-000000").to_pylist()
    assert (row["raw"], row["text"]) == ("a dog sits. it looks at", "a dog sits.")
    assert row["flags"] == ["content_filter", "no_end"]


def test_a_run_of_which_a_large_share_failed_ends_with_exit_code_3(
    scripted: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    down = {sha256_of(image(n)) for n in (1, 2)}
    none = Caption("", 0, "none", 0, "http_503")
    _, made, _ = scripted(ScriptedEngine(lambda r, slot, attempt: none if r.sha256 in down else said("a dog")))
    shown = Counter[str]()
    monkeypatch.setattr(units, "report", shown.update)
    file = tmp_path / "recipe.yaml"
    file.write_text(made.model_dump_json(exclude_none=True))
    assert run(["recaption", str(file), "--json"]) == 3
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["captions"] == 2
    assert "2 of 4 captions failed (http_503 2)" in err
    assert (shown["samples"], shown["failed.http_503"]) == (4, 2)
    down.pop()
    assert run(["recaption", str(file)]) == 0  # one of four: flagged, and the next run retries it


def test_captions_that_quote_the_original_depend_on_it(scripted: Any) -> None:
    engine, made, storage = scripted(
        ScriptedEngine(lambda r, slot, attempt: said(f"fused from {r.original}"), uses_original=True)
    )
    layer = recaption(made)["layer"]
    assert store.read_layer(storage, layer, "shard-000001")[make_key("3")] == {"short": "fused from alt 3"}
    manifest = read_manifest(storage)
    assert manifest is not None
    table = storage.read_table("shards/shard-000001.parquet")
    table = table.set_column(table.schema.get_field_index("caption"), table.schema.field("caption"), [["alt 2", "new"]])
    storage.write_table("shards/shard-000001.parquet", table)
    shards = [manifest.shards[0], manifest.shards[1].model_copy(update={"sha256": "0" * 64})]
    write_manifest(storage, manifest.model_copy(update={"shards": shards}))
    engine.asked.clear()
    assert recaption(made)["new"] == 1
    assert [request.original for request, _ in engine.asked] == ["new"]
    assert store.read_layer(storage, layer, "shard-000001")[make_key("3")] == {"short": "fused from new"}
