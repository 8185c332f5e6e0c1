"""Rows in the order of a column → the keys of one page

A page is found in two steps: first the value of its last row, from the column alone; then the keys of the rows up to
that value. So a database that stores columns reads the key of a few rows, not of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from capstan.pipeline.report.query import Rows, quoted

Place = tuple[Any, ...]  # key, value of the column, unit, and what else was asked for


@dataclass(frozen=True)
class Order:
    """An order by a column (an SQL expression with its type) and then by key; nulls are last."""

    sql: str
    kind: str
    descending: bool = False

    @property
    def is_key(self) -> bool:
        return self.sql == quoted("key")


def page_of(rows: Rows, where: str, order: Order, after: Sequence[Any] | None, limit: int) -> list[Place]:
    """Return the first `limit` rows that match the SQL `where`, or those after `after` (value, key).

    They come with the columns `rows.placed`.
    """
    if order.is_key:
        return _by_key(rows, where, order, after, limit)
    value, typed = order.sql, f"?::{order.kind}"
    found: list[Place] = []
    if after is not None and after[0] is not None:
        found = _first(rows, f"{where} AND {value} = {typed} AND key > ?", list(after), "key", order, limit)
    if len(found) < limit and (after is None or after[0] is not None):
        bound = "true" if after is None else f"{value} {_beyond(order)} {typed}"
        found += _valued(rows, f"{where} AND {bound}", list(after or [])[:1], order, limit - len(found))
    if len(found) < limit:
        key = after[1] if after is not None and after[0] is None else ""
        found += _first(rows, f"{where} AND {value} IS NULL AND key > ?", [key], "key", order, limit - len(found))
    return found


def _by_key(rows: Rows, where: str, order: Order, after: Sequence[Any] | None, limit: int) -> list[Place]:
    bound, values = ("true", []) if after is None else (f"key {_beyond(order)} ?", [after[1]])
    return _first(rows, f"{where} AND {bound}", values, f"key {_way(order)}", order, limit)


def _valued(rows: Rows, where: str, values: list[Any], order: Order, limit: int) -> list[Place]:
    """Return the first rows with a value."""
    inner = f"SELECT {order.sql} AS v FROM rows WHERE {where} AND v IS NOT NULL ORDER BY v {_way(order)} LIMIT {limit}"
    last = "min" if order.descending else "max"
    ((count, edge),) = rows.query(f"SELECT count(*), {last}(v) FROM ({inner})", values)
    if not count:
        return []
    way, beyond = f"{order.sql} {_way(order)}, key", _beyond(order)
    better = f"{where} AND {order.sql} {'>' if beyond == '<' else '<'} ?::{order.kind}"
    found = _first(rows, better, [*values, edge], way, order, limit)
    ties = f"{where} AND {order.sql} = ?::{order.kind}"
    return found + _first(rows, ties, [*values, edge], "key", order, count - len(found))


def _first(rows: Rows, where: str, values: list[Any], by: str, order: Order, limit: int) -> list[Place]:
    listed = ", ".join(["key", order.sql, "unit", *rows.placed])
    return rows.query(f"SELECT {listed} FROM rows WHERE {where} ORDER BY {by} LIMIT {limit}", values)


def _way(order: Order) -> str:
    return "DESC" if order.descending else "ASC"


def _beyond(order: Order) -> str:
    return "<" if order.descending else ">"
