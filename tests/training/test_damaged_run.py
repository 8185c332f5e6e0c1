"""A damaged file of a run is made again, left out with a warning, or named with what to do: never a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from repo import HELPERS
from tiny_runs import make_recipe, records, weights

from capstan.pipeline.config import Recipe
from capstan.pipeline.errors import DamagedFile
from capstan.training.run import last_record
from capstan.training.trainer import fit

DAMAGE = [b"", b'{"steps": 1', b"\x00" * 40, b"\xff\xfe{", b"[1]"]


@pytest.fixture(autouse=True, scope="module")
def _importable() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HELPERS))
        yield


@pytest.fixture
def recipe(squares: Path, tmp_path: Path) -> Callable[..., Recipe]:
    watch = {"trackers": ["tensorboard"]}
    return lambda **section: make_recipe(squares, tmp_path / "run", **{"steps": 4, "watch": watch, **section})


def test_a_damaged_mark_of_the_end_is_made_again(recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"
    fit(recipe())
    before = weights(run)
    for damage in DAMAGE:
        (run / "finished.json").write_bytes(damage)
        assert fit(recipe())["steps"] == 4
        assert json.loads((run / "finished.json").read_bytes())["steps"] == 4
    assert f"{run / 'finished.json'} is damaged" in caplog.text
    assert all((before[name] == value).all() for name, value in weights(run).items())


@pytest.mark.parametrize("name", ["recipe.json", "pinned.json"])
def test_what_cannot_be_made_again_is_named(recipe, tmp_path: Path, name: str) -> None:
    fit(recipe(steps=2))
    for damage in DAMAGE:
        (tmp_path / "run" / name).write_bytes(damage)
        with pytest.raises(DamagedFile, match=rf"{name} is damaged \(not .*\)\. Fix: restore it from a copy"):
            fit(recipe())


def test_damaged_lines_of_the_log_and_of_records_that_wait_are_left_out(
    recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    fit(recipe(steps=2))
    lines = (run / "log.jsonl").read_bytes().splitlines(keepends=True)
    (run / "log.jsonl").write_bytes(lines[0] + b"\x00\x00\x00\n" + lines[1] + b'[2]\n"step"\n{"step": 2, "cut')
    assert (last_record(run / "log.jsonl") or {})["step"] == 2
    waiting = [b"\xff\n", b'{"step": 1}\n', b'{"step": 1, "time": 0, "scalars": 3}\n', b'{"step": 1, "ti']
    (run / "tensorboard-pending.jsonl").write_bytes(b"".join(waiting))
    assert fit(recipe())["steps"] == 4
    assert [record["step"] for record in records(run)] == [1, 2, 3, 4]
    assert f"{run / 'log.jsonl'}: 3 damaged lines are left out" in caplog.text
    assert "tensorboard-pending.jsonl: 1 damaged lines" in caplog.text
    assert not (run / "tensorboard-pending.jsonl").exists()


def test_a_file_that_no_checkpoint_lists_is_not_loaded(recipe, tmp_path: Path) -> None:
    fit(recipe(steps=2, checkpoint={"every": 2}))
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    (checkpoint / "worker-00001.pt").write_bytes(b"a stranger's")
    assert fit(recipe(checkpoint={"every": 2}))["steps"] == 4
