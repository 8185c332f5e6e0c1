"""Doctor finds what build, recaption and train would refuse, each with its fix."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from capstan.cluster.doctor.commands import command_findings
from capstan.cluster.doctor.finding import Finding
from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.shards import Manifest, write_manifest
from capstan.pipeline.storage import Storage
from capstan.recaption.store import write_given_layer

TRAIN: dict[str, Any] = {"model": "diffusion", "run": "run", "steps": 1, "batch": 8}
TRAIN["diffusion"] = {"autoencoder": "ae"}


@pytest.fixture(autouse=True)
def _no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    Path("urls.csv").write_text("url,caption\nhttp://example.org/a.jpg,a cat\n")


def findings(*, built: bool = False, **sections: Any) -> dict[str, Finding]:
    storage, manifest = Storage("ds"), None
    if built:
        manifest = Manifest()
        write_manifest(storage, manifest)
    recipe = Recipe.model_validate({"dataset": "ds", "source": {"path": "urls.csv"}, **sections})
    return {finding.name: finding for finding in command_findings(recipe, storage, manifest)}


PROBLEMS: list[tuple[str, dict[str, Any], str, str]] = [
    ("source", {"source": {"path": "none.csv"}}, "source.path: no file at none.csv", ""),
    ("source", {"source": {"path": "urls.csv", "caption": "captoin"}}, "no column 'captoin'", "did you mean caption?"),
    ("conditions", {"select": [{"name": "a", "where": "lenght(caption) > 3"}]}, "'lenght'", "did you mean length?"),
    ("conditions", {"select": [{"name": "a", "where": "widht > 3"}]}, "no column 'widht'", "did you mean width?"),
    ("conditions", {"select": [{"name": "a", "where": "clip_score > 0.2"}]}, "'clip_score'", "add score.clip"),
    ("reviews", {"select": [{"review": "mine"}]}, "no review 'mine'", "capstan view"),
    ("scorers", {"score": {"language": {"weights": "none.bin"}}}, "none.bin", ""),
    ("scoring machine", {"score": {"clip": {"precision": "fp16", "pretrained": "openai"}}}, "fp16 needs a GPU", "bf16"),
    ("caption engine", {"recaption": {"engine": "transformers", "model": "./none"}}, "./none does not exist", "folder"),
    ("captioning machine", {"recaption": {"engine": "coca", "device": "cuda"}}, "this machine has no GPU", "set auto"),
    ("training machine", {"train": {**TRAIN, "precision": "fp16"}}, "fp16 needs a GPU", "use bf16 or fp32"),
    ("training machine", {"train": TRAIN, "resources": {"gpus": 2}}, "is 2, but this machine has no GPU", "remove it"),
    ("training machine", {"train": {**TRAIN, "engine": {"workers": 8}}, "resources": {"cpus": 2}}, "is 8", "at most 2"),
    ("training data", {"built": True, "train": {**TRAIN, "data": {"layer": "nope"}}}, "layer 'nope'", "recaption"),
    ("models to start from", {"built": True, "train": {**TRAIN, "data": {"layer": None}}}, "no model at ae", "folder"),
]


@pytest.mark.parametrize(("name", "sections", "seen", "hint"), PROBLEMS, ids=[seen for _, _, seen, _ in PROBLEMS])
def test_what_a_command_would_refuse(name: str, sections: dict[str, Any], seen: str, hint: str) -> None:
    found = findings(**sections)[name]
    assert not found.ok
    assert seen in found.seen
    assert hint in found.hint


def test_a_recipe_without_problems() -> None:
    select = [{"name": "size", "where": "least(width, height) >= 200"}]
    found = findings(select=select, score={"caption": {}}, train={**TRAIN, "data": {"layer": None}})
    assert {"conditions", "source", "scoring machine", "scorers", "training machine"} == found.keys()
    assert all(finding.ok for finding in found.values()), found


def test_what_comes_later_is_no_problem_yet() -> None:
    """Before the first build there is no autoencoder, and before captioning no layer."""
    sections = {"recaption": {"engine": "coca", "model": "coca_ViT-B-32"}, "train": TRAIN}
    assert "models to start from" not in findings(**sections)
    assert "run `capstan recaption`" in findings(built=True, **sections)["training data"].seen
    write_given_layer(Storage("ds"), "mine", {})
    assert not findings(built=True, **sections)["models to start from"].ok


def test_a_caption_server_that_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        section = {"recaption": {"engine": "openai", "model": "m", "server": {"url": url}}}
        assert findings(**section)["caption server"].ok
    found = findings(**section)["caption server"]
    assert not found.ok
    assert "start the server" in found.hint
