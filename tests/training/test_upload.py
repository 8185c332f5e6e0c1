"""A run's copy in a bucket: whole or not there, enough for a machine that has nothing, and never in the way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from repo import HELPERS
from s3 import S3

from capstan.pipeline.config import Recipe
from capstan.pipeline.errors import CapstanError, RecipeError, StorageError
from capstan.pipeline.storage import Storage
from capstan.training.product import find_product
from capstan.training.trainer import fit
from capstan.training.upload import Upload


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(HELPERS))
    monkeypatch.setenv("CAPSTAN_RUNS", str(tmp_path / "runs"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with S3(tmp_path_factory.mktemp("s3"), "capstan-key", "capstan-secret") as server:
        yield server


@pytest.fixture
def s3(server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
    return server


@pytest.fixture
def recipe(squares: Path, tmp_path: Path) -> Callable[..., Recipe]:
    def make(run: str, upload: str | None = None, **section: Any) -> Recipe:
        base = {"model": "tiny_family:TinyFamily", "steps": 12, "batch": 8, "log_every": 1, "lr": 0.01, "warmup": 4}
        base |= {"run": run if "://" in run else str(tmp_path / run), "ema": 0.9, "data": {"layer": None}}
        base |= {"checkpoint": {"every": 4, "upload": upload}, "engine": {"strategy": "ddp"}}
        return Recipe(dataset=str(squares), train={**base, **section})

    return make


def weights(product: Path) -> dict[str, torch.Tensor]:
    return torch.load(product / "weights.pt")


def assert_equal(product: Path, other: Path) -> None:
    ours, theirs = weights(product), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_machine_that_has_nothing_goes_on_from_the_bucket(recipe, s3: S3, tmp_path: Path) -> None:
    fit(recipe("whole"))
    fit(recipe("here", "s3://bucket/moved", steps=7))
    bucket = s3.folder / "bucket" / "moved"
    Storage("s3://bucket/moved").write("checkpoints/step-000099/worker-00000.pt", b"an upload that was killed")
    fit(recipe("there", "s3://bucket/moved"))
    assert "resuming from" in (words := (tmp_path / "there" / "train.log").read_text())
    assert f"{tmp_path / 'there' / 'checkpoints' / 'step-000007'}\n" in words
    assert_equal(tmp_path / "there" / "product", tmp_path / "whole" / "product")
    losses = [(tmp_path / run / "log.jsonl").read_text().count('"loss"') for run in ("there", "whole")]
    assert losses == [12, 12]
    sent, here = files(bucket), files(tmp_path / "there")
    assert {"recipe.json", "pinned.json", "log.jsonl", "train.log", "finished.json"} <= sent.keys()
    sent.pop("train.log")  # which goes on, to tell of the upload
    assert {name: here[name] for name in sent if "step-" not in name} == {
        name: content for name, content in sent.items() if "step-" not in name
    }
    kept = {name.split("/")[1] for name in sent if name.startswith("checkpoints/")}
    assert len(kept) == 2
    assert max(kept) == "step-000012"


def keep_best(run: Path, step: int, value: float) -> None:
    """As training.watch.inloop does after an evaluation."""
    for old in (run / "best").glob("*"):
        shutil.rmtree(old)
    best = run / "best" / f"step-{step:06d}"
    shutil.copytree(run / "checkpoints" / best.name, best / "checkpoint")
    (best / "product" / "unet").mkdir(parents=True)
    (best / "product" / "unet" / "weights").write_bytes(b"%f" % value)
    told = {"step": step, "measure": "fid", "value": value, "folder": f"best/{best.name}"}
    (run / "best.json").write_text(json.dumps(told))
    with (run / "evaluations.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "measures": {"fid": value}}) + "\n")
    (run / "samples").mkdir(exist_ok=True)
    (run / "samples" / f"step-{step:06d}.png").write_bytes(b"drawn")


WATCHED = ("best", "samples", "evaluations.jsonl")


def watched(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in files(folder).items() if name.startswith(WATCHED)}


def test_what_was_drawn_and_measured_goes_along_and_so_does_the_best(
    recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, here, section = tmp_path / "copy", tmp_path / "here", {"schedule": "constant"}
    for step, value in ((4, 3.0), (8, 2.0)):
        fit(recipe("here", str(copy), steps=step, **section))
        keep_best(here, step, value)
    fit(recipe("here", str(copy), steps=9, **section))
    assert watched(copy) == watched(here)  # the worse one is gone
    put = Storage.put

    def overtaken(self: Storage, source: Path, name: str) -> None:
        if name.startswith("best/step-000009/"):
            keep_best(here, 10, 0.5)
        put(self, source, name)

    keep_best(here, 9, 1.0)
    monkeypatch.setattr(Storage, "put", overtaken)
    fit(recipe("here", str(copy), steps=10, **section))
    assert watched(copy) == watched(here)
    assert json.loads((copy / "best.json").read_text())["value"] == 0.5
    fit(recipe("there", str(copy), **section))
    assert watched(tmp_path / "there") == watched(here)


def test_a_best_state_is_whole_in_the_bucket_or_not_named(
    recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, here, put = tmp_path / "copy", tmp_path / "here", Storage.put
    fit(recipe("here", str(copy), steps=4))
    keep_best(here, 4, 1.0)

    def fail(self: Storage, source: Path, name: str) -> None:
        if name.endswith("product/unet/weights"):
            raise StorageError(f"write {name}", "503", "wait")
        put(self, source, name)

    monkeypatch.setattr(Storage, "put", fail)
    with pytest.raises(CapstanError, match="503"):
        fit(recipe("here", str(copy), steps=8))
    assert "best/step-000004/checkpoint/checkpoint.json" in files(copy)
    assert not {"best.json", "evaluations.jsonl"} & files(copy).keys()


def test_a_run_in_a_bucket(recipe, s3: S3, tmp_path: Path) -> None:
    fit(recipe("whole"))
    summary = fit(recipe("s3://bucket/run"))
    assert (summary["run"], summary["product"]) == ("s3://bucket/run", "s3://bucket/run/product")
    product = find_product("s3://bucket/run")
    assert_equal(product, tmp_path / "whole" / "product")
    with pytest.MonkeyPatch.context() as patch:  # on another machine
        patch.setenv("CAPSTAN_RUNS", str(tmp_path / "elsewhere"))
        assert_equal(find_product("s3://bucket/run"), product)
        assert fit(recipe("s3://bucket/run"))["steps"] == 12
        fit(recipe("next", init="s3://bucket/run", steps=1))
    with pytest.raises(RecipeError, match="no finished model"):
        find_product("s3://bucket/nothing")
    with pytest.raises(RecipeError, match=r"remove checkpoint\.upload"):
        fit(recipe("s3://bucket/run", "s3://bucket/other"))


def test_a_bucket_that_does_not_answer_stops_nothing_and_is_told(
    recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, copy = Storage.put, str(tmp_path / "copy")

    def fail(self: Storage, source: Path, name: str) -> None:
        raise StorageError(f"write {name}", "503", "wait")

    monkeypatch.setattr(Storage, "put", fail)
    with pytest.raises(CapstanError, match=r"product is in .* Run the same command again to upload it"):
        fit(recipe("run", copy))
    assert (tmp_path / "run" / "finished.json").exists()
    assert "could not upload step-0000" in (tmp_path / "run" / "train.log").read_text()
    assert not [name for name in files(tmp_path / "copy") if name.endswith(("checkpoint.json", "finished.json"))]
    monkeypatch.setattr(Storage, "put", put)
    before = (tmp_path / "run" / "product" / "weights.pt").stat().st_mtime_ns
    assert fit(recipe("run", copy))["steps"] == 12
    assert (tmp_path / "run" / "product" / "weights.pt").stat().st_mtime_ns == before  # sent, not trained again
    assert_equal(tmp_path / "copy" / "product", tmp_path / "run" / "product")


def test_another_recipes_bucket_is_refused(recipe, tmp_path: Path) -> None:
    fit(recipe("run", str(tmp_path / "copy"), steps=4))
    with pytest.raises(RecipeError, match=r"train\.checkpoint\.upload: .*different: lr"):
        fit(recipe("second", str(tmp_path / "copy"), lr=0.5))


def test_what_is_being_sent_is_not_removed(tmp_path: Path, recipe) -> None:
    from capstan.training.config import TrainConfig
    from capstan.training.run import Run

    upload = Upload(Run(TrainConfig.from_recipe(recipe("run"))), str(tmp_path / "copy"), {})
    upload.send(tmp_path / "step-000004")
    assert upload.is_sending(tmp_path / "step-000004")
    upload.send(tmp_path / "step-000008")  # replaces one whose upload has not started
    assert not upload.is_sending(tmp_path / "step-000004")


def test_a_damaged_checkpoint_comes_back_from_the_bucket(recipe, tmp_path: Path) -> None:
    fit(recipe("whole"))
    fit(recipe("run", str(tmp_path / "copy"), steps=8))
    damaged = tmp_path / "run" / "checkpoints" / "step-000008" / "worker-00000.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert fit(recipe("run", str(tmp_path / "copy")))["steps"] == 12
    words = (tmp_path / "run" / "train.log").read_text()
    assert f"resuming from {tmp_path / 'run' / 'checkpoints' / 'step-000008'}" in words
    assert_equal(tmp_path / "run" / "product", tmp_path / "whole" / "product")


@pytest.mark.parametrize("name", ["samples/../../outside", "checkpoints/step-000004/../../../outside"])
def test_names_that_lead_out_of_the_run_are_refused(
    recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    names = Storage.names
    monkeypatch.setattr(Storage, "names", lambda self, folder="": [*names(self, folder), name])
    with pytest.raises(RecipeError, match=r"train\.checkpoint\.upload: .*leads out of its folder"):
        fit(recipe("run", str(tmp_path / "copy")))
    assert not (tmp_path / "outside").exists()
