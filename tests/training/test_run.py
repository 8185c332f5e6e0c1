"""The run folder: its recipe, lock, pins, logs and published folders."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from capstan.pipeline.errors import CapstanError, RecipeError
from capstan.pipeline.storage import Storage
from capstan.training import run as run_module
from capstan.training.config import TrainConfig
from capstan.training.run import Run, differences, download, last_record, logging_to, other_recipe


def make_run(folder: Path, **section: Any) -> Run:
    return Run(TrainConfig.model_validate({"model": "x:X", "run": str(folder), "steps": 4, **section}))


def test_a_folder_holds_one_recipe(tmp_path: Path) -> None:
    make_run(tmp_path / "run").open({"dataset": "ds"})
    make_run(tmp_path / "run", steps=9, log_every=1).open({"dataset": "ds"})  # free to change
    with pytest.raises(RecipeError, match=r"train\.run: .* another recipe \(different: data\.block, lr\)"):
        make_run(tmp_path / "run", lr=0.5, data={"block": 2}).open({"dataset": "ds"})
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["recipe"] == {"dataset": "ds"}


def test_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "_LOCK_WAIT_S", 0.001)
    run = make_run(tmp_path)
    with run.locked(), pytest.raises(CapstanError, match="another process is training"), run.locked():
        pass
    with run.locked():
        pass


def test_a_pin_keeps_its_first_value(tmp_path: Path) -> None:
    assert make_run(tmp_path).pinned("layer", lambda: "first") == "first"
    assert make_run(tmp_path).pinned("layer", lambda: "second") == "first"
    assert make_run(tmp_path).pinned("other", lambda: None) is None
    assert make_run(tmp_path).pinned("other", lambda: "late") is None


def test_a_folder_is_published_whole_or_not_at_all(tmp_path: Path) -> None:
    run, target = make_run(tmp_path), tmp_path / "product"

    def fail(folder: Path) -> None:
        (folder / "a").write_text("half")
        raise OSError("no space left")

    run.publish(target, lambda folder: (folder / "a").write_text("1"))
    with pytest.raises(OSError, match="no space"):
        run.publish(target, fail)
    assert (target / "a").read_text() == "1"
    run.publish(target, lambda folder: (folder / "b").write_text("2"))
    assert [path.name for path in target.iterdir()] == ["b"]


def test_a_run_is_finished_with_its_steps_and_its_product(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.finish({"steps": 4})
    assert run.finished() is None  # without a product
    run.product.mkdir()
    assert run.finished() == {"steps": 4}
    assert make_run(tmp_path, steps=5).finished() is None


def test_logs_are_cut_at_the_step_that_a_run_resumes_from(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.log.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "lo')
    assert last_record(run.log) == {"step": 3}
    run.truncate_logs(2)
    assert last_record(run.log) == {"step": 2}
    assert run.log.read_text().count("\n") == 2
    assert last_record(tmp_path / "none") is None


def test_messages_of_training_go_into_the_log(tmp_path: Path) -> None:
    with logging_to(tmp_path / "train.log"):
        logging.getLogger("capstan.training.data.loader").info("hello")
    logging.getLogger("capstan.training.data.loader").info("too late")
    line = (tmp_path / "train.log").read_text()
    assert line.endswith(" INFO hello\n")
    assert "late" not in line


def test_a_folder_of_a_storage_is_downloaded(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "bucket"))
    for name in ("product/a", "product/unet/b", "products/c"):
        storage.write(name, name.encode())
    download(storage, "product", storage.names(), tmp_path / "here")
    here = {path.relative_to(tmp_path / "here").as_posix() for path in (tmp_path / "here").rglob("*") if path.is_file()}
    assert here == {"a", "unet/b"}
    assert (tmp_path / "here" / "unet" / "b").read_text() == "product/unet/b"


def test_differences_are_named_by_their_path() -> None:
    assert differences({"a": 1, "b": {"c": [1]}}, {"a": 1, "b": {"c": [2]}, "d": None}) == ["b.c"]
    assert differences({"a": {"b": 1}}, {"a": 2}) == ["a"]


def test_another_recipe_is_told_by_its_model_or_by_a_few_keys() -> None:
    assert other_recipe({"model": "vqgan", "seed": 1}, {"model": "vqgan", "seed": 1}) == ""
    assert other_recipe({"model": "vqgan"}, {"model": "captioner"}) == "model vqgan, and the recipe trains captioner"
    assert other_recipe({"model": "vqgan"}, {"model": "vqgan", "seed": 2}) == "another recipe (different: seed)"
    many = {"model": "vqgan", **dict.fromkeys("abcdefg", 1)}
    assert other_recipe({"model": "vqgan"}, many).endswith("(different: a, b, c, d, e and 2 more)")


@pytest.mark.parametrize(
    "name", ["product/../../outside", "product/a/../../../x", "product//etc/x", "product/a\\..\\x"]
)
def test_an_object_whose_name_leads_out_is_not_downloaded(tmp_path: Path, name: str) -> None:
    storage = Storage(str(tmp_path / "bucket"), field="RUN")
    storage.write("product/a", b"a")
    (tmp_path / "outside").write_text("mine")
    with pytest.raises(RecipeError, match=r"RUN: .*leads out of its folder"):
        download(storage, "product", ["product/a", name], tmp_path / "here" / "product")
    assert not (tmp_path / "here").exists()
    assert (tmp_path / "outside").read_text() == "mine"


def test_a_marker_of_a_folder_is_no_file(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "bucket"))
    storage.write("product/a", b"a")
    download(storage, "product", ["product/", "product/a"], tmp_path / "here")
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["a"]
