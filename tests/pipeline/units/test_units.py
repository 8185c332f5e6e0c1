"""The unit map: each unit committed once, whatever dies on the way."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import ray

from capstan.pipeline.config import Resources
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage import Storage
from capstan.pipeline.units import Job, Piece, Unit, report, run
from capstan.pipeline.units.on_ray import RayWorkers

for library in (cloudpickle, ray.cloudpickle):
    library.register_pickle_by_value(sys.modules[__name__])  # workers cannot import test modules

PROCESSES = Resources(cpus=2, executor="processes")


@pytest.fixture(params=["processes", "ray"])
def resources(request: pytest.FixtureRequest) -> Resources:
    """Two CPUs, and each kind of workers in turn."""
    return PROCESSES if request.param == "processes" else request.getfixturevalue("ray_session")


class Squares(Job):
    """Writes the squares of `numbers` to out/<unit>.json; misbehaves as its spec says, counting tries on disk."""

    name = "squares"

    def __init__(self, storage: Storage, scratch: Path) -> None:
        self.storage, self.scratch = storage, scratch

    def tries(self, unit: str, what: str) -> int:
        """How often this was called, this call included."""
        with (self.scratch / f"{unit}-{what}").open("ab+") as file:
            file.write(b".")
            file.flush()
            return file.tell()

    def misbehave(self, unit: Unit, where: str) -> None:
        if (plan := unit.spec.get(where)) and self.tries(unit.id, where) <= plan[1]:
            match plan[0]:
                case "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "raise":
                    raise ValueError(f"{unit.id} is bad: caf\udce9")  # as in a name of a file that is not UTF-8
                case "recipe":
                    raise RecipeError("image.size", "is wrong", "correct it")

    def prepare(self, unit: Unit) -> Iterator[Piece]:
        self.tries(unit.id, "start")
        self.misbehave(unit, "at_start")
        for number in unit.spec["numbers"]:
            report({"samples": 1})
            yield {"number": number, "unit": unit, "pad": b"x" * unit.spec.get("pad", 0)}
        self.misbehave(unit, "at_end")

    def commit(self, unit: Unit, pieces: list[Piece]) -> dict[str, Any]:
        self.misbehave(unit, "at_commit")
        answer = [piece["square"] if "square" in piece else piece["number"] ** 2 for piece in pieces]
        self.storage.write(f"out/{unit.id}.json", json.dumps(answer).encode())
        return {"samples": len(pieces), "note": unit.id}


class ModelSquares(Squares):
    """The same with a model stage."""

    name = "model-squares"

    def model(self) -> Callable[[Piece], Piece]:
        def square(piece: Piece) -> Piece:
            if piece["number"] == piece["unit"].spec.get("model_hates"):
                self.misbehave(piece["unit"], "in_model")
            return {"square": piece["number"] ** 2}

        return square


class Committer(ModelSquares):
    """The same; it keeps the process that committed a unit."""

    name = "committer"

    def commit(self, unit: Unit, pieces: list[Piece]) -> dict[str, Any]:
        return {**super().commit(unit, pieces), "pid": os.getpid()}


@pytest.fixture
def make(tmp_path: Path, storage: Storage) -> Callable[[type[Squares]], Squares]:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return lambda kind: kind(storage, scratch)


def unit(name: str, count: int = 3, **spec: Any) -> Unit:
    return Unit(name, {"numbers": list(range(count)), **spec})


def output(job: Squares, name: str) -> list[int]:
    return json.loads(job.storage.read(f"out/{name}.json"))


@pytest.mark.parametrize("kind", [Squares, ModelSquares])
def test_every_unit_is_committed_once_and_in_order(resources: Resources, make, kind) -> None:
    job = make(kind)
    units = [unit("a"), unit("b", 7), unit("none", 0)]
    first = run(job, units, resources, progress=False)
    assert (first.done, first.skipped, first.quarantined, first.counts) == (3, 0, {}, {"samples": 10})
    assert output(job, "b") == [n * n for n in range(7)]
    assert output(job, "none") == []
    assert job.markers.read()["a"] == {"samples": 3, "note": "a"}

    again = run(job, [*units, unit("c")], resources, progress=False)
    assert (again.done, again.skipped, again.counts) == (1, 3, {"samples": 13})
    assert job.tries("a", "start") == 2  # this call is the second


@pytest.mark.parametrize("kind", [Squares, ModelSquares])
def test_relative_paths_are_those_of_the_driver(
    resources: Resources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Squares]
) -> None:
    """Ray's workers keep the folder in which Ray was started; a notebook may have moved on since."""
    monkeypatch.chdir(tmp_path)
    Path("tries").mkdir()
    job = kind(Storage("dataset"), Path("tries"))
    assert run(job, [unit("a"), unit("b")], resources, progress=False).done == 2
    assert output(job, "a") == [0, 1, 4]
    assert (tmp_path / "tries" / "a-start").exists()


@pytest.mark.parametrize("where", ["at_start", "at_end", "at_commit"])
def test_what_fails_by_chance_is_tried_again(resources: Resources, make, where) -> None:
    job = make(Squares)
    summary = run(job, [unit("a"), unit("b", **{where: ["raise", 2]})], resources, progress=False)
    assert summary.done == 2
    assert output(job, "b") == [0, 1, 4]


