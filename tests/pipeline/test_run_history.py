"""What runs took is kept beside the dataset, one line a run that did something."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capstan.pipeline import build
from capstan.pipeline.config import Recipe, Resources
from capstan.pipeline.errors import CapstanError
from capstan.pipeline.run_history import RUNS, note_run, read_runs
from capstan.pipeline.storage import Storage


@pytest.mark.integration
def test_builds_and_selects_that_do_something_are_noted(tmp_path: Path, two_cpus: Resources, draw) -> None:
    rows = [{"image": draw(number), "caption": f"image {number}"} for number in range(12)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    settings = {"dataset": str(tmp_path / "ds"), "source": {"path": str(tmp_path / "rows.parquet"), "image": "image"}}
    recipe = Recipe.model_validate(settings)
    build.build(recipe, progress=False)
    build.build(recipe, progress=False)  # finds all done
    storage = Storage(recipe.dataset)
    (run,) = read_runs(storage)
    assert (run.command, run.rows) == ("build", 12)
    assert run.seconds["ingest"] > 0
    narrower = Recipe.model_validate(settings | {"select": [{"name": "one", "where": "caption LIKE '%1%'"}]})
    build.select(narrower, dry_run=True, progress=False)
    build.select(narrower, progress=False)
    assert [(run.command, run.rows) for run in read_runs(storage)] == [("build", 12), ("select", 0)]


def test_the_latest_two_hundred_runs_are_kept(storage: Storage) -> None:
    storage.write(RUNS, b'{"command":"old","ended":"2020-01-01T00:00:00Z","rows":1,"seconds":{}}\n' * 200)
    note_run(storage, "build", 5, {"plan": 0.1})
    runs = read_runs(storage)
    assert len(runs) == 200
    assert runs[-1].command == "build"


def test_a_line_that_is_no_run_is_named(storage: Storage) -> None:
    storage.write(RUNS, b"nonsense\n")
    with pytest.raises(CapstanError, match=RUNS):
        read_runs(storage)
