"""Questions about a dataset's rows: pages, facets, histograms, what-if funnels

Every SQL text of a user passes `condition`, which takes one expression. A question that computes longer than its
deadline is interrupted. One that waits for a slow bucket is not the user's mistake: it has more time.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import duckdb
import pyarrow as pa

from capstan.pipeline.dataset.parts import PARTS, part_fields
from capstan.pipeline.errors import RecipeError, StorageError
from capstan.pipeline.html.plots import Histogram
from capstan.pipeline.records import LEDGER_SCHEMA
from capstan.pipeline.report.histograms import Subject, histograms, is_numeric, subjects, value
from capstan.pipeline.report.ordered import Order, Place, page_of
from capstan.pipeline.report.query import LONG, SHOWN, Row, Rows, literal, quoted
from capstan.pipeline.report.row_index import IndexedRows, RowIndex, SampledRows, covers
from capstan.pipeline.report.thresholds import is_condition
from capstan.pipeline.sql import parse, refuse_costly_calls

log = logging.getLogger(__name__)

DEADLINE_S: Final = 20.0  # of computing
PATIENCE: Final = 9  # a question that waits for its files may take this many deadlines
_BUSY: Final = 0.05  # CPU seconds per second below which a question waits: for the disk or the bucket
_TEXT: Final = 2000  # characters of a text column in a detail
_VERDICTS: Final = "verdicts"
_HIDDEN: Final = (
    *("phash", "colours", "offset", "size", "json_size"),
    *(field.name for field in part_fields(PARTS)),
)


@dataclass(frozen=True)
class Page:
    """Rows in order, and where the next page starts (None at the end)."""

    rows: list[Row]
    next: list[Any] | None
    total: int | None
    low: int | None = None  # with `high`: bounds of an estimated total (95%)
    high: int | None = None


@dataclass(frozen=True)
class Judged:
    """A review (columns key and verdict), and the verdict asked for; "" for none."""

    review: pa.Table
    verdict: str


class Explorer:
    """Answers questions about `rows`, one at a time; safe to call from several threads.

    A dataset of more than a million rows is answered from its index, once `prepare` has built it; before, and about
    columns that it lacks, from a sample.
    """

    def __init__(self, rows: Rows, deadline_s: float = DEADLINE_S, *, cache: Path | None = None) -> None:
        self.rows, self._deadline_s = rows, deadline_s
        self._lock, self._stack = threading.Lock(), contextlib.ExitStack()
        self._index: IndexedRows | None = None
        self._builder: RowIndex | None = None
        self._sample: SampledRows | None = None
        self._failed = False  # whether there will be no index
        if rows.sampled and rows.finished:
            self._builder = RowIndex(rows.storage, cache)
            self._keep_index(self._builder.open())
            self._sample = self._stack.enter_context(SampledRows(rows.storage))
        with self._lock:
            self._subjects = {subject.title: subject for subject in subjects(rows)}
            self.columns = rows.columns

    def prepare(self) -> None:
        """Build the index of a large dataset and answer from it from then on. Does nothing for others."""
        if self._builder is None or self._index is not None:
            return
        try:
            self._builder.build()
        except (duckdb.Error, OSError) as error:
            self._failed = True
            log.warning("no index of the rows, so counts stay those of a sample: %s", str(error).splitlines()[0])
            return
        index = self._builder.open()
        with self._lock:
            self._keep_index(index)

    def _keep_index(self, index: IndexedRows | None) -> None:
        if index is not None:
            self._stack.push(index.__exit__)
            self._index = index

    def close(self) -> None:
        """Interrupt a build of the index, and close what this explorer opened."""
        if self._builder is not None:
            self._builder.close()
        with self._lock:
            self._stack.close()

    @property
    def preparing(self) -> bool:
        """Whether the index is not there yet."""
        return self._sample is not None and self._index is None and not self._failed

    def _among(self, *expressions: str) -> tuple[Rows, bool]:
        """Return the rows to ask about what SQL expressions name, and whether they are a sample."""
        if self._sample is None:
            return self.rows, False
        if self._index is not None and covers(self._index, *expressions):
            return self._index, False
        return self._sample, True

    @property
    def outcomes(self) -> dict[tuple[str, str], int]:
        """(outcome, reason) → rows; estimates while answers come from a sample."""
        with self._lock, self._asked("outcome"):
            chosen, sampled = self._among()
            part = self.rows.count / max(chosen.count, 1) if sampled else 1
            return {name: round(count * part) for name, count in chosen.outcomes.items()}

    def ask(
        self, field: str, query: str, parameters: Sequence[Any] = (), tables: Mapping[str, pa.Table] | None = None
    ) -> list[tuple[Any, ...]]:
        """Return what a query over all rows finds; it may name `tables`, too."""
        with self._lock, self._asked(field):
            for name, table in (tables or {}).items():
                self.rows.db.register(name, table)
            return self.rows.query(query, parameters)

    @property
    def subjects(self) -> list[Subject]:
        """What a histogram can be drawn of."""
        return list(self._subjects.values())

    def condition(self, text: str) -> str:
        """Return a user's SQL condition in brackets. Raises RecipeError unless it is one expression over columns."""
        with self._lock:
            if not is_condition(self.rows.db, text):
                raise RecipeError("where", f"{text[:200]!r} is not one SQL condition", "write e.g. width >= 512")
            refuse_costly_calls(parse(self.rows.db, text), "where")
            with self._asked("where"):
                self.rows.query(f"SELECT ({text}\n)::BOOLEAN FROM rows LIMIT 0")
        return f"coalesce(({text}\n)::BOOLEAN, false)"

    def page(
        self,
        where: str = "",
        outcome: str = "",
        reason: str = "",
        order: str = "key",
        descending: bool = False,
        after: Sequence[Any] | None = None,
        limit: int = 60,
        judged: Judged | None = None,
        texts: Sequence[str] = LONG,
    ) -> Page:
        """Return a page of rows, ordered by a column and then by key; `after` is the `next` of the page before.

        A large dataset is answered faster if only some `texts` are asked for; the others may be empty.
        `judged` leaves the rows that have a certain verdict in a review, or none.
        """
        if order not in self.columns:
            raise RecipeError("order", f"no column {order!r}", f"use one of {', '.join(self.columns)}")
        terms = [self.condition(where)] if where else []
        terms += [f"outcome = {literal(outcome)}"] if outcome else []
        terms += [f"reason = {literal(reason)}"] if reason else []
        if judged is not None:
            terms.append(f"key IN (SELECT key FROM {_VERDICTS} WHERE verdict = {literal(judged.verdict)})")
            if not judged.verdict:
                terms[-1] = f"key NOT IN (SELECT key FROM {_VERDICTS})"
        chosen = " AND ".join(terms) or "true"
        by = Order(quoted(order), self.columns[order], descending)
        with self._lock:
            asked, sampled = self._among(where, by.sql)
            if sampled and not self.preparing:  # a text that the index lacks: slower, but exact
                asked, sampled = self.rows, False
            with self._asked("where", asked):
                if judged is not None:
                    asked.db.register(_VERDICTS, judged.review)
                found = page_of(asked, chosen, by, after, limit)
                count = None if after is not None else asked.query(f"SELECT count(*) FROM rows WHERE {chosen}")[0][0]
                rows = self._rows_at(found, texts)
            total, low, high = self._whole(count, asked) if sampled and count is not None else (count, None, None)
        more = [found[-1][1], found[-1][0]] if len(found) == limit else None
        return Page([rows[place[0]] for place in found], more, total, low, high)

    def _rows_at(self, places: Sequence[Place], texts: Sequence[str] = LONG) -> dict[str, Row]:
        """Return key → row for what `page_of` found."""
        if places and len(places[0]) > len(("key", "value", "unit")):
            return self.rows.placed_rows(places, texts)
        return self.rows.rows((place[0] for place in places), {place[2] for place in places})

    def _whole(self, hits: int, sample: Rows) -> tuple[int, int, int]:
        """Return the estimated number of all rows for a number of sampled ones, with its bounds (95%)."""
        low, high = wilson(hits, sample.count)
        rows = self.rows.count
        return round(hits / max(sample.count, 1) * rows), round(low * rows), round(high * rows)

    def _unit_of(self, key: str) -> list[str]:
        """Return the unit that holds a key, if an index says so."""
        if self._index is None:
            return []
        return [unit for (unit,) in self._index.query("SELECT unit FROM rows WHERE key = ?", [key])]

    def row(self, key: str) -> Row | None:
        """Return the row of a key, texts cut, or None."""
        with self._lock, self._asked("key"):
            return self.rows.rows([key], self._unit_of(key)).get(key)

    def rows_of(self, keys: Iterable[str], units: Collection[str] = ()) -> dict[str, Row]:
        """Return key → row for those of `keys` that exist; faster if the caller knows which `units` hold them."""
        with self._lock, self._asked("key"):
            return self.rows.rows(keys, units)

    def detail(self, key: str) -> dict[str, Any] | None:
        """Return a row's columns and scores, and the keys before and after it; None if there is no such row."""
        shown = [name for name in self.columns if name not in _HIDDEN]
        texts = {name for name in shown if self.columns[name] == "VARCHAR"}
        listed = ", ".join(f"left({quoted(n)}, {_TEXT})" if n in texts else quoted(n) for n in shown)
        with self._lock, self._asked("key"):
            units, every = self._unit_of(key), self._index or self.rows
            table = self.rows.near(units, [key]) if units else "rows"
            found = self.rows.query(f"SELECT {listed} FROM {table} WHERE key = ?", [key])
            before = every.query("SELECT key FROM rows WHERE key < ? ORDER BY key DESC LIMIT 1", [key])
            after = every.query("SELECT key FROM rows WHERE key > ? ORDER BY key LIMIT 1", [key])
        if not found:
            return None
        facts = {name: _plain(cell) for name, cell in zip(shown, found[0], strict=True)}
        scores = {name: facts.pop(name) for name in list(facts) if name not in LEDGER_SCHEMA.names}
        nearby = {name: keys[0][0] if keys else None for name, keys in (("before", before), ("after", after))}
        return {"row": facts, "scores": scores, **nearby}

    def histogram(self, title: str) -> Histogram | None:
        """Return the histogram of a subject over rows with an image; None if its values do not differ."""
        subject = self._subject(title)
        with self._lock:
            asked, _ = self._among(subject.sql)
            with self._asked("subject", asked):
                drawn, _ = histograms(asked, [subject])
        return drawn[0] if drawn else None

    def funnel(self, conditions: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        """Return {step, left, lost} of these conditions (name, SQL) in order, over rows with an image.

        Duplicates are not looked for: `capstan select --dry-run` counts them. Of a large dataset a random sample is
        counted: then `sample` is its number of rows, and `low` and `high` bound the rows left (95%).
        """
        steps = [self.condition(where) for _, where in conditions]
        among = [" AND ".join(steps[: number + 1]) for number in range(len(steps))]
        counts = ", ".join(["count(*)", *(f"count(*) FILTER ({term})" for term in among)])
        with self._lock:
            asked, sampled = self._among(*(where for _, where in conditions))
            with self._asked("conditions", asked):
                found = asked.query(f"SELECT {counts} FROM rows WHERE {SHOWN}")[0]
            whole = self._whole(found[0], asked)[0] if sampled else found[0]
        names, before, answer = ["images", *(name for name, _ in conditions)], found[0], []
        for name, left in zip(names, found, strict=True):
            step: dict[str, Any] = {"step": name, "left": left, "lost": before - left}
            if sampled and found[0]:
                low, high = wilson(left, found[0])
                step |= {"sample": found[0], "low": round(low * whole), "high": round(high * whole)}
                step |= {"left": round(left / found[0] * whole), "lost": round((before - left) / found[0] * whole)}
            answer.append(step)
            before = left
        return answer

    def nearest(self, title: str, threshold: float, count: int = 6) -> dict[str, list[Row]]:
        """Return the rows whose value of a subject is nearest to a threshold: `below` it, and `above` or equal."""
        number, finite = self._number(self._subject(title).sql)
        found = {}
        for side, sign, descending in (("below", "<", True), ("above", ">=", False)):
            where = f"{SHOWN} AND {finite} AND {number} {sign} {threshold!r}::DOUBLE"
            with self._lock:
                asked, _ = self._among(number)
                with self._asked("threshold", asked):
                    places = page_of(asked, where, Order(number, "DOUBLE", descending), None, count)
                    rows = self._rows_at(places)
            found[side] = [rows[place[0]] for place in places]
        return found

    def _number(self, sql: str) -> tuple[str, str]:
        """Return SQL for a subject as a number, and SQL that is true where it has one.

        A column is named as it is, since a condition on it skips what cannot hold.
        """
        kind = next((kind for name, kind in self.columns.items() if sql in (name, quoted(name))), "")
        if is_numeric(kind):
            return sql, f"isfinite({sql})" if kind in ("FLOAT", "DOUBLE") else "true"
        return value(sql), "true"

    def _subject(self, title: str) -> Subject:
        if title not in self._subjects:
            raise RecipeError("subject", f"no subject {title!r}", f"use one of {', '.join(self._subjects)}")
        return self._subjects[title]

    @contextlib.contextmanager
    def _asked(self, field: str, rows: Rows | None = None) -> Iterator[None]:
        """Interrupt a question to `rows` at its deadline; report what DuckDB rejects as the user's mistake."""
        deadline = _Deadline([rows.db for rows in {self.rows, rows or self.rows, self._index or self.rows}])
        deadline.start(self._deadline_s)
        try:
            yield
        except duckdb.InterruptException:
            problem = f"took longer than {deadline.seconds:g} s"
            if deadline.waits:
                hint = "check that the disk or bucket answers, and ask again"
                raise StorageError(f"read {self.rows.storage.url}", problem, hint) from None
            raise RecipeError(field, problem, "ask for less, e.g. a condition on key or outcome") from None
        except duckdb.Error as error:
            raise RecipeError(field, str(error).splitlines()[0], "correct the SQL condition") from None
        finally:
            deadline.cancel()


class _Deadline:
    """Interrupts DuckDB connections after a deadline of computing, or `PATIENCE` times as long of waiting for files."""

    def __init__(self, connections: Sequence[duckdb.DuckDBPyConnection]) -> None:
        self._connections, self._lock = connections, threading.Lock()
        self._passed, self.waits, self._over, self._ended = 0, False, False, False

    def start(self, seconds: float) -> None:
        """Set the deadline, in seconds from now."""
        self._began, self._deadline = time.process_time(), seconds
        self._again()

    @property
    def seconds(self) -> float:
        """When the question was interrupted."""
        return self._passed * self._deadline

    def _again(self) -> None:
        self._timer = threading.Timer(self._deadline, self._pass)
        self._timer.daemon = True
        self._timer.start()

    def _pass(self) -> None:
        with self._lock:  # so that no later question is interrupted
            if self._ended:
                return
            if not self._over:
                self._passed += 1
                self.waits = time.process_time() - self._began < _BUSY * self.seconds
                self._over = not self.waits or self._passed == PATIENCE
            for connection in self._connections if self._over else ():
                connection.interrupt()
            self._again()  # also after it: DuckDB forgets an interrupt that comes while it plans

    def cancel(self) -> None:
        with self._lock:
            self._ended = True
            self._timer.cancel()


def wilson(hits: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Return the Wilson score interval of a share (Wilson 1927)."""
    if not trials:
        return 0.0, 1.0
    share, extra = hits / trials, z * z / trials
    middle, half = share + extra / 2, z * math.sqrt(share * (1 - share) / trials + extra / trials / 4)
    return max(0.0, (middle - half) / (1 + extra)), min(1.0, (middle + half) / (1 + extra))


def _plain(cell: Any) -> Any:
    """Return a value that JSON can hold."""
    if isinstance(cell, float) and not math.isfinite(cell):
        return None
    return cell if isinstance(cell, str | int | float | bool | None) else str(cell)
