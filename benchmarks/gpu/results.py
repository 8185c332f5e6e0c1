"""Measurements → a JSON file that is written as they end, and one table."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

DONE = "done"


@dataclass(frozen=True)
class Row:
    """One figure. `goal` is the least value that is asked for, or the greatest if `below`."""

    what: str
    value: float | None
    unit: str = ""
    goal: float | None = None
    below: bool = False
    facts: dict[str, Any] = field(default_factory=dict)  # what else the measurement saw

    @property
    def met(self) -> bool | None:
        if self.goal is None or self.value is None:
            return None
        return self.value <= self.goal if self.below else self.value >= self.goal


@dataclass(frozen=True)
class Scale:
    """Real sizes, or toy sizes that a CPU computes in a second: these check the code and measure nothing."""

    toy: bool
    folder: Path  # datasets and models, kept between pieces

    def __call__(self, real: Any, toy: Any) -> Any:
        return toy if self.toy else real


@dataclass(frozen=True)
class Measurement:
    """One process: its name, the seconds after which it is ended, and what it does."""

    name: str
    budget_s: float
    run: Callable[[Scale], list[Row]]
    in_toy: bool = True


class Results:
    """The results file: complete after every measurement, and taken up again by the next piece."""

    def __init__(self, path: Path, device: str, facts: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"device": device, **facts, "measurements": {}}
        if path.is_file():
            before = json.loads(path.read_text())
            if before["device"] != device:
                raise SystemExit(f"{path} holds the results of {before['device']}: name another file for {device}")
            self.content["measurements"] = before["measurements"]

    def open(self, name: str) -> bool:
        """Return whether a measurement is not done yet: never started, failed, or out of time."""
        return bool(self.content["measurements"].get(name, {}).get("status") != DONE)

    def tried(self, name: str) -> bool:
        return name in self.content["measurements"]

    def add(self, name: str, status: str, seconds: float, rows: list[dict[str, Any]], error: str = "") -> None:
        entry = {"status": status, "seconds": round(seconds, 1), "rows": rows} | ({"error": error} if error else {})
        self.content["measurements"][name] = entry
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        partial.replace(self.path)

    def rows(self, name: str) -> list[Row]:
        return [Row(**row) for row in self.content["measurements"].get(name, {}).get("rows", [])]


def as_data(rows: list[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def table(results: Results, names: list[str], derived: list[Row]) -> str:
    """Return the table of all measurements, with the device's name above it."""
    head = [results.content["device"], f"torch {results.content['torch']}", results.content["date"]]
    lines = [" · ".join(head), f"{'measurement':28} {'figure':46} {'value':>12}  goal"]
    for name in names:
        entry = results.content["measurements"].get(name)
        if entry is None:
            lines.append(f"{name:28} not measured yet")
        elif entry["status"] != DONE:
            lines.append(f"{name:28} {entry['status']}: {entry.get('error', '').splitlines()[-1:] or ['']}")
        lines += [_line(name, row) for row in results.rows(name)]
    return "\n".join([*lines, *(_line("together", row) for row in derived)])


def _line(name: str, row: Row) -> str:
    value = "not seen" if row.value is None else f"{row.value:,.3g}" if row.value < 1000 else f"{row.value:,.0f}"
    goal = "" if row.goal is None else f"{'≤' if row.below else '≥'} {row.goal:g}"
    verdict = {True: " met", False: " MISSED", None: ""}[row.met]
    facts = " ".join(
        f"{key} {shown:.3g}" if isinstance(shown, float) else f"{key} {shown}" for key, shown in row.facts.items()
    )
    return f"{name:28} {row.what:46} {value:>12}  {row.unit:9} {goal}{verdict}" + (f"  ({facts})" if facts else "")


def _short(fact: Any) -> str:
    return f"{fact:.3g}" if isinstance(fact, float) else str(fact)
