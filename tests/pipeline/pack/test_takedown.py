"""Takedown: what is removed is nowhere in the dataset, never comes back, and leaves everything else as it was."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load, save
from takedowns import (
    ROWS,
    Draw,
    contents,
    everything,
    gone,
    key_of,
    ledger,
    listed,
    recipe_for,
    row,
    storage_of,
    stored,
    tars,
)

from capstan.pipeline import build
from capstan.pipeline.config import Blocklist, Resources
from capstan.pipeline.dataset.shards import Dataset, sha256_of
from capstan.pipeline.pack import added, scrub_units, takedown
from capstan.pipeline.pack.verify import verify
from capstan.pipeline.select import column_blocks
from capstan.pipeline.source.plan import read_plan
from capstan.pipeline.storage import Storage
from capstan.pipeline.units import MarkerLog


@pytest.mark.integration
def test_what_is_removed_is_nowhere_and_the_other_shards_keep_their_bytes(folder: Path) -> None:
    storage = storage_of(folder)
    key, jpeg, before = key_of(storage, 5), stored(storage, 5), tars(storage)
    shard = ledger(storage)[key]["shard"]
    storage.write("state/planning/0123/run-000000-0000.rows", b"http://host1.example1.org/secret-05.jpg")  # of a kill
    for unit in read_plan(storage).units:  # of a batch that was not finished
        storage.write(unit.table.replace("0000", "0007", 2), storage.read(unit.table))
    assert not gone(storage, 5, jpeg)
    # In other letters, without TLS, and with a fragment: it is the same address.
    asked = listed(folder, "http://HOST1.example1.org/secret-05.jpg#top")
    summary = build.remove(storage.url, Blocklist(urls=asked), progress=False)
    assert summary["removed"] == {"rows": 1, "kept": 1, "shards": 1}
    assert gone(storage, 5, jpeg)
    after = tars(storage)
    assert {name for name in before if after.get(name) != before[name]} == {f"shards/{shard}.tar"}
    assert verify(storage) == []
    row = ledger(storage)[key]
    assert (row["outcome"], row["reason"]) == ("rejected", "removed")
    assert (row["url"], row["caption"], row["extra"]) == ("", "", "{}")
    # What was made of the shard follows it: its captions, and its latents in its order, under its new sum.
    dataset = Dataset(storage)
    keys = dataset.table(shard, ["key"])["key"].to_pylist()
    assert storage.read_table(f"captions/mine/{shard}.parquet")["key"].to_pylist() == keys
    data = storage.read(f"latents/enc/{shard}.safetensors")
    assert load(data)["latents"].ravel().tolist() == [np.float16(int(key[:4], 16)) for key in keys]
    assert {entry.name: entry.sha256 for entry in dataset.manifest.shards}[shard].encode() in data[:400]
    assert storage.read_table("captions/mine/aside/part.parquet")["raw"].to_pylist() == ["words-06"]
    assert not [name for name in storage.names() if name.startswith(("latents/old/", "shelf/", "captions/diff-"))]
    # The log tells how much was removed, not what.
    (line,) = storage.read("removed/log.jsonl").splitlines()
    said = {name: value for name, value in json.loads(line).items() if name != "date"}
    assert said == {"asked": {"urls": 1}, "rows": 1, "kept": 1, "shards": [shard]}


@pytest.mark.integration
@pytest.mark.parametrize("scored", [False, True])
def test_only_what_held_the_rows_is_written_again_and_all_is_as_if_all_were_selected(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scored: bool
) -> None:
    """Rows that were kept, a duplicate, and one that a condition rejected."""
    select = [{"name": "not_this_one", "where": "caption NOT LIKE 'words-09%'"}]
    changed = recipe_for(folder, select=select, **({"score": {"caption": {}}} if scored else {}))
    build.build(changed, progress=False)
    storage = storage_of(folder)
    keys = [key_of(storage, number) for number in (5, 9, 20)]
    outcomes = [ledger(storage)[key]["outcome"] for key in keys]
    assert outcomes[:2] == ["kept", "rejected"]  # and of rows 3 and 20, which hold one file, one is kept
    shutil.copytree(folder / "dataset", tmp_path / "other")
    monkeypatch.setattr(added, "decide", lambda *_: pytest.fail("all rows were selected again"))
    build.remove(storage.url, Blocklist(keys=listed(folder, *keys)), progress=False)
    monkeypatch.undo()
    shutil.move(folder / "dataset", folder / "fast")
    shutil.move(tmp_path / "other", folder / "dataset")
    monkeypatch.setattr(build, "decides_rows_alone", lambda _: False)
    build.remove(storage.url, Blocklist(keys=listed(folder, *keys)), progress=False)
    fast, slow = contents(Storage(str(folder / "fast"))), contents(storage)
    assert fast.keys() == slow.keys()
    assert [name for name in fast if fast[name] != slow[name]] == []
    # The next selection finds nothing to do.
    monkeypatch.undo()
    monkeypatch.setattr(added, "decide", lambda *_: pytest.fail("all rows were selected again"))
    assert build.select(changed, progress=False)["counts"]["rejected"] == 4


@pytest.mark.integration
def test_blocks_of_columns_forget_what_is_removed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, url = storage_of(folder), "secret-05"
    monkeypatch.setattr(column_blocks, "LEAST", 1)
    build.build(recipe_for(folder, select=[{"name": "wide", "where": "width >= 8"}]), progress=False)
    blocks = Storage(f"{storage.url}/state/columns")
    assert url.encode() in everything(blocks)
    build.remove(storage.url, Blocklist(keys=listed(folder, key_of(storage, 5))), progress=False)
    assert url.encode() not in everything(storage)
    # All units were in one block. The next selection writes it again, without the row.
    assert blocks.names() == ["index.json"]
    build.build(recipe_for(folder, select=[{"name": "wider", "where": "width >= 9"}]), progress=False)
    assert len(blocks.names()) == 2
    assert url.encode() not in everything(storage)


@pytest.mark.integration
def test_steps_that_count_rows_are_asked_again(folder: Path) -> None:
    """The row that is taken down makes room for another one of its host."""
    select = [{"name": "few", "at_most": 2, "per": "domain"}]
    storage, recipe = storage_of(folder), recipe_for(folder, select=select)
    build.build(recipe, progress=False)
    kept = [row for row in ledger(storage).values() if row["outcome"] == "kept"]
    assert len(kept) == 8
    build.remove(storage.url, Blocklist(keys=listed(folder, kept[0]["key"])), progress=False)
    assert sum(row["outcome"] == "kept" for row in ledger(storage).values()) == 8
    assert verify(storage) == []


@pytest.mark.integration
def test_files_that_markers_bind_to_other_shards_are_not_read(folder: Path) -> None:
    storage = storage_of(folder)
    dataset = Dataset(storage)
    key = key_of(storage, 5)
    shard = ledger(storage)[key]["shard"]
    for entry in dataset.manifest.shards:
        MarkerLog(storage, "recaption-mine").mark(entry.name, {"source": entry.sha256})
        MarkerLog(storage, "latents-enc").mark(f"{entry.name}-{entry.sha256[:12]}", {})
        if entry.name != shard:
            storage.write(f"captions/mine/{entry.name}.parquet", b"not read")
            storage.write(f"latents/enc/{entry.name}.safetensors", b"not read")
    build.remove(storage.url, Blocklist(keys=listed(folder, key)), progress=False)
    assert key not in storage.read_table(f"captions/mine/{shard}.parquet")["key"].to_pylist()
    left = Dataset(storage).table(shard, ["key"])
    assert len(load(storage.read(f"latents/enc/{shard}.safetensors"))["latents"]) == len(left) < 4
    # A shard that was encoded twice may have the latents of either time.
    other = next(entry for entry in Dataset(storage).manifest.shards if entry.name != shard)
    MarkerLog(storage, "latents-enc").mark(f"{other.name}-{'0' * 12}", {})
    storage.write(f"latents/enc/{other.name}.safetensors", save({"latents": np.zeros((9, 1), np.float16)}))
    entry = Dataset(storage).manifest.shards[dataset.shard_names.index(shard)]
    MarkerLog(storage, "recaption-mine").mark(shard, {"source": entry.sha256})
    build.remove(storage.url, Blocklist(keys=listed(folder, left["key"][0].as_py())), progress=False)
    assert not storage.exists(f"latents/enc/{other.name}.safetensors")


@pytest.mark.integration
def test_nothing_that_was_removed_comes_back(folder: Path, draw: Draw) -> None:
    storage = storage_of(folder)
    jpeg, before = stored(storage, 5), key_of(storage, 5)
    build.remove(storage.url, Blocklist(keys=listed(folder, before)), progress=False)
    shards = tars(storage)
    # The same source, and then one with the same file elsewhere, the address with other words, and a new row.
    again = build.build(recipe_for(folder), progress=False)
    assert (again["counts"]["kept"], tars(storage)) == (ROWS - 2, shards)
    new = [
        row(draw, 5) | {"url": "https://elsewhere.net/a.jpg", "caption": "the same file", "photographer": "?"},
        row(draw, 50) | {"url": row(draw, 5)["url"], "caption": "other words"},
        row(draw, 51),
    ]
    pq.write_table(pa.Table.from_pylist(new), folder / "rows.parquet")
    later = build.build(recipe_for(folder), progress=False)
    assert later["counts"]["kept"] == ROWS - 1
    assert later["counts"]["rejected"] == 3
    assert gone(storage, 5, jpeg)
    assert b"other words" not in everything(storage)
    assert verify(storage) == []
    build.select(recipe_for(folder, dedup={"exact": False, "perceptual": None}), progress=False)
    assert gone(storage, 5, jpeg)


@pytest.mark.integration
def test_a_domain_goes_with_its_subdomains_and_copies_of_its_files(folder: Path) -> None:
    storage = storage_of(folder)
    summary = build.remove(storage.url, Blocklist(domains=listed(folder, "example1.org")), progress=False)
    # Half of the rows, and row 20, which is another host's copy of row 3.
    assert summary["removed"]["rows"] == ROWS // 2 + 1
    left = [row["url"] for row in ledger(storage).values() if row["url"]]
    assert len(left) == ROWS // 2 - 1
    assert not any("example1.org" in url for url in left)
    assert verify(storage) == []


@pytest.mark.integration
@pytest.mark.parametrize("stage", ["_scrub_staged", "scrub_derived", "finish"])
def test_a_takedown_that_was_cut_off_is_completed_by_the_next_build(
    folder: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = storage_of(folder)
    jpeg, key = stored(storage, 5), key_of(storage, 5)

    class KilledError(BaseException):
        pass

    def killed(*_: object) -> None:
        raise KilledError

    with monkeypatch.context() as broken:
        broken.setattr({"finish": build, "_scrub_staged": scrub_units}.get(stage, takedown), stage, killed)
        with pytest.raises(KilledError):
            build.remove(storage.url, Blocklist(keys=listed(folder, key)), progress=False)
    assert storage.exists("removed/pending.parquet")
    built = build.build(recipe_for(folder), progress=False)
    assert built["counts"]["kept"] == ROWS - 2
    assert gone(storage, 5, jpeg)
    assert verify(storage) == []
    assert not storage.exists("removed/pending.parquet")


def test_a_takedown_that_is_run_again_after_a_kill_is_counted_once(folder: Path) -> None:
    storage = storage_of(folder)
    lists = Blocklist(keys=listed(folder, key_of(storage, 5), key_of(storage, 6)))
    takedown.take_down(storage, lists)  # and killed before it was finished
    build.remove(storage.url, lists, progress=False)
    (line,) = storage.read("removed/log.jsonl").decode().splitlines()
    assert json.loads(line)["asked"] == {"keys": 2}
    assert json.loads(line)["rows"] == 2


@pytest.mark.integration
def test_a_shard_of_which_all_is_removed_is_no_more(folder: Path) -> None:
    storage = storage_of(folder)
    shard = Dataset(storage).shard_names[1]
    keys = Dataset(storage).table(shard, ["key"])["key"].to_pylist()
    before = tars(storage)
    build.remove(storage.url, Blocklist(keys=listed(folder, *keys)), progress=False)
    assert tars(storage) == {name: sum_ for name, sum_ in before.items() if name != f"shards/{shard}.tar"}
    assert not storage.exists(f"latents/enc/{shard}.safetensors")
    assert verify(storage) == []
    assert build.build(recipe_for(folder), progress=False)["counts"]["kept"] == ROWS - 1 - len(keys)


@pytest.mark.integration
def test_a_blocklist_of_the_recipe_is_not_fetched_and_not_kept(tmp_path: Path, two_cpus: Resources, draw: Draw) -> None:
    pq.write_table(pa.Table.from_pylist([row(draw, number) for number in range(6)]), tmp_path / "rows.parquet")
    (tmp_path / "domains.txt").write_text("example0.org\n")
    (tmp_path / "sums.txt").write_text(sha256_of(draw(1)))
    blocklist = {"domains": str(tmp_path / "domains.txt")}
    counts = build.build(recipe_for(tmp_path, blocklist=blocklist), progress=False)["counts"]
    assert (counts["kept"], counts["rejected"], counts["failed"]) == (3, 3, 0)
    assert b"secret-02" not in everything(Storage(str(tmp_path / "dataset")))
    # Another list, of what is packed: select honours it.
    blocklist |= {"sha256": str(tmp_path / "sums.txt")}
    counts = build.select(recipe_for(tmp_path, blocklist=blocklist), progress=False)["counts"]
    assert (counts["kept"], counts["rejected"]) == (2, 4)


@pytest.mark.integration
def test_scores_follow_and_freed_images_are_taken_from_the_shards(
    tmp_path: Path, two_cpus: Resources, draw: Draw
) -> None:
    """With staged images freed, the shard is packed anew from itself; scores are not computed again."""
    pq.write_table(pa.Table.from_pylist([row(draw, number) for number in range(9)]), tmp_path / "rows.parquet")
    recipe = recipe_for(tmp_path, keep_staged=False, score={"caption": {}, "image": {}})
    assert build.build(recipe, progress=False)["counts"]["kept"] == 9
    storage = Storage(recipe.dataset)
    assert not [name for name in storage.names("staged") if name.endswith(".tar")]
    jpeg, key, before = stored(storage, 5), key_of(storage, 5), tars(storage)
    build.remove(storage.url, Blocklist(keys=listed(tmp_path, key)), progress=False)
    assert gone(storage, 5, jpeg)
    assert verify(storage) == []
    assert sum(before[name] != sum_ for name, sum_ in tars(storage).items()) == 1
    rows = ledger(storage)
    assert rows[key]["caption_words"] is None
    assert all(other["caption_words"] is not None for name, other in rows.items() if name != key)
    shards = tars(storage)
    assert build.build(recipe, progress=False)["counts"]["kept"] == 8
    assert tars(storage) == shards
    # A shard that is no more leaves a gap in the numbers: the one after it is still packed from itself.
    dataset = Dataset(storage)
    first, middle, last = (dataset.table(name, ["key"])["key"].to_pylist() for name in dataset.shard_names)
    build.remove(storage.url, Blocklist(keys=listed(tmp_path, *middle)), progress=False)
    build.remove(storage.url, Blocklist(keys=listed(tmp_path, last[0])), progress=False)
    assert verify(storage) == []
    assert [row["key"] for row in ledger(storage).values() if row["outcome"] == "kept"] == [*first, *last[1:]]
    assert build.build(recipe, retry="freed", progress=False)["retried"] == 0
