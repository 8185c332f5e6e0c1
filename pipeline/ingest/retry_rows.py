"""`build --retry`: select the rows to retry, and the units that hold them.

    state/<job>/retry.json    the current round: {round, reasons}

The marker of a retried unit names its round (`round`), so an interrupted round resumes with the remaining units. A
build that reaches its end ends the round.
"""

from __future__ import annotations

import difflib
import json
import uuid
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

from capstan.pipeline.errors import DamagedFile, RecipeError
from capstan.pipeline.records import REASONS, REMOVED, is_reason
from capstan.pipeline.units import Job, Unit

ALL: Final = "failed"
FREED: Final = "freed"  # not a failure: images that keep_staged: false removed and the recipe now keeps


def parse_reasons(text: str) -> list[str]:
    """Parse "timeout,http_503" into sorted reasons; "failed" stands for all. Raises RecipeError for an unknown one."""
    reasons = sorted({reason.strip() for reason in text.split(",")} - {""})
    known = [ALL, *sorted(REASONS), *(f"http_{status.value}" for status in HTTPStatus if status >= 400), FREED]
    for reason in reasons:
        if reason not in (ALL, FREED) and not is_reason(reason):
            near = difflib.get_close_matches(reason.lower(), known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"use {ALL} for all, or any of {', '.join(known)}"
            raise RecipeError("--retry", f"{reason!r} is not a failure reason", hint)
    if not reasons:
        raise RecipeError("--retry", "names no reason", f"use {ALL} for all, or reasons such as timeout,http_503")
    return reasons


def matches(reason: str, reasons: Collection[str]) -> bool:
    """Return whether a row with this reason ("" if it did not fail) is to be retried."""
    return reason not in ("", REMOVED) and (ALL in reasons or reason in reasons)


@dataclass(frozen=True)
class RetryRound:
    """The units to process again, each with the state from its marker; and the number of rows to retry."""

    units: dict[str, Unit]
    rows: int

    def of(self, units: Iterable[Unit]) -> list[Unit]:
        """Return `units`, with those of the round replaced by their retry form."""
        return [self.units.get(unit.id, unit) for unit in units]


def begin_retry(
    job: Job,
    units: Iterable[Unit],
    marks: Mapping[str, Mapping[str, Any]],
    reasons: list[str],
    freed: Mapping[str, list[str]] | None = None,
) -> RetryRound:
    """Start a round for `reasons`, or resume an interrupted one for the same reasons. `marks`: the markers of `job`.

    `freed` maps a unit to the keys of its rows whose images were freed and are needed again.
    """
    name = _record(job)
    try:
        record: dict[str, Any] = job.storage.read_json(name, "")
    except (FileNotFoundError, DamagedFile):  # a damaged record starts a new round
        record = {}
    if record.get("reasons") != reasons:
        record = {"round": uuid.uuid4().hex[:16], "reasons": reasons}
        job.storage.write(name, json.dumps(record).encode())
    retried, rows = dict[str, Unit](), 0
    for unit in units:
        mark = marks.get(unit.id, {})
        count = sum(n for fact, n in mark.items() if fact.startswith("failed.") and matches(fact[7:], reasons))
        keys = (freed or {}).get(unit.id, [])
        count += len(keys)
        if count and (keys or mark.get("round") != record["round"]):
            tar = mark["tar"] if mark["tar"] and job.storage.exists(mark["tar"]) else ""
            again = {"table": mark["table"], "tar": tar, **record, **({"keys": keys} if keys else {})}
            retried[unit.id] = Unit(unit.id, {**unit.spec, "rows": count, "again": again})
            rows += count
    return RetryRound(retried, rows)


def end_retry(job: Job) -> bool:
    """End the current round, if any; return whether there was one."""
    active = job.storage.exists(_record(job))
    job.storage.delete(_record(job))
    return active


def _record(job: Job) -> str:
    return f"state/{job.name}/retry.json"
