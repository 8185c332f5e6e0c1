"""An exported dataset is a dataset: it verifies, every reader sees the layer's text, and what was there is not lost."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from in_process import run_here
from small_dataset import as_if_a_model_wrote_it, replace_image

from capstan.pipeline import units
from capstan.pipeline.config import Resources
from capstan.pipeline.dataset.shards import Dataset, LedgerEntry, read_manifest, sha256_of, write_manifest
from capstan.pipeline.errors import DamagedFile, RecipeError
from capstan.pipeline.pack.verify import verify
from capstan.pipeline.records import LEDGER_SCHEMA, make_key
from capstan.pipeline.select.licenses import LICENSE
from capstan.pipeline.storage import Storage, parquet_bytes
from capstan.recaption import export as export_module
from capstan.recaption import store
from capstan.recaption.export import export

KEY = [make_key(str(number)) for number in range(8)]
STEPS = [[0, 1, 2], [3, 4], [5]]
TEXTS = {
    KEY[0]: {"descriptive": "a dog's ball, described at length. “Ü”", "short": "a ball"},
    KEY[1]: {"short": "only a short one"},
    KEY[3]: {"descriptive": "three"},
}


@pytest.fixture
def source(build: Callable[..., Storage], monkeypatch: pytest.MonkeyPatch) -> Storage:
    """A dataset with a ledger and a layer that lacks some captions."""
    monkeypatch.setattr(export_module, "run", run_here)
    storage = build(STEPS)
    store.write_given_layer(storage, "given", TEXTS)
    manifest = read_manifest(storage)
    assert manifest is not None
    rows: list[dict[str, Any]] = []
    for entry in manifest.shards:
        for row in storage.read_table(entry.table).to_pylist():
            told = {"outcome": "kept", "reason": "", "detail": "", "unit": "u", "shard": entry.name}
            rows.append({name: row.get(name, told.get(name)) for name in LEDGER_SCHEMA.names})
    data = parquet_bytes(pa.Table.from_pylist(rows, LEDGER_SCHEMA))
    ledger = LedgerEntry(name="unit-u", rows=len(rows), sha256=sha256_of(data))
    storage.write(ledger.table, data)
    counts = {"kept": len(rows)}
    write_manifest(storage, manifest.model_copy(update={"ledger": [ledger], "counts": counts, "recipe": {"a": 1}}))
    return storage


def run(source: Storage, target: Path, slot: str = "descriptive") -> dict[str, Any]:
    return export(source, "given", Storage(str(target), field="DEST"), slot=slot, resources=Resources())


def content(folder: Path) -> dict[str, bytes]:
    storage = Storage(str(folder))
    return {name: storage.read(name) for name in storage.names() if not name.startswith("state/")}


def members(folder: Path, shard: str) -> dict[str, bytes]:
    with tarfile.open(folder / f"shards/{shard}.tar") as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def test_the_copy_verifies_and_has_the_layers_text(source: Storage, tmp_path: Path) -> None:
    before = content(Path(source.url))
    summary = run(source, tmp_path / "copy")
    assert {name: summary[name] for name in ("samples", "from_layer", "original", "shards", "written")} == {
        "samples": 6,
        "from_layer": 2,
        "original": 4,
        "shards": 3,
        "written": 3,
    }
    assert verify(Storage(str(tmp_path / "copy"))) == []
    assert content(Path(source.url)) == before
    found, old = members(tmp_path / "copy", "shard-000000"), members(Path(source.url), "shard-000000")
    assert list(found) == [f"{key}.{suffix}" for key in KEY[:3] for suffix in ("jpg", "json", "txt")]
    assert {name: data for name, data in found.items() if name.endswith("jpg")} == {
        name: data for name, data in old.items() if name.endswith("jpg")
    }
    assert found[f"{KEY[0]}.txt"].decode() == TEXTS[KEY[0]]["descriptive"]
    assert found[f"{KEY[1]}.txt"].decode() == "alt 1"
    fields = json.loads(found[f"{KEY[0]}.json"])
    assert fields["caption"] == TEXTS[KEY[0]]["descriptive"]
    told = json.loads(fields["extra"])["capstan"]
    assert told == {"layer": "given", "slot": "descriptive", "captions": TEXTS[KEY[0]] | {"original": "alt 0"}}
    dataset = Dataset(Storage(str(tmp_path / "copy")))
    assert dataset.manifest.recipe == {"a": 1, "captions": {"layer": "given", "slot": "descriptive"}}
    assert dataset.ledger(["caption"]) == Dataset(source).ledger(["caption"])


def test_the_columns_of_scores_and_licences_stay(source: Storage, tmp_path: Path) -> None:
    manifest = read_manifest(source)
    assert manifest is not None
    shards = []
    for entry in manifest.shards:
        table = source.read_table(entry.table)
        table = table.append_column(LICENSE, pa.repeat("CC0-1.0", len(table)))
        source.write_table(entry.table, table.append_column("clip_score", pa.repeat(0.25, len(table))))
        shards.append(entry.model_copy(update={"table_sha256": sha256_of(source.read(entry.table))}))
    write_manifest(source, manifest.model_copy(update={"shards": shards}))
    run(source, tmp_path / "copy")
    copy = Dataset(Storage(str(tmp_path / "copy")))
    for name in copy.shard_names:
        assert set(copy.table(name)["license"].to_pylist()) == {"CC0-1.0"}
        assert set(copy.table(name)["clip_score"].to_pylist()) == {0.25}
    fields = json.loads(members(tmp_path / "copy", "shard-000000")[f"{KEY[0]}.json"])
    assert fields["license"] == "CC0-1.0"


def test_another_slot(source: Storage, tmp_path: Path) -> None:
    run(source, tmp_path / "copy", slot="short")
    assert members(tmp_path / "copy", "shard-000000")[f"{KEY[1]}.txt"].decode() == "only a short one"
    with pytest.raises(RecipeError, match="descriptive, short"):
        run(source, tmp_path / "other", slot="shorter")


def test_other_readers_see_the_text(source: Storage, tmp_path: Path) -> None:
    import datasets
    import webdataset

    run(source, tmp_path / "copy")
    tars = [str(path) for path in sorted((tmp_path / "copy/shards").glob("*.tar"))]
    expected = {key: TEXTS.get(key, {}).get("descriptive", f"alt {n}") for n, key in enumerate(KEY[:6])}
    read = webdataset.WebDataset(tars, shardshuffle=False).decode("pil")
    assert {sample["__key__"]: sample["txt"] for sample in read} == expected
    rows = datasets.load_dataset("webdataset", data_files=tars, split="train", streaming=True)
    assert {row["__key__"]: row["txt"] for row in rows} == expected


def test_an_export_that_was_stopped_goes_on(source: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(source, tmp_path / "whole")
    commit, committed = export_module.Export.commit, []

    def stopping(self: Any, unit: Any, pieces: Any) -> Any:
        if len(committed) == 1:
            raise KeyboardInterrupt
        committed.append(unit.id)
        return commit(self, unit, pieces)

    with monkeypatch.context() as patched:
        patched.setattr(export_module.Export, "commit", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "torn")
    assert read_manifest(Storage(str(tmp_path / "torn"))) is None
    first = (tmp_path / "torn/shards/shard-000000.tar").stat().st_mtime_ns
    assert run(source, tmp_path / "torn")["written"] == 2
    assert (tmp_path / "torn/shards/shard-000000.tar").stat().st_mtime_ns == first
    assert content(tmp_path / "torn") == content(tmp_path / "whole")


def test_only_shards_whose_content_changes_are_written_again(source: Storage, tmp_path: Path) -> None:
    run(source, tmp_path / "copy")
    first = content(tmp_path / "copy")
    assert run(source, tmp_path / "copy")["written"] == 0
    name = store.file_name("given", "shard-000001")
    table = source.read_table(name)
    source.write_table(name, table.slice(0, 0))
    assert run(source, tmp_path / "copy")["written"] == 1
    assert verify(Storage(str(tmp_path / "copy"))) == []
    assert members(tmp_path / "copy", "shard-000001")[f"{KEY[3]}.txt"] == b"alt 3"
    source.write_table(name, table)
    assert run(source, tmp_path / "copy")["written"] == 1
    assert content(tmp_path / "copy") == first


def test_what_would_be_overwritten_is_refused(source: Storage, build: Callable[..., Storage], tmp_path: Path) -> None:
    other = build([[7]], "other")
    with pytest.raises(RecipeError, match="another dataset"):
        run(source, Path(other.url))
    with pytest.raises(RecipeError, match="itself"):
        run(source, Path(source.url))
    with pytest.raises(RecipeError, match="no caption layer 'none'"):
        export(source, "none", other, slot="short", resources=Resources())


def test_nothing_of_other_people_is_removed(source: Storage, tmp_path: Path) -> None:
    """Folders that an export would use, without a dataset in them."""
    mine = Storage(str(tmp_path / "mine"))
    for name in ("shards/mine.tar", "ledger/mine.parquet", "sizes.json"):
        mine.write(name, b"mine")
        with pytest.raises(RecipeError, match=f"DEST: .*{name}.*empty"):
            run(source, tmp_path / "mine")
        assert content(tmp_path / "mine") == {name: b"mine"}
        mine.delete(name)
    run(source, tmp_path / "mine")


def test_an_export_that_was_stopped_before_its_first_shard_goes_on(
    source: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(export_module, "run", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "torn")
    assert content(tmp_path / "torn").keys() == {"ledger/unit-u.parquet"}
    assert run(source, tmp_path / "torn")["written"] == 3


def test_a_model_s_layer_that_lacks_a_shard_is_to_be_completed_first(source: Storage, tmp_path: Path) -> None:
    as_if_a_model_wrote_it(source, "given")
    source.delete(store.file_name("given", "shard-000001"))
    with pytest.raises(RecipeError, match=r"shard-000001.*capstan recaption"):
        run(source, tmp_path / "copy")


def test_a_model_s_layer_that_has_not_seen_all_samples_is_to_be_completed_first(
    source: Storage, tmp_path: Path
) -> None:
    as_if_a_model_wrote_it(source, "given")
    with pytest.raises(RecipeError, match=r"[12] newer sample\(s\) of shard-000000"):
        run(source, tmp_path / "copy")


def test_what_people_wrote_is_exported_wherever_its_images_went(
    source: Storage, build: Callable[..., Storage], tmp_path: Path
) -> None:
    build([[0, 3, 5], [1, 2, 4, 6]])
    summary = run(source, tmp_path / "copy")
    assert (summary["from_layer"], summary["original"], summary["written"]) == (2, 5, 2)
    assert members(tmp_path / "copy", "shard-000000")[f"{KEY[3]}.txt"] == b"three"
    name = store.file_name("given", "shard-000001")
    source.write_table(name, source.read_table(name).slice(1))
    summary = run(source, tmp_path / "copy")
    assert (summary["from_layer"], summary["written"]) == (1, 1)


def test_captions_of_another_image_are_not_exported(source: Storage, tmp_path: Path) -> None:
    replace_image(source, "shard-000001", KEY[3])
    assert run(source, tmp_path / "copy")["from_layer"] == 1
    assert members(tmp_path / "copy", "shard-000001")[f"{KEY[3]}.txt"] == b"alt 3"
    store.write_given_layer(source, "whole", {key: {"descriptive": "a dog"} for key in KEY[:6]})
    as_if_a_model_wrote_it(source, "whole")
    replace_image(source, "shard-000002", KEY[5])
    with pytest.raises(RecipeError, match=r"layer whole has no captions for 1 newer sample\(s\) of shard-000002"):
        export(source, "whole", Storage(str(tmp_path / "other")), slot="descriptive", resources=Resources())


def test_a_layer_over_another_is_exported_with_both_texts(source: Storage, tmp_path: Path) -> None:
    store.write_given_layer(source, "model", {key: {"descriptive": "a dog"} for key in KEY[:6]})
    as_if_a_model_wrote_it(source, "model")
    store.write_given_layer(source, "mine", {KEY[0]: {"descriptive": "a cat"}}, over="model")
    target = Storage(str(tmp_path / "copy"), field="DEST")
    summary = export(source, "mine", target, slot="descriptive", resources=Resources())
    assert (summary["from_layer"], summary["original"]) == (6, 0)
    texts = members(tmp_path / "copy", "shard-000000")
    assert [texts[f"{key}.txt"] for key in KEY[:2]] == [b"a cat", b"a dog"]
    store.write_given_layer(source, "mine", {KEY[3]: {"descriptive": "a cow"}}, over="model")
    summary = export(source, "mine", target, slot="descriptive", resources=Resources())
    assert summary["written"] == 2  # only the shards whose texts changed
    replace_image(source, "shard-000002", KEY[5])
    with pytest.raises(RecipeError, match=r"layer model has no captions for 1 newer sample\(s\) of shard-000002"):
        export(source, "mine", Storage(str(tmp_path / "other")), slot="descriptive", resources=Resources())


@pytest.mark.integration
def test_workers_write_what_this_process_writes(
    source: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(source, tmp_path / "copy")
    monkeypatch.setattr(units, "SMALL_RUN", 0)
    monkeypatch.setattr(units, "_on_ray", lambda *_: False)
    monkeypatch.setattr(export_module, "run", units.run)
    run(source, tmp_path / "other")
    assert content(tmp_path / "other") == content(tmp_path / "copy")


def test_only_ledger_tables_that_changed_or_are_gone_are_copied_again(source: Storage, tmp_path: Path) -> None:
    run(source, tmp_path / "copy")
    target, name = Storage(str(tmp_path / "copy")), "ledger/unit-u.parquet"
    whole = target.read(name)
    target.write(name, b"as it was")
    run(source, tmp_path / "copy")
    assert target.read(name) == b"as it was"
    target.delete(name)
    run(source, tmp_path / "copy")
    assert target.read(name) == whole


def test_a_damaged_ledger_is_not_copied(source: Storage, tmp_path: Path) -> None:
    source.write("ledger/unit-u.parquet", b"something else")
    with pytest.raises(DamagedFile, match="unit-u"):
        run(source, tmp_path / "copy")
