"""Checkpoints of one process: complete or absent, verified, the newest kept. Several processes: see test_engine."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_disk import Disk

from capstan.pipeline.errors import CapstanError, DiskFull
from capstan.training.config import TrainConfig
from capstan.training.distributed.checkpoint import Checkpoints, complete, merged
from capstan.training.distributed.ema import Ema
from capstan.training.distributed.engine import Engine
from capstan.training.distributed.integrity import MARK, problem_of


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """An engine with a small model, whose run folder is `tmp_path`."""
    section = {"model": "x:X", "run": str(tmp_path), "steps": 9, "batch": 4, "engine": {"strategy": "ddp"}}
    engine = Engine(TrainConfig.model_validate({**section, "checkpoint": {"keep": 2}}))
    torch.manual_seed(0)
    engine.prepare(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)))
    yield engine
    engine.close()


def step(engine: Engine, number: int) -> None:
    engine.set_lr(0.1)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(number))
    engine.backward(engine.model(x).square().mean(), last=True)


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    module = engine.model
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def save_steps(engine: Engine, *numbers: int, **options: Any) -> list[dict[str, torch.Tensor]]:
    """Train and save a checkpoint after each step of `numbers`; return the weights of each."""
    states, ema = [], Ema(engine, 0.9)
    checkpoints = Checkpoints(engine.train, engine, ema, **options)
    for number in numbers:
        step(engine, number)
        checkpoints.save(number, {"n": number}, {"name": f"at {number}"})
        states.append(weights(engine))
    return states


def test_the_newest_comes_back_whole_and_the_older_ones_go(engine: Engine, tmp_path: Path) -> None:
    *_, last = save_steps(engine, 1, 2, 3)
    assert [path.name for path in complete(tmp_path / "checkpoints")] == ["step-000002", "step-000003"]
    step(engine, 4)
    number, worker, shared = Checkpoints(engine.train, engine, Ema(engine, 0.9)).load()
    assert (number, worker, shared["name"]) == (3, {"n": 3}, "at 3")
    assert all(torch.equal(tensor, last[name]) for name, tensor in weights(engine).items())


def test_an_unfinished_one_does_not_count(engine: Engine, tmp_path: Path) -> None:
    save_steps(engine, 1, 2)
    (tmp_path / "checkpoints" / "step-000002" / MARK).unlink()
    assert Checkpoints(engine.train, engine, Ema(engine, 0.9)).load()[0] == 1


def test_one_that_is_being_uploaded_stays(engine: Engine, tmp_path: Path) -> None:
    save_steps(engine, 1, 2, 3, in_use=lambda path: path.name == "step-000001")
    assert len(complete(tmp_path / "checkpoints")) == 3


def test_the_mark_holds_plain_facts(engine: Engine, tmp_path: Path) -> None:
    save_steps(engine, 2)
    mark = json.loads((tmp_path / "checkpoints" / "step-000002" / MARK).read_text())
    assert (mark["step"], mark["samples"]) == (2, 8)
    assert mark["engine"] == {"strategy": "ddp", "zero": 0, "workers": 1}


def test_without_any_a_run_starts_at_zero(engine: Engine) -> None:
    assert Checkpoints(engine.train, engine, Ema(engine, 0.9)).load() == (0, {}, {})


def test_states_of_workers_are_merged() -> None:
    states = [{"a": torch.ones(2), "b": [1]}, {"a": torch.ones(2), "c": 5}]
    total = merged(states)
    assert total["a"].tolist() == [2.0, 2.0]
    assert (total["b"], total["c"]) == ([1], 5)


# Damage --------------------------------------------------------------------------------------------------------------


def zeros(folder: Path) -> None:
    """As a disk leaves a file whose pages it lost: of full length, with zeros in it."""
    with (folder / "worker-00000.pt").open("r+b") as file:
        file.seek(600)
        file.write(bytes(700))


def flip(folder: Path) -> None:
    path = folder / "worker-00000.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(folder: Path) -> None:
    path = folder / "worker-00000.pt"
    path.write_bytes(path.read_bytes()[:-100])


def remove(folder: Path) -> None:
    (folder / "worker-00000.pt").unlink()


def change_mark(folder: Path) -> None:
    (folder / MARK).write_text((folder / MARK).read_text().replace('"samples": 8', '"samples": 9'))


def cut_mark(folder: Path) -> None:
    (folder / MARK).write_text((folder / MARK).read_text()[:-20])


def lead_out(folder: Path) -> None:
    """A mark whose checksum is right, and which names a file elsewhere."""
    from capstan.training.distributed.integrity import read_mark, seal

    mark = read_mark(folder)
    mark["files"]["../../secret"] = {"bytes": 1, "sha256": ""}
    (folder / MARK).write_bytes(seal(mark))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (zeros, "worker-00000.pt: its checksum differs"),
        (flip, "worker-00000.pt: its checksum differs"),
        (cut, "worker-00000.pt: .* bytes instead of"),
        (remove, "worker-00000.pt: is missing"),
        (change_mark, "checkpoint.json: its checksum differs"),
        (cut_mark, "checkpoint.json: "),
        (lead_out, "checkpoint.json: '../../secret' is not a file name"),
    ],
)
def test_a_damaged_one_is_named_and_the_one_before_is_taken(
    engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], words: str
) -> None:
    caplog.set_level(logging.INFO)
    first, _ = save_steps(engine, 1, 2)
    newest = tmp_path / "checkpoints" / "step-000002"
    assert problem_of(newest) is None
    damage(newest)
    number, worker, _ = Checkpoints(engine.train, engine, Ema(engine, 0.9)).load()
    assert (number, worker) == (1, {"n": 1})
    assert all(torch.equal(tensor, first[name]) for name, tensor in weights(engine).items())
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert str(newest) in warning
    assert re.search(words, warning)
    assert (tmp_path / "checkpoints" / "damaged-step-000002").is_dir()  # and never counts again
    assert [path.name for path in complete(tmp_path / "checkpoints")] == ["step-000001"]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again_unasked(engine: Engine, tmp_path: Path) -> None:
    save_steps(engine, 1)
    flip(tmp_path / "checkpoints" / "step-000001")
    for _ in range(2):  # nor at the next start
        with pytest.raises(CapstanError, match=r"every checkpoint in .* is damaged"):
            Checkpoints(engine.train, engine, Ema(engine, 0.9)).load()


def test_one_that_was_not_finished_is_named(engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_steps(engine, 1, 2)
    (tmp_path / "checkpoints" / "step-000002" / MARK).unlink()
    assert Checkpoints(engine.train, engine, Ema(engine, 0.9)).load()[0] == 1
    assert "step-000002 has no checkpoint.json; using step-000001" in caplog.text


def test_one_of_an_earlier_version_has_no_checksums(engine: Engine, tmp_path: Path) -> None:
    save_steps(engine, 1)
    mark = tmp_path / "checkpoints" / "step-000001" / MARK
    old = {name: value for name, value in json.loads(mark.read_text()).items() if name not in ("files", "sum")}
    mark.write_text(json.dumps(old))
    assert Checkpoints(engine.train, engine, Ema(engine, 0.9)).load()[0] == 1


@pytest.mark.integration
def test_a_full_disk_is_named_and_the_last_checkpoint_stays(engine: Engine, tmp_path: Path) -> None:
    disk = Disk(tmp_path / "checkpoints", "size=48k")
    try:
        save_steps(engine, 1)
        (disk.folder / "filling").write_bytes(bytes(disk.folder.stat().st_blksize * 8))
        with pytest.raises(DiskFull, match=rf"cannot write to {disk.folder}/step-000002 .*No space left"):
            save_steps(engine, 2)
        assert Checkpoints(engine.train, engine, Ema(engine, 0.9)).load()[0] == 1
    finally:
        disk.close()
