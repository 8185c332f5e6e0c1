"""Questions about rows: pages in any order, facets, what-if funnels; and which SQL of a user is taken."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from capstan.pipeline.errors import DamagedFile, RecipeError, StorageError
from capstan.pipeline.report.explore import Explorer, wilson
from capstan.pipeline.report.query import Rows
from capstan.pipeline.storage import Storage

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def explorer(hostile_dataset: Path) -> Iterator[Explorer]:
    with Rows(Storage(str(hostile_dataset))) as rows:
        yield Explorer(rows)


def pages(explorer: Explorer, limit: int, **question: object) -> list[str]:
    """The keys of all pages, one after the other."""
    keys, after = [], None
    while True:
        page = explorer.page(limit=limit, after=after, **question)  # type: ignore[arg-type]
        keys += [row.key for row in page.rows]
        after = page.next
        if after is None:
            return keys


@pytest.mark.parametrize("order", ["key", "width", "caption", "reason", "bytes"])
@pytest.mark.parametrize("descending", [False, True])
def test_pages_hold_every_row_once_and_in_order(explorer: Explorer, order: str, descending: bool) -> None:
    way = "DESC" if descending else "ASC"
    last = "" if order == "key" else ", key"
    expected = [
        key for (key,) in explorer.rows.query(f'SELECT key FROM rows ORDER BY "{order}" {way} NULLS LAST{last}')
    ]
    assert pages(explorer, 7, order=order, descending=descending) == expected
    assert len(expected) == explorer.rows.count > 40


def test_facets_and_conditions_narrow_the_rows(explorer: Explorer) -> None:
    rejected = explorer.page(outcome="rejected", reason="score", limit=100)
    assert rejected.total == len(rejected.rows) == explorer.outcomes["rejected", "score"]
    assert {(row.outcome, row.reason) for row in rejected.rows} == {("rejected", "score")}
    wide = explorer.page(where="width > height OR reason = 'score'", limit=100)
    assert {row.key for row in rejected.rows} <= {row.key for row in wide.rows}


@pytest.mark.parametrize(
    "text",
    [
        "true); DROP VIEW rows; --",
        "true) UNION SELECT 1; --",
        "1; SELECT 2",
        "true, false",
        "",
        " ",
        "key IN (SELECT key FROM rows)",
        "lenght(caption) > 3",
        "widht > 3",
        "read_text('/etc/passwd') IS NOT NULL",
        "caption || 'x'",
        "(SELECT true)",
        "$1",
    ],
)
def test_sql_that_is_not_one_condition_is_refused_and_changes_nothing(explorer: Explorer, text: str) -> None:
    with pytest.raises(RecipeError):
        explorer.funnel([("x", text)])
    if text:  # without a text, a page has no condition
        with pytest.raises(RecipeError):
            explorer.page(where=text)
    assert explorer.page(limit=1).total == explorer.rows.count


def test_a_condition_with_a_comment_at_its_end_is_whole(explorer: Explorer) -> None:
    assert explorer.page(where="width > 0 -- wide").total == explorer.page(where="width > 0").total


def test_a_funnel_counts_conditions_in_order(explorer: Explorer) -> None:
    images, first, second = explorer.funnel([("wide", "width >= 1"), ("none", "width < 0")])
    assert images["left"] == sum(n for (outcome, _), n in explorer.outcomes.items() if outcome != "failed")
    assert (first["left"], first["lost"]) == (images["left"], 0)
    assert (second["left"], second["lost"]) == (0, images["left"])


def test_rows_next_to_a_threshold(explorer: Explorer) -> None:
    caption = next(subject.title for subject in explorer.subjects if "Caption" in subject.title)
    found = explorer.nearest(caption, 40, count=3)
    below, above = ([len(row.caption) for row in found[side]] for side in ("below", "above"))
    assert max(below) < 40 <= min(above)
    assert below == sorted(below, reverse=True)
    assert above == sorted(above)
    with pytest.raises(RecipeError, match="no subject"):
        explorer.nearest("nothing", 1)


def test_a_detail_has_scores_neighbours_and_bounded_texts(explorer: Explorer) -> None:
    keys = pages(explorer, 50)
    detail = explorer.detail(keys[3])
    assert detail is not None
    assert (detail["before"], detail["after"]) == (keys[2], keys[4])
    longest = explorer.page(order="caption", where="length(caption) > 100000", limit=1).rows[0]
    found = explorer.detail(longest.key)
    assert found is not None
    assert len(found["row"]["caption"]) == 2000
    assert explorer.detail("0" * 32) is None


def test_a_question_that_takes_too_long_is_interrupted(hostile_dataset: Path) -> None:
    with Rows(Storage(str(hostile_dataset))) as rows:
        explorer = Explorer(rows, deadline_s=0.3)
        slow = " AND ".join(f"NOT regexp_matches(caption, '[xyz]{number}.*(a|b)+$')" for number in range(3000))
        with pytest.raises(RecipeError, match=r"longer than \d\.\d s"):
            explorer.page(where=slow)
        with pytest.raises(RecipeError, match=r"^where: calls sleep_ms\(\), which computes nothing"):
            explorer.page(where="sleep_ms(1000000) IS NULL")
        assert explorer.page(limit=1).total == rows.count  # the connection is whole


def slow_rows(seconds: float) -> pa.RecordBatchReader:
    """A table that comes as slowly as from a bucket at the other end of a bad line."""

    def batches() -> Iterator[pa.RecordBatch]:
        for number in range(4):
            time.sleep(seconds / 4)
            yield pa.record_batch({"n": [number]})

    return pa.RecordBatchReader.from_batches(pa.schema([("n", pa.int64())]), batches())


def test_a_question_that_waits_for_a_slow_bucket_has_more_time(hostile_dataset: Path) -> None:
    with Rows(Storage(str(hostile_dataset))) as rows:
        explorer = Explorer(rows, deadline_s=0.2)
        tables = {"slow": slow_rows(0.8)}
        assert explorer.ask("where", "SELECT count(*) FROM slow", tables=tables) == [(4,)]  # type: ignore[arg-type]
        tables = {"slower": slow_rows(30 * 0.2)}
        with pytest.raises(StorageError, match=r"cannot read .* \(took longer than 1.8 s\)"):
            explorer.ask("where", "SELECT count(*) FROM slower", tables=tables)  # type: ignore[arg-type]
        assert explorer.page(limit=1).total == rows.count


@pytest.mark.parametrize("lost", [False, True])
def test_a_damaged_table_is_not_the_fault_of_the_condition(hostile_dataset: Path, tmp_path: Path, lost: bool) -> None:
    dataset = tmp_path / "dataset"
    shutil.copytree(hostile_dataset, dataset)
    with Rows(Storage(str(dataset))) as rows:
        explorer = Explorer(rows)
        table = next((dataset / "ledger").glob("*.parquet"))
        data = bytearray(table.read_bytes())
        table.unlink()
        if not lost:
            data[60:-600:7] = bytes(255 - byte for byte in data[60:-600:7])
            table.write_bytes(data)
        questions = (explorer.page, lambda: explorer.outcomes, lambda: explorer.funnel([("wide", "width > 3")]))
        for question in questions:
            with pytest.raises(DamagedFile, match="verify DATASET --repair"):
                question()


def test_threads_may_ask_at_once(explorer: Explorer) -> None:
    found: list[int | None] = []
    threads = [threading.Thread(target=lambda: found.append(explorer.page(limit=5).total)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [explorer.rows.count] * 8


def test_an_interval_of_a_share() -> None:
    low, high = wilson(10, 100)
    assert (round(low, 3), round(high, 3)) == (0.055, 0.174)
    assert wilson(0, 0) == (0.0, 1.0)
