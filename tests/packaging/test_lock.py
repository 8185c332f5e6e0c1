"""requirements.lock: the pins of constraints.txt, each with the hashes of its files, and no address."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from repo import ROOT

LOCK = (ROOT / "requirements.lock").read_text()
ENTRY = re.compile(
    r'^([a-z0-9-]+)==(\S+)((?: ; | or )python_version == "3\.\d+")*((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$', re.M
)


def lock_module() -> Any:
    spec = importlib.util.spec_from_file_location("lock", ROOT / ".ci" / "lock.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pins(text: str) -> dict[str, str]:
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return {
        lock_module().normal(name): version for name, _, version in (line.partition("==") for line in lines if line)
    }


def test_it_has_the_versions_of_the_constraints_and_a_hash_for_each() -> None:
    body = LOCK[LOCK.index("\n\n") if "\n\n" in LOCK else 0 :]
    entries = {name: version for name, version, *_ in ENTRY.findall(LOCK)}
    lines = [line for line in body.splitlines() if "==" in line.split(" ; ")[0] and not line.startswith("#")]
    assert len(entries) == len(lines) > 100
    constraints = pins((ROOT / "constraints.txt").read_text())
    assert {name: constraints.get(name) for name in entries} == entries


def test_it_covers_what_pyproject_needs_on_each_tested_python() -> None:
    assert "Python 3.11, 3.12, 3.13." in LOCK
    for name in ("torch", "ray", "deepspeed", "duckdb", "pytest"):
        assert re.search(rf"^{name}==\S+ \\$", LOCK, re.M), f"{name} is not locked for every Python"


def test_it_holds_no_address() -> None:
    assert "://" not in LOCK
    assert "--index" not in LOCK


def entry(name: str, version: str, digest: str | None) -> dict[str, Any]:
    info = {"archive_info": {"hashes": {"sha256": digest}}} if digest else {"dir_info": {}}
    return {"metadata": {"name": name, "version": version}, "download_info": {"url": "https://registry/x", **info}}


def test_how_it_is_written() -> None:
    make = lock_module().lock
    both, one = entry("A.b", "1.0", "aa"), entry("c", "2", "cc")
    text = make({"3.11": [both, one], "3.12": [entry("a-b", "1.0", "bb")]})
    assert "a-b==1.0 \\\n    --hash=sha256:aa \\\n    --hash=sha256:bb\n" in text
    assert 'c==2 ; python_version == "3.11" \\\n    --hash=sha256:cc\n' in text
    assert "registry" not in text
    with pytest.raises(ValueError, match="has versions 2 and 3"):
        make({"3.11": [one], "3.12": [entry("c", "3", "cd")]})
    with pytest.raises(ValueError, match="has no hash"):
        make({"3.11": [entry("c", "2", None)]})


def test_pip_accepts_its_form(tmp_path: Path) -> None:
    """pip reads the file and refuses a package whose hash differs, without a network."""
    name, version, *_ = next(iter(ENTRY.findall(LOCK)))
    wheel = tmp_path / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    wheel.write_bytes(b"PK\5\6" + bytes(18))
    (tmp_path / "one.lock").write_text(re.search(ENTRY, LOCK)[0] + "\n")  # type: ignore[index]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--no-index", "--ignore-installed"]
    command += ["--require-hashes", "--find-links", str(tmp_path), "-r", str(tmp_path / "one.lock")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr
