"""Users' SQL: one expression, parsed, in a database that sees no file

Conditions come from recipes, from manifests of others and from the viewer. Each is put into a query of ours, so it must
be one expression: text that ends the query early, adds a clause or starts another statement is not. The database has no
access to files, network or extensions, and its configuration is locked before any such text is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

import duckdb

from capstan.pipeline.errors import RecipeError

Node = dict[str, Any]

# They make any length from a short argument, past DuckDB's memory limit, which does not see single values.
_UNBOUNDED: Final = frozenset(
    "array_resize bar format generate_series list_resize lpad printf range repeat rpad".split()  # noqa: SIM905
)
_NO_VALUES: Final = frozenset({"pg_sleep", "sleep_ms", "write_log"})  # they wait, or write


def open_sealed(options: Mapping[str, str | bool]) -> duckdb.DuckDBPyConnection:
    """Open a database that sees only registered tables. Call `lock` before running a user's SQL."""
    db = duckdb.connect(config={**options, "python_enable_replacements": False})
    db.execute("SET enable_progress_bar = false")  # it would go to stdout, which is reserved for the summary
    db.execute("SET enable_external_access = false")
    return db


def lock(db: duckdb.DuckDBPyConnection) -> None:
    """Let no later statement change the configuration."""
    db.execute("SET lock_configuration = true")


def parse(db: duckdb.DuckDBPyConnection, expression: str) -> Node | None:
    """Return the syntax tree of `SELECT (expression)`, or None unless the text is one expression.

    Everything around the expression must be as in `SELECT (true)`: no second statement, no clause, no alias.
    """
    tree = _parsed(db, expression)
    if tree is None:
        return None
    frame = _parsed(db, "true")
    assert frame is not None
    statement, expected = (each["statements"][0]["node"] for each in (tree, frame))
    same = all(statement.get(name) == part for name, part in expected.items() if name != "select_list")
    return tree if same and statement.keys() == expected.keys() else None


def costly_call(tree: Node | None) -> str:
    """Return the name of a function in the tree that may take any time or memory, whatever the rows are; or ""."""
    names = (str(node.get("function_name", "")).casefold() for node in walk(tree))
    return next((name for name in names if name in _UNBOUNDED | _NO_VALUES), "")


def refuse_costly_calls(tree: Node | None, field: str) -> None:
    """Raise RecipeError, naming `field`, for a call that `costly_call` finds."""
    if name := costly_call(tree):
        why = "which makes values of any length" if name in _UNBOUNDED else "which computes nothing"
        raise RecipeError(field, f"calls {name}(), {why}", "compare columns with values that you write out")


def _parsed(db: duckdb.DuckDBPyConnection, expression: str) -> Node | None:
    """Return the tree of one statement with one selected value and no alias, or None."""
    try:
        ((text,),) = db.execute("SELECT json_serialize_sql(?)", [f"SELECT ({expression}\n)"]).fetchall()
    except (duckdb.Error, UnicodeError):
        return None
    tree: Node = json.loads(text)
    if tree.get("error") or len(tree["statements"]) != 1:
        return None
    chosen = tree["statements"][0]["node"].get("select_list", [])  # a UNION has no select_list of its own
    if len(chosen) != 1 or chosen[0].get("alias"):
        return None
    nothing = chosen[0].get("function_name") == "row" and not chosen[0].get("children")  # `()`: blank, or a comment
    return None if nothing else tree


def expression_of(tree: Node) -> Node:
    """Return the expression of a tree that `parse` returned."""
    return dict(tree["statements"][0]["node"]["select_list"][0])


def walk(node: Any) -> Iterator[Node]:
    """Yield the expressions in a syntax tree."""
    if isinstance(node, dict):
        if "class" in node:
            yield node
        for value in node.values():
            yield from walk(value)
    elif isinstance(node, list):
        for value in node:
            yield from walk(value)
