"""The wheel and the sdist: what is in them, and that both are the same package."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from repo import ROOT

pytestmark = pytest.mark.integration
SOURCES = ("capstan", "pipeline", "recaption", "training", "cluster", "pyproject.toml", "README.md", "LICENSE")


def built(project: Path, kind: str, out: Path) -> Path:
    """Build a wheel or an sdist of `project` as pip does, but with this environment's setuptools."""
    out.mkdir(exist_ok=True)
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True, check=True)
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged, since setuptools writes next to its sources."""
    folder = tmp_path_factory.mktemp("project")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    return folder


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_one_name_and_the_sdist_builds_the_same(project: Path, tmp_path: Path) -> None:
    files = contents(built(project, "wheel", tmp_path / "wheel"))
    assert {name.partition("/")[0] for name in files} == {"capstan", "capstan_t2i-0.1.0.dist-info"}
    assert {"capstan/py.typed", "capstan/recaption/lint/lint_rules.yaml", "capstan/__main__.py"} <= files.keys()
    assert "capstan/pipeline/score/weights/lid.176.ftz" in files
    sources = {f"capstan/{p.relative_to(ROOT)}" for f in SOURCES[1:5] for p in (ROOT / f).rglob("*.py")}
    assert sources == {name for name in files if name.endswith(".py") and name.count("/") > 1}
    assert b"capstan = capstan.cluster.cli:main" in files["capstan_t2i-0.1.0.dist-info/entry_points.txt"]
    with tarfile.open(built(project, "sdist", tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    again = contents(built(unpacked, "wheel", tmp_path / "again"))
    record = "capstan_t2i-0.1.0.dist-info/RECORD"
    assert {**again, record: b""} == {**files, record: b""}