def test_what_keeps_failing_is_quarantined_and_the_others_finish(resources: Resources, make) -> None:
    job = make(Squares)
    units = [unit("good"), unit("bad", at_end=["raise", 3]), unit("also-good")]
    summary = run(job, units, resources, progress=False)
    assert summary.done == 2
    assert summary.quarantined == {"bad": "ValueError: bad is bad: caf?"}
    record = json.loads(job.storage.read("state/squares/quarantine/bad.json"))
    assert "Traceback" in record["reason"]
    assert not job.storage.exists("out/bad.json")

    assert run(job, units, resources, progress=False).done == 1  # its reasons are gone
    assert not job.storage.exists("state/squares/quarantine/bad.json")


def test_pieces_never_reach_the_driver_of_a_ray_run(ray_session: Resources, make) -> None:
    job = make(Committer)
    run(job, [unit("a"), unit("b", 20)], ray_session, progress=False)
    assert os.getpid() not in {facts["pid"] for facts in job.markers.read().values()}


def test_starts_are_forgotten_with_their_unit(ray_session: Resources, make) -> None:
    work = RayWorkers(make(Squares), ray_session, attempts=3)
    ray.get([work.tracker.start.remote("a", "a"), work.tracker.start.remote("a", "a#1")])
    work.ended("retried", ["a"])
    assert work.starts(["a"]) == {"a": 1}
    work.ended("committed", ["a"])
    assert work.starts(["a"]) == {"a": 0}


@pytest.mark.integration
def test_a_tracker_that_starts_anew_finds_the_model_workers(ray_session: Resources, make, monkeypatch) -> None:
    """It knew them by heart; units that start after it must not wait for ever."""
    monkeypatch.setattr("capstan.pipeline.units.on_ray._LOOK_EVERY_S", 0.2)
    work = RayWorkers(make(ModelSquares), ray_session, attempts=9)
    names = iter(work.stream([unit(f"u{number}", 2) for number in range(150)]))
    first = next(names)
    ray.kill(work.tracker, no_restart=False)
    ended = [*first, *(ended for batch in names for ended in batch)]
    work.close()
    assert sorted(row.unit for row in ended) == sorted(f"u{number}" for number in range(150))
    assert [row.error for row in ended if row.error] == []


def test_counts_that_are_lost_stop_nothing(ray_session: Resources, make) -> None:
    work = RayWorkers(make(Squares), ray_session, attempts=3)
    ray.kill(work.tracker)
    assert work.reported() == {}


def test_a_unit_is_done_again_when_asked_and_what_was_there_stands_until_then(resources: Resources, make) -> None:
    job = make(Squares)
    run(job, [unit("a"), unit("b"), unit("c")], resources, progress=False)
    again = run(
        job, [unit("a", 5), unit("b"), unit("c", at_end=["raise", 9])], resources, redo={"a", "c"}, progress=False
    )
    assert (again.done, again.skipped) == (1, 1)
    assert again.counts == {"samples": 5 + 3 + 3}
    assert list(again.quarantined) == ["c"]
    assert job.tries("b", "start") - 1 == 1
    assert (output(job, "a"), output(job, "c")) == ([0, 1, 4, 9, 16], [0, 1, 4])
    assert job.markers.read()["a"]["samples"] == 5
    assert job.markers.quarantined() == {}
    assert run(job, [unit("a"), unit("c")], resources, progress=False).skipped == 2


@pytest.mark.integration
@pytest.mark.parametrize("where", ["at_start", "at_end"])
def test_a_unit_that_kills_its_worker_is_bounded(resources: Resources, make, where) -> None:
    job = make(Squares)
    units = [unit("good"), unit("deadly", 20, pad=1 << 20, **{where: ["die", 99]})]
    summary = run(job, units, resources, progress=False, attempts=2)
    assert summary.done == 1
    assert list(summary.quarantined) == ["deadly"]
    assert job.tries("deadly", "start") - 1 <= 2


@pytest.mark.integration
def test_a_worker_killed_by_chance_is_replaced(resources: Resources, make) -> None:
    job = make(Squares)
    units = [unit(f"u{n}", 20, pad=1 << 20, at_end=["die", 1] if n % 2 else None) for n in range(4)]
    assert run(job, units, resources, progress=False).done == 4
    assert output(job, "u1") == [n * n for n in range(20)]


@pytest.mark.integration
@pytest.mark.parametrize(("how", "times", "done"), [("die", 99, 1), ("die", 1, 2), ("raise", 99, 1), ("raise", 1, 2)])
def test_a_piece_that_the_model_cannot_bear(resources: Resources, make, how, times, done) -> None:
    job = make(ModelSquares)
    units = [unit("good", 9), unit("odd", 9, model_hates=4, in_model=[how, times])]
    summary = run(job, units, resources, progress=False, attempts=2)
    assert summary.done == done
    assert output(job, "good") == [n * n for n in range(9)]


def test_a_recipe_error_ends_the_run(resources: Resources, make) -> None:
    with pytest.raises(RecipeError, match=r"image\.size"):
        run(make(Squares), [unit("a", at_start=["recipe", 9])], resources, progress=False)


def test_only_lines_of_our_own_reach_the_terminal_while_ray_starts() -> None:
    code = (
        "import os; from capstan.pipeline.config import Resources; from capstan.pipeline.units import start_ray;"
        "import ray; init = ray.init;"
        "ray.init = lambda **options: (os.write(2, b'a warning\\n'), init(**options));"
        "start_ray(Resources(cpus=1)); os.write(2, b'after\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert ".cc:" not in done.stderr
    assert "a warning\n" in done.stderr
    assert "after\n" in done.stderr
