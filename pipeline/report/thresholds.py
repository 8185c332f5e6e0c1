"""SQL conditions → thresholds: the expression, operator and number compared

DuckDB parses the conditions. A condition is split at AND; each comparison of a row's value with a number is a
threshold. With OR, NOT or subqueries no single line divides the rows, so they yield no threshold.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import duckdb

from capstan.pipeline.sql import Node, costly_call, expression_of, parse, walk

_OPERATORS: Final = {
    "COMPARE_GREATERTHANOREQUALTO": "≥",
    "COMPARE_GREATERTHAN": ">",
    "COMPARE_LESSTHANOREQUALTO": "≤",
    "COMPARE_LESSTHAN": "<",
}
_FLIPPED: Final = {"≥": "≤", ">": "<", "≤": "≥", "<": ">"}
_ARITHMETIC: Final = {"+", "-", "*", "/"}
_UNCLEAR: Final = {"SUBQUERY", "WINDOW", "STAR", "LAMBDA", "PARAMETER"}


@dataclass(frozen=True)
class Threshold:
    """A comparison: `subject` (SQL in DuckDB's canonical form) must be ≥, >, ≤ or < `value`."""

    condition: str
    subject: str
    operator: str
    value: float

    @property
    def keeps_above(self) -> bool:
        return self.operator in ("≥", ">")


def thresholds(db: duckdb.DuckDBPyConnection, conditions: Mapping[str, str]) -> list[Threshold]:
    """Return the thresholds in `conditions` (name → SQL), in order."""
    found = []
    for name, where in conditions.items():
        if (statement := parse(db, where)) and not costly_call(statement):
            for subject, operator, constant in _comparisons(expression_of(statement)):
                text, value = _sql(db, statement, subject), _number(db, statement, constant)
                if text is not None and value is not None:
                    found.append(Threshold(name, text, operator, value))
    return found


def canonical(db: duckdb.DuckDBPyConnection, expression: str) -> str:
    """Return an expression in DuckDB's canonical form, without differences in spaces or brackets."""
    statement = parse(db, expression)
    assert statement is not None, expression
    text = _sql(db, statement, expression_of(statement))
    assert text is not None, expression
    return text


def _comparisons(node: Node) -> Iterator[tuple[Node, str, Node]]:
    """Yield (subject, operator, constant) of every comparison that must be true for `node` to be true."""
    if node["type"] == "CONJUNCTION_AND":
        for child in node["children"]:
            yield from _comparisons(child)
    elif node["type"] == "COMPARE_BETWEEN":
        for operator, end in (("≥", "lower"), ("≤", "upper")):
            if _is_subject(node["input"]) and _is_constant(node[end]):
                yield node["input"], operator, node[end]
    elif node["type"] in _OPERATORS:
        operator = _OPERATORS[node["type"]]
        if _is_subject(node["left"]) and _is_constant(node["right"]):
            yield node["left"], operator, node["right"]
        elif _is_constant(node["left"]) and _is_subject(node["right"]):
            yield node["right"], _FLIPPED[operator], node["left"]


def _is_constant(node: Node) -> bool:
    """Return whether the node consists of literals only."""
    inner = list(walk(node))
    functions = [n["function_name"] for n in inner if n["class"] == "FUNCTION"]
    return all(n["class"] in ("CONSTANT", "CAST", "FUNCTION", "TYPE") for n in inner) and set(functions) <= _ARITHMETIC


def _is_subject(node: Node) -> bool:
    classes = {inner["class"] for inner in walk(node)}
    return "COLUMN_REF" in classes and not classes & _UNCLEAR


def _sql(db: duckdb.DuckDBPyConnection, statement: Node, node: Node) -> str | None:
    """Return a node of a statement as SQL, None if DuckDB cannot write it."""
    inner = statement["statements"][0]
    part = {**statement, "statements": [{**inner, "node": {**inner["node"], "select_list": [node]}}]}
    try:
        (text,) = db.execute("SELECT json_deserialize_sql(?)", [json.dumps(part)]).fetchall()[0]
    except duckdb.Error:
        return None
    return str(text).removeprefix("SELECT ")


def _number(db: duckdb.DuckDBPyConnection, statement: Node, node: Node) -> float | None:
    text = _sql(db, statement, node)
    try:
        (value,) = db.execute(f"SELECT ({text})::DOUBLE").fetchall()[0]
    except duckdb.Error:
        return None
    return value if value is not None and abs(value) < float("inf") else None


def named_columns(db: duckdb.DuckDBPyConnection, expression: str) -> set[str]:
    """Return the columns that an expression names, in lower case."""
    statement = parse(db, expression)
    nodes = walk(expression_of(statement)) if statement else ()
    return {str(name).casefold() for node in nodes for name in node.get("column_names", ())}


def is_condition(db: duckdb.DuckDBPyConnection, text: str) -> bool:
    """Return whether a text is one SQL expression: not a list, not several statements, not a query."""
    statement = parse(db, text) if text.strip() else None
    return statement is not None and not {node["class"] for node in walk(expression_of(statement))} & _UNCLEAR
