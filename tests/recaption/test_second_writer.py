"""Captions are imported, written and exported by one writer at a time; a second is refused and changes nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from in_process import run_here
from small_dataset import write_dataset

from capstan.pipeline import lease, units
from capstan.pipeline.build import remove
from capstan.pipeline.config import Blocklist, Recipe, Resources
from capstan.pipeline.errors import CapstanError
from capstan.pipeline.records import make_key
from capstan.pipeline.storage import Storage
from capstan.recaption import export as exporting
from capstan.recaption import import_captions
from capstan.recaption import job as recaptioning
from capstan.recaption.store import write_given_layer

WHOLE = lease.NAME


def part(name: str) -> str:
    return f"state/leases/{name.replace('/', '%2F')}.json"


def hold(storage: Storage, name: str) -> None:
    """Leave the lease of a writer on another machine, seen just now."""
    other = {"id": "0", "command": "remove", "host": "elsewhere", "pid": 7, "owner": "?", "seen": time.time()}
    storage.write(name, json.dumps(other).encode())


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setattr(units, "run", run_here)
    monkeypatch.setattr(exporting, "run", run_here)
    storage = Storage(str(tmp_path / "ds"))
    write_dataset(storage, [[1, 2], [3]])
    write_given_layer(storage, "mine", {make_key("1"): {"descriptive": "words that say what is there"}})
    line = {"key": make_key("2"), "descriptive": "other words"}
    (tmp_path / "captions.jsonl").write_text(json.dumps(line))
    return storage


def refused(storage: Storage, action: Callable[[], object]) -> None:
    before = {name: storage.read(name) for name in storage.names()}
    with pytest.raises(CapstanError, match=r"is being written by another process .*process 7 on elsewhere"):
        action()
    assert {name: storage.read(name) for name in storage.names()} == before


@pytest.mark.parametrize("held", [WHOLE, part("captions/mine")])
def test_an_import_is_refused_while_the_dataset_or_the_layer_is_written(storage: Storage, held: str) -> None:
    hold(storage, held)
    file = Path(storage.url).parent / "captions.jsonl"
    refused(storage, lambda: import_captions.write(storage, "mine", file))


def test_another_layer_may_be_imported_next_to_it(storage: Storage) -> None:
    hold(storage, part("captions/mine"))
    import_captions.write(storage, "other", Path(storage.url).parent / "captions.jsonl")
    assert storage.exists("captions/other/recipe.json")


def test_an_export_is_refused_while_its_copy_is_written(storage: Storage, tmp_path: Path) -> None:
    target = Storage(str(tmp_path / "out"))
    target.write("state/export/begun.json", b"{}")
    hold(target, WHOLE)
    refused(target, lambda: exporting.export(storage, "mine", target, slot="descriptive", resources=Resources(cpus=1)))


@pytest.mark.parametrize("own", [False, True], ids=["the dataset", "the layer"])
def test_recaptioning_is_refused_while_the_dataset_or_the_layer_is_written(
    storage: Storage, captioner: Path, own: bool
) -> None:
    section = {"engine": "coca", "model": str(captioner)}
    recipe = Recipe.model_validate({"dataset": storage.url, "recaption": section, "resources": {"cpus": 1}})
    layer = recaptioning.plan(recipe)["layer"]
    hold(storage, part(f"captions/{layer}") if own else WHOLE)
    refused(storage, lambda: recaptioning.recaption(recipe, progress=False))


@pytest.mark.parametrize("held", [part("captions/mine"), part("latents/x")])
def test_a_takedown_is_refused_while_captions_or_latents_are_written(storage: Storage, held: str) -> None:
    """It could not see what the other has yet to publish."""
    hold(storage, held)
    refused(storage, lambda: remove(storage.url, Blocklist(), {}))
