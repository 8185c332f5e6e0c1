"""The family of docs/own-family.md, in a folder of a user: it does what the page says."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from repo import ROOT

from capstan.cluster import cli

PAGE = (ROOT / "docs" / "own-family.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found.group(1)


@pytest.mark.integration
def test_the_family_of_the_page_does_all_that_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = block("python")
    assert len([line for line in code.splitlines() if line.strip()]) < 75  # small enough to be read at once
    (tmp_path / "painter.py").write_text(code)
    (tmp_path / "recipe.yaml").write_text(block("yaml"))
    commands = [shlex.split(line)[1:] for line in block("sh").splitlines() if line.startswith("capstan ")]
    assert [command[0] for command in commands] == ["build", "train", "sample", "evaluate", "export"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # the page's PYTHONPATH
    for command in commands:
        assert cli.run(command) == 0, command
    sys.modules.pop("painter")
    run = tmp_path / "out" / "painter"
    assert json.loads((run / "product" / "capstan.json").read_text()) == {"family": "painter:PainterFamily"}
    assert (tmp_path / "painter" / "painter.safetensors").is_file()
    assert (run / "samples" / "step-000200.png").is_file()
    measures = json.loads((run / "evaluation.json").read_text())["measures"]
    assert measures["background"]["value"] > measures["background"]["chance"] + 0.3  # it knows what “white” means
