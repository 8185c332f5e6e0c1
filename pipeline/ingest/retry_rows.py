"""`build --retry`: which rows are tried again, and which units hold them.

    state/<job>/retry.json    the round that is going on: {round, reasons}

A unit that was done again says so in its marker (`round`), so a round that was killed goes on with the units that are
left. Any build that gets to its end ends the round.
"""

from __future__ import annotations

import difflib
import json
import uuid
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

from capstan.pipeline.errors import RecipeError
from capstan.pipeline.records import REASONS, REMOVED, is_reason
from capstan.pipeline.units import Job, Unit

ALL: Final = "failed"
FREED: Final = "freed"  # not a failure: images that keep_staged: false removed, and that the recipe now keeps


def parse_reasons(text: str) -> list[str]:
    """The reasons in "timeout,http_503", sorted; "failed" stands for all. Raises RecipeError for an unknown one."""
    reasons = sorted({reason.strip() for reason in text.split(",")} - {""})
    known = [ALL, *sorted(REASONS), *(f"http_{status.value}" for status in HTTPStatus if status >= 400), FREED]
    for reason in reasons:
        if reason not in (ALL, FREED) and not is_reason(reason):
            near = difflib.get_close_matches(reason.lower(), known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"say {ALL} for all, or some of {', '.join(known)}"
            raise RecipeError("--retry", f"{reason!r} is not a reason to fail", hint)
    if not reasons:
        raise RecipeError("--retry", "names no reason", f"say {ALL} for all, or reasons like timeout,http_503")
    return reasons


def matches(reason: str, reasons: Collection[str]) -> bool:
    """Whether a row with this reason ("" if it did not fail) is tried again."""
    return reason not in ("", REMOVED) and (ALL in reasons or reason in reasons)


@dataclass(frozen=True)
class RetryRound:
    """Units to be done again, with what their markers say; and how many of their rows are tried."""

    units: dict[str, Unit]
    rows: int

    def of(self, units: Iterable[Unit]) -> list[Unit]:
        """`units`, those of the round with what makes them be done again."""
        return [self.units.get(unit.id, unit) for unit in units]


def begin_retry(
    job: Job,
    units: Iterable[Unit],
    marks: Mapping[str, Mapping[str, Any]],
    reasons: list[str],
    freed: Mapping[str, list[str]] | None = None,
) -> RetryRound:
    """A new round for `reasons`, or the one for the same reasons that was cut off. `marks`: the markers of `job`.

    `freed`: unit → keys of its rows whose images were freed and are wanted again.
    """
    name = _record(job)
    record = json.loads(job.storage.read(name)) if job.storage.exists(name) else {}
    if record.get("reasons") != reasons:
        record = {"round": uuid.uuid4().hex[:16], "reasons": reasons}
        job.storage.write(name, json.dumps(record).encode())
    found, rows = dict[str, Unit](), 0
    for unit in units:
        mark = marks.get(unit.id, {})
        count = sum(n for fact, n in mark.items() if fact.startswith("failed.") and matches(fact[7:], reasons))
        keys = (freed or {}).get(unit.id, [])
        count += len(keys)
        if count and (keys or mark.get("round") != record["round"]):
            tar = mark["tar"] if mark["tar"] and job.storage.exists(mark["tar"]) else ""
            again = {"table": mark["table"], "tar": tar, **record, **({"keys": keys} if keys else {})}
            found[unit.id] = Unit(unit.id, {**unit.spec, "rows": count, "again": again})
            rows += count
    return RetryRound(found, rows)


def end_retry(job: Job) -> bool:
    """No round is going on any more; gives whether one was."""
    going_on = job.storage.exists(_record(job))
    job.storage.delete(_record(job))
    return going_on


def _record(job: Job) -> str:
    return f"state/{job.name}/retry.json"
