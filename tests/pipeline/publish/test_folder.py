"""A copy in a folder verifies, holds what the manifest lists and nothing else, and is written whole or not at all."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from capstan.pipeline.build import remove
from capstan.pipeline.config import Blocklist
from capstan.pipeline.dataset.shards import Dataset, read_manifest, write_manifest
from capstan.pipeline.errors import CapstanError, DamagedFile, RecipeError
from capstan.pipeline.pack.verify import verify
from capstan.pipeline.publish import folder as folder_module
from capstan.pipeline.publish.card import card
from capstan.pipeline.publish.contents import Wishes
from capstan.pipeline.publish.folder import Folder
from capstan.pipeline.publish.job import publish
from capstan.pipeline.storage import Storage
from capstan.recaption.edits import changed, read_edits, write_edits
from capstan.recaption.store import Place, list_layers

PRIVATE = b"intranet.example"


def run(source: Storage, target: Path, **options: Any) -> dict[str, Any]:
    destination = Folder(Storage(str(target), field="DEST"))
    return publish(source, destination, str(target), progress=False, **options)


def content(folder: Path) -> dict[str, bytes]:
    storage = Storage(str(folder))
    return {name: storage.read(name) for name in storage.names()}


def test_the_copy_verifies_and_holds_only_what_is_listed(dataset: Storage, tmp_path: Path) -> None:
    summary = run(dataset, tmp_path / "birds", contact="me@example.org")
    copy = content(tmp_path / "birds")
    assert verify(Storage(str(tmp_path / "birds"))) == []
    assert summary["sent"] == summary["files"] == len(copy)
    own = Dataset(dataset).manifest
    for entry in own.shards:
        assert copy[entry.tar] == dataset.read(entry.tar)
        assert copy[entry.table] == dataset.read(entry.table)
    assert not [name for name in copy if name.startswith(("ledger/", "staged/", "state/", "captions/"))]
    assert not [name for name, data in copy.items() if PRIVATE in data]
    assert not [name for name, data in copy.items() if str(tmp_path).encode() in data]  # no folder of this machine
    assert json.loads(copy["croissant.json"])["name"] == "birds"
    assert json.loads(copy["dataset.json"])["recipe"]["source"]["path"] == "licensed.parquet"


def test_the_card_says_what_it_is_how_it_was_made_and_whom_to_ask(dataset: Storage, tmp_path: Path) -> None:
    run(dataset, tmp_path / "birds", contact="me@example.org", layers=["all"])
    text = (tmp_path / "birds/README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["license"] == ["cc-by-4.0", "cc0-1.0"]
    assert header["size_categories"] == ["n<1K"]
    assert header["configs"][0]["data_files"] == [{"split": "train", "path": "shards/*.tar"}]
    counts = Dataset(dataset).manifest.counts
    assert f"{counts['kept']} captioned images in {counts['shards']} WebDataset shards" in text
    step = next(step for step in Dataset(dataset).manifest.funnel if step["step"] == "score")
    assert f"| `(extra->>'$.score')::int >= 3` | {step['left']} | {step['lost']} |" in text
    assert "| `CC-BY-4.0` |" in text
    assert "Write to <me@example.org>" in text
    assert "| `captions/mine` | `short` |" in text


def test_what_is_there_is_not_sent_again_and_text_of_people_stays(dataset: Storage, tmp_path: Path) -> None:
    target = tmp_path / "birds"
    run(dataset, target, contact="me@example.org")
    card = (target / "README.md").read_text()
    (target / "README.md").write_text(
        card.replace("pretty_name: birds", "pretty_name: birds\nlanguage: en") + "Mine.\n"
    )
    again = run(dataset, target, contact="you@example.org")
    assert again["sent"] == 1
    text = (target / "README.md").read_text()
    assert text.endswith("Mine.\n")
    assert "language: en" in text
    assert "you@example.org" in text
    assert "me@example.org" not in text
    assert run(dataset, target, contact="you@example.org")["sent"] == 0


def test_an_interrupted_copy_is_no_dataset_and_resumes(
    dataset: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, fetch, left = tmp_path / "birds", folder_module.fetch, [5]

    def interrupted(*arguments: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        fetch(*arguments)

    monkeypatch.setattr(folder_module, "fetch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(dataset, target)
    assert not (target / "dataset.json").exists()
    left[0] = 1_000
    summary = run(dataset, target)
    assert summary["unchanged"] == 5
    assert verify(Storage(str(target))) == []


def test_corrections_are_published_with_the_layer_that_they_correct(dataset: Storage, tmp_path: Path) -> None:
    first = Dataset(dataset).shard_names[0]
    key, sha256 = (column[0].as_py() for column in Dataset(dataset).table(first, ["key", "sha256"]).columns)
    table = read_edits(dataset, "mine")
    for place in (Place(key, sha256, "", "short"), Place("0" * 32, sha256, "", "short")):  # the latter has left
        table = changed(table, place, "corrected by hand")
    write_edits(dataset, "mine", table)
    run(dataset, tmp_path / "birds", layers=["mine-edited"])
    copy = Storage(str(tmp_path / "birds"))
    assert verify(copy) == []
    assert list_layers(copy) == ["mine", "mine-edited"]
    assert read_edits(copy, "mine")["key"].to_pylist() == [key]


@pytest.mark.parametrize("engine", ["given", "transformers"])
def test_captions_that_people_wrote_before_a_repack_are_published(
    dataset: Storage, tmp_path: Path, engine: str
) -> None:
    for number, shard in enumerate(Dataset(dataset).shard_names):  # shards of other names now hold the images
        dataset.write(f"captions/mine/former-{number}.parquet", dataset.read(f"captions/mine/{shard}.parquet"))
        dataset.delete(f"captions/mine/{shard}.parquet")
    dataset.write_table("captions/mine/former-9.parquet", pa.table({"key": ["0" * 32], "slot": ["short"]}))
    recipe = dataset.read_json("captions/mine/recipe.json", "")
    dataset.write("captions/mine/recipe.json", json.dumps(recipe | {"engine": {"engine": engine}}).encode())
    run(dataset, tmp_path / "birds", layers=["mine"])
    copy = Storage(str(tmp_path / "birds"))
    assert verify(copy) == []
    names = [name for name in copy.names("captions/mine") if name.endswith(".parquet")]
    found = [key for name in names for key in copy.read_table(name)["key"].to_pylist()]
    shards = Dataset(copy)
    kept = [key for shard in shards.shard_names for key in shards.table(shard)["key"].to_pylist()]
    assert sorted(found) == (sorted(kept) if engine == "given" else [])  # a model's are of images that it saw
    assert "captions/mine/former-9.parquet" not in names


def test_removed_rows_leave_the_copy_and_are_in_no_ledger(dataset: Storage, tmp_path: Path) -> None:
    target = tmp_path / "birds"
    run(dataset, target, ledger=True, layers=["mine"])
    assert verify(Storage(str(target))) == []
    urls = [url for table in (target / "ledger").glob("*.parquet") for url in pq.read_table(table)["url"].to_pylist()]
    assert any(PRIVATE.decode() in url for url in urls)
    first = Dataset(dataset).shard_names[0]
    key = Dataset(dataset).table(first)["key"][0].as_py()
    layer = pq.read_table(target / f"captions/mine/{first}.parquet")
    assert key in layer["key"].to_pylist()
    assert "0" * 32 not in layer["key"].to_pylist()

    (tmp_path / "keys.txt").write_text(key)
    remove(dataset.url, Blocklist(keys=str(tmp_path / "keys.txt")), progress=False)
    run(dataset, target, ledger=True, layers=["mine"])
    copy = Storage(str(target))
    assert verify(copy) == []
    assert not [name for name, data in content(target).items() if key.encode() in data]
    tables = [copy.read_table(name) for name in copy.names() if name.endswith(".parquet")]
    assert not [table for table in tables if key in table["key"].to_pylist()]
    removed = Dataset(dataset).ledger(["reason"])["reason"].to_pylist().count("removed")
    assert removed > 1  # the rows that hold the same file, too
    assert Dataset(copy).manifest.counts["rejected"] == Dataset(dataset).manifest.counts["rejected"] - removed


def test_readers_never_meet_a_manifest_that_lies(
    dataset: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "birds"
    run(dataset, target)
    key = Dataset(dataset).table(Dataset(dataset).shard_names[0])["key"][0].as_py()
    (tmp_path / "keys.txt").write_text(key)
    remove(dataset.url, Blocklist(keys=str(tmp_path / "keys.txt")), progress=False)
    monkeypatch.setattr(folder_module, "fetch", lambda *_: pytest.fail("interrupted"))
    with pytest.raises(pytest.fail.Exception):
        run(dataset, target)
    manifest = read_manifest(Storage(str(target)))
    assert manifest is not None
    assert not manifest.complete
    assert 0 < len(manifest.shards) < len(Dataset(dataset).manifest.shards)
    assert [line for line in verify(Storage(str(target))) if "incomplete" not in line] == []


def test_a_dry_run_writes_nothing(dataset: Storage, tmp_path: Path) -> None:
    summary = run(dataset, tmp_path / "birds", dry_run=True)
    assert {file["file"] for file in summary["would_send"]} >= {"dataset.json", "README.md", "croissant.json"}
    assert not (tmp_path / "birds").exists()


def test_a_damaged_file_is_named_and_not_published(dataset: Storage, tmp_path: Path) -> None:
    tar = Path(dataset.url) / Dataset(dataset).manifest.shards[1].tar
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    with pytest.raises(DamagedFile, match=r"shard-000001\.tar"):
        run(dataset, tmp_path / "birds")
    assert not (tmp_path / "birds/dataset.json").exists()


def test_a_bucket(dataset: Storage, bucket: dict[str, Any]) -> None:
    target = Storage(bucket["dataset"], bucket["storage"], field="DEST")
    assert publish(dataset, Folder(target), target.url, progress=False)["sent"] > 0
    assert verify(target) == []
    assert publish(dataset, Folder(target), target.url, progress=False)["sent"] == 0


def test_text_of_recipes_and_sources_is_no_markup(dataset: Storage) -> None:
    manifest = Dataset(dataset).manifest
    odd = "caption LIKE '%`</code><img src=x onerror=alert(1)>|%'"
    recipe = {**manifest.recipe, "select": [{"name": "odd", "where": odd}]}
    step = {"step": "odd", "left": 1, "lost": 1}
    wishes = Wishes("<b>birds</b>", contact="<script>alert(1)</script>\n# me")
    text = card(manifest.model_copy(update={"recipe": recipe, "funnel": [step]}), wishes, {})
    body = text.split("---\n", 2)[2]
    assert not re.search(r"(?<!\\)<(?:script|b)>", body)
    (line,) = [line for line in body.splitlines() if "onerror" in line]
    assert line == "| odd | `caption LIKE '%'</code><img src=x onerror=alert(1)>\\|%'` | 1 | 1 |"
    assert yaml.safe_load(text.split("---\n")[1])["pretty_name"] == wishes.name


@pytest.mark.parametrize("what", ["itself", "another dataset", "other files", "incomplete", "removal", "layer"])
def test_what_cannot_be_published_is_refused(dataset: Storage, tmp_path: Path, what: str) -> None:
    target, options = tmp_path / "birds", {}
    if what == "itself":
        target = Path(dataset.url)
    elif what == "another dataset":
        write_manifest(Storage(str(target)), Dataset(dataset).manifest)
    elif what == "other files":
        target.mkdir()
        (target / "thesis.tex").write_text("…")
    elif what == "incomplete":
        write_manifest(dataset, Dataset(dataset).manifest.model_copy(update={"complete": False}))
    elif what == "removal":
        dataset.write("removed/pending.parquet", b"")
    else:
        options = {"layers": ["theirs"]}
    with pytest.raises(RecipeError, match=what if what not in ("itself", "layer") else "itself|caption layer"):
        run(dataset, target, **options)
    with pytest.raises(CapstanError):
        run(Storage(str(tmp_path / "nothing")), target)
