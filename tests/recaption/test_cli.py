"""`captions export` and `captions diff`: one JSON object on stdout, exit code 2 for what users can fix."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from in_process import run_here

from capstan.cluster.cli import run
from capstan.pipeline.records import make_key
from capstan.pipeline.storage import Storage
from capstan.recaption import export, store


@pytest.fixture
def dataset(build: Callable[..., Storage], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(export, "run", run_here)
    storage = build([[0, 1, 2], [3]])
    store.write_given_layer(
        storage, "mine", {make_key(str(n)): {"descriptive": f"a dog, number {n}"} for n in range(4)}
    )
    return storage.url


def test_export(dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(tmp_path / "copy")
    assert run(["captions", "export", dataset, "latest", target, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["layer"], summary["slot"], summary["samples"], summary["from_layer"]) == (
        "mine",
        "descriptive",
        4,
        4,
    )
    assert run(["captions", "export", dataset, "mine", dataset]) == 2
    assert "DEST: is the dataset itself" in capsys.readouterr().err
    assert run(["captions", "export", dataset, "yours", target]) == 2
    assert "no caption layer 'yours'" in capsys.readouterr().err


def test_diff(dataset: str, clip_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["captions", "diff", dataset, "original", "mine", "--model", str(clip_folder), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["pictures"] == 4
    assert (summary["a"]["words"]["mean"], summary["b"]["words"]["mean"]) == (2.0, 4.0)
    assert Path(summary["html"]).is_file()
    assert run(["captions", "diff", dataset, "original", "mine", "--model", str(clip_folder)]) == 0
    assert "a_wins_by_mean" in capsys.readouterr().out
    assert run(["captions", "diff", dataset, "original", "mine", "--model", "ViT-B-99"]) == 2
    assert "--model" in capsys.readouterr().err
