"""`capstan cut` in a process of its own, killed while it works: the next one ends with the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from capstan.pipeline.clips.cut import cut
from capstan.pipeline.config import Recipe
from capstan.pipeline.storage import Storage

pytestmark = pytest.mark.integration

SCRIPT = """
import sys
from capstan.pipeline.clips.cut import cut
from capstan.pipeline.config import Recipe
cut(Recipe.model_validate_json(sys.argv[1]), progress=False)
"""
MOVING = {"frames": 8, "fps": 4, "entries": True, "sound": 4000}
WORLD = {"scenes": 24, "size": 32, "captions": "descriptive", "defects": False, "max_objects": 2, "moving": MOVING}
CUT = {"by": "none", "seconds": [0.5, 4], "fps": 4, "size": 32, "min_size": 16, "sound": "keep", "videos": 2}


def recipe(folder: Path) -> dict[str, Any]:
    """Clips with sound of the captioned world, in twelve units."""
    source = {"format": "world", "world": WORLD}
    return {"dataset": str(folder), "source": source, "cut": CUT, "resources": {"cpus": 1}}


def published(folder: Path) -> dict[str, bytes]:
    storage = Storage(str(folder))
    return {name: storage.read(name) for name in storage.names() if not name.startswith("state/")}


def test_a_killed_cut_ends_with_the_bytes_of_one_that_was_not(tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    cut(Recipe.model_validate(recipe(whole)), progress=False)
    command = [sys.executable, "-c", SCRIPT, json.dumps(recipe(torn))]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    deadline = time.monotonic() + 300
    while len(list(torn.glob("state/cut-*/done/*.json"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (torn / "clips.json").exists()
    done = len(list(torn.glob("state/cut-*/done/*.json")))
    assert done < 12

    summary = cut(Recipe.model_validate(recipe(torn)), progress=False)
    assert (summary["counts"]["clips"], summary["quarantined"]) == (24, {})
    assert published(torn) == published(whole)
