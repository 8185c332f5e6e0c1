"""An export's folder is whole before and after, whatever happens to the process that writes it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from capstan.pipeline.storage.local import owner
from capstan.training.export import _publish


def fill(folder: Path) -> None:
    folder.mkdir()
    (folder / "weights").write_text("new")


def test_an_export_that_fails_leaves_the_earlier_one(tmp_path: Path) -> None:
    target = tmp_path / "pipeline"
    _publish(target, fill)

    def broken(folder: Path) -> None:
        fill(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        _publish(target, broken)
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]
    assert (target / "weights").read_text() == "new"


def test_folders_of_killed_exports_are_removed_and_others_are_left(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-S", "-c", ""])
    ended.wait()
    for name in ("pipeline", "other"):
        (tmp_path / f".partial-{owner()}-{ended.pid}-0-{name}").mkdir()
    _publish(tmp_path / "pipeline", fill)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"pipeline", f".partial-{owner()}-{ended.pid}-0-other"}
