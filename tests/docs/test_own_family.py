"""The family of docs/own-family.md, in a folder of a user: it does what the page says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from repo import ROOT

PAGE = (ROOT / "docs" / "own-family.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found.group(1)


@pytest.mark.integration
def test_the_family_of_the_page_does_all_that_the_page_says(tmp_path: Path) -> None:
    code = block("python")
    assert len([line for line in code.splitlines() if line.strip()]) < 75  # small enough to be read at once
    (tmp_path / "painter.py").write_text(code)
    (tmp_path / "recipe.yaml").write_text(block("yaml"))
    commands = [line for line in block("sh").splitlines() if line.startswith("capstan ")]
    assert len(commands) == 5
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([".", str(ROOT)]), "OMP_NUM_THREADS": "1"}
    for command in commands:
        line = command.replace("capstan ", f"{sys.executable} -m capstan ", 1)
        subprocess.run(line, shell=True, check=True, cwd=tmp_path, env=environment, timeout=500)
    run = tmp_path / "out" / "painter"
    assert json.loads((run / "product" / "capstan.json").read_text()) == {"family": "painter:PainterFamily"}
    assert (tmp_path / "painter" / "painter.safetensors").is_file()
    assert (run / "samples" / "step-000200.png").is_file()
    measures = json.loads((run / "evaluation.json").read_text())["measures"]
    assert measures["background"]["value"] > measures["background"]["chance"] + 0.3  # it knows what “white” means
