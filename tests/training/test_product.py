"""A folder → the family that opens it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tiny_family import TinyFamily

from capstan.pipeline.errors import RecipeError
from capstan.training.export import export
from capstan.training.models.vqgan.family import VqganFamily
from capstan.training.product import FACTS, family_of, name_family


def product(folder: Path, family: str) -> Path:
    folder.mkdir(parents=True)
    (folder / FACTS).write_text(json.dumps({"family": family, "size": 16}))
    return folder


def test_a_family_is_found_by_its_name_or_its_class(tmp_path: Path) -> None:
    assert family_of(product(tmp_path / "vqgan", "vqgan")) is VqganFamily
    own = product(tmp_path / "own", "tiny")
    assert family_of(own) is None  # until the trainer has named its class
    name_family(own, "tiny_family:TinyFamily")
    assert family_of(own) is TinyFamily
    assert json.loads((own / FACTS).read_text())["size"] == 16


def test_what_is_no_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^RUN: os:getcwd, named in .*capstan\.json, is not a model family"):
        family_of(product(tmp_path / "a", "os:getcwd"))
    with pytest.raises(RecipeError, match=r"^RUN: cannot load no_such_module:Family"):
        family_of(product(tmp_path / "b", "no_such_module:Family"))


def test_a_model_folder_does_not_bring_its_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = product(tmp_path / "run" / "product", "brought_along:Family")
    (tmp_path / "run" / "brought_along.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(str(tmp_path / "run"))
    with pytest.raises(RecipeError, match=r"names code that lies in .*/run, and a model's folder must not choose"):
        family_of(folder)
    assert "brought_along" not in sys.modules


def test_a_family_leaves_as_its_product_unless_it_says_otherwise(tmp_path: Path) -> None:
    folder = product(tmp_path / "run" / "product", "tiny_family:TinyFamily")
    (folder / "weights.pt").write_bytes(b"weights")
    assert export(tmp_path / "run", tmp_path / "out")["pipeline"] == "tiny"
    assert (tmp_path / "out" / "weights.pt").read_bytes() == b"weights"
    with pytest.raises(RecipeError, match=r"^--precision: this model has no such setting"):
        export(tmp_path / "run", tmp_path / "half", precision="fp16")
    assert not (tmp_path / "half").exists()
