"""Images that end or hang the process that decodes them: their rows fail, and no other."""

from __future__ import annotations

import functools
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cloudpickle
import pytest
import ray

from capstan.pipeline import units
from capstan.pipeline.config import Recipe, Resources
from capstan.pipeline.image.decode import Failure, StoredImage, decode
from capstan.pipeline.ingest.guarded import Decoder, guarded
from capstan.pipeline.ingest.job import Ingest
from capstan.pipeline.source.plan import plan
from capstan.pipeline.storage import Storage

for library in (cloudpickle, ray.cloudpickle):
    library.register_pickle_by_value(sys.modules[__name__])  # workers cannot import test modules

BAD = b"ends its process"


def perilous(data: bytes, recipe: Recipe, how: str) -> StoredImage | Failure:
    """Decode as always, but let `BAD` do what a fault in a codec may do."""
    if data == BAD and how == "cpu":  # the kernel ends it by SIGXCPU
        resource.setrlimit(resource.RLIMIT_CPU, (1, 2))
        while True:
            pass
    elif data == BAD and how == "hang":
        time.sleep(1000)
    elif data == BAD and how == "raise":
        raise MemoryError("all of it")
    elif data == BAD:
        os.kill(os.getpid(), signal.Signals[how])
    return decode(data, recipe.image)


class Perilous(Ingest):
    def decoder(self) -> Decoder:
        return functools.partial(perilous, recipe=self.recipe, how="SIGKILL")


def perilous_recipe(folder: Path, draw: Callable[[int], bytes]) -> Recipe:
    source = folder / "images"
    source.mkdir()
    for number in range(6):
        (source / f"{number}.jpg").write_bytes(BAD if number == 2 else draw(number))
        (source / f"{number}.txt").write_text(f"caption {number}")
    return Recipe.model_validate(
        {"dataset": str(folder / "dataset"), "source": {"path": str(source)}, "image": {"size": 64, "min_size": 8}}
    )


def run_perilous(recipe: Recipe, resources: Resources) -> dict[str, tuple[str, str]]:
    """Return reason and detail of each row, by caption, after a run whose only unit kills its worker."""
    storage = Storage(recipe.dataset)
    job = Perilous(recipe, storage)
    planned = job.units(plan(recipe, storage, progress=False).units)
    summary = units.run(job, planned, resources, progress=False)
    assert not summary.quarantined
    (marker,) = job.markers.gather().values()
    rows = storage.read_table(marker["table"]).to_pylist()
    return {row["caption"]: (row["reason"], row["detail"]) for row in rows}


def check(found: dict[str, tuple[str, str]]) -> None:
    ended = ("corrupt", "decoding it ended the process 2 times (SIGKILL)")
    assert found == {f"caption {n}": ended if n == 2 else ("", "") for n in range(6)}


def test_a_unit_that_kills_its_worker_loses_only_the_rows_that_do(tmp_path: Path, draw: Callable[[int], bytes]) -> None:
    check(run_perilous(perilous_recipe(tmp_path, draw), Resources(cpus=1, executor="processes")))


@pytest.mark.slow
def test_on_ray_too(tmp_path: Path, draw: Callable[[int], bytes], ray_session: Resources) -> None:
    check(run_perilous(perilous_recipe(tmp_path, draw), ray_session))


@pytest.mark.parametrize(
    ("how", "detail"),
    [
        ("SIGSEGV", "SIGSEGV"),
        pytest.param("cpu", "SIGXCPU", marks=pytest.mark.slow),
        pytest.param("hang", "more than 3 s", marks=pytest.mark.slow),
    ],
)
def test_a_child_ends_and_the_next_image_is_decoded(
    tmp_path: Path, draw: Callable[[int], bytes], how: str, detail: str
) -> None:
    recipe = Recipe.model_validate({"dataset": str(tmp_path), "source": {"path": "x"}, "image": {"size": 64}})
    decoder = functools.partial(perilous, recipe=recipe, how=how)
    with guarded(decoder, is_retry=True, seconds=3 if how == "hang" else 60) as guard:
        first = guard(BAD)
        assert isinstance(first, Failure)
        assert first.reason == "corrupt"
        assert detail in first.detail
        assert guard(draw(1)) == decode(draw(1), recipe.image)  # the same image as without a child


def test_what_a_decoder_raises_is_raised(tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"dataset": str(tmp_path), "source": {"path": "x"}})
    decoder = functools.partial(perilous, recipe=recipe, how="raise")
    with guarded(decoder, is_retry=True) as guard, pytest.raises(MemoryError, match="all of it"):
        guard(BAD)


def test_a_hang_at_the_first_attempt_ends_the_worker() -> None:
    """Also while the interpreter is held, as a codec may do: here by a system call through PyDLL."""
    worker = os.fork()
    if not worker:
        import ctypes

        with guarded(lambda _: ctypes.PyDLL(None).sleep(1000), is_retry=False, seconds=0.5) as guard:  # type: ignore[arg-type,return-value]
            guard(b"")
        os._exit(0)
    _, status = os.waitpid(worker, 0)
    assert os.waitstatus_to_exitcode(status) == 1
