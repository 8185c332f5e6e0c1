"""Hostile SQL in every place that takes a user's: refused by name, and nothing is read, written or dropped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

from capstan.pipeline.config import Condition, Recipe, validate
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.report.thresholds import is_condition, thresholds
from capstan.pipeline.select.conditions import check_conditions
from capstan.pipeline.sql import costly_call, lock, open_sealed, parse

# Each, put into `SELECT (...\n) FROM block`, ends it early, adds a clause, or starts another statement.
NOT_ONE_EXPRESSION = [
    "true; SELECT 1",
    "true); DROP VIEW block; --",
    "true) FROM block; DROP VIEW block; SELECT (true",
    "true) FROM block; CREATE TABLE stacked AS SELECT (1",
    "true) FROM block; COPY (SELECT 1) TO '{file}'; SELECT (true",
    "true) FROM block; SET VARIABLE x = 1; SELECT (true",
    "true) /* ; */ FROM block; CALL enable_logging(); SELECT (true",
    "true) UNION SELECT (true",
    "true) WHERE (false",
    "true) FROM block GROUP BY (1",
    "true) FROM block LIMIT (1",
    "true) AS other, (true",
    "true), (true",
    "",
    "-- a comment",
]
STATEMENTS = [
    "COPY (SELECT 1) TO '{file}'",
    "ATTACH '{file}'",
    "EXPORT DATABASE '{file}'",
    "SELECT * FROM read_csv('/etc/passwd')",
    "SELECT * FROM read_text('/etc/passwd')",
    "SELECT * FROM read_blob('/etc/passwd')",
    "SELECT * FROM '/etc/passwd'",
    "SELECT * FROM glob('/etc/*')",
    "SELECT * FROM read_parquet('http://127.0.0.1:9/x.parquet')",
    "SELECT getenv('HOME')",
    "INSTALL httpfs",
    "LOAD httpfs",
    "PRAGMA enable_profiling = 'json'",
    "PRAGMA profiling_output = '{file}'",
    "SET enable_external_access = true",
    "SET lock_configuration = false",
    "SET temp_directory = '{file}'",
    "SET log_query_path = '{file}'",
]


@pytest.fixture
def db() -> Iterator[duckdb.DuckDBPyConnection]:
    with open_sealed({"memory_limit": "200MB"}) as db:
        db.register("block", pa.table({"width": [1]}))
        lock(db)
        yield db


@pytest.mark.parametrize("text", ["width > 1", "/* ; */ width > 1", "'a;b' <> 'c'", "width > 1 -- ; DROP VIEW block"])
def test_semicolons_in_comments_and_texts_are_no_statements(db: duckdb.DuckDBPyConnection, text: str) -> None:
    assert parse(db, text) is not None
    assert is_condition(db, text)


@pytest.mark.parametrize("text", NOT_ONE_EXPRESSION)
def test_what_is_not_one_expression_is_refused_everywhere(
    db: duckdb.DuckDBPyConnection, text: str, tmp_path: Path
) -> None:
    text = text.format(file=tmp_path / "stolen")
    recipe = validate(Recipe, {"dataset": str(tmp_path / "dataset")})
    for place in ({"where": text}, {"top": 1, "by": text}, {"at_most": 1, "per": text}):
        condition = Condition.model_construct(name="x", **place)
        with pytest.raises(RecipeError, match=r"select\.x\.(where|by|per)"):
            check_conditions(recipe.model_copy(update={"select": [condition]}))
    assert not is_condition(db, text)
    assert thresholds(db, {"x": text}) == []
    assert db.execute("SELECT width FROM block").fetchall() == [(1,)]
    assert db.execute("SELECT table_name FROM duckdb_tables()").fetchall() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("length(repeat('x', 1000000000)) > width", "repeat"),
        ("width > length(REPEAT('x', 1000000000))", "repeat"),
        ("format('{:1000000000}', width) = 'x'", "format"),
        ("printf('%1000000000d', width) = 'x'", "printf"),
        ("CASE WHEN width > 1 THEN lpad('x', 1000000000, 'y') = 'z' END", "lpad"),
        ("len(range(1000000000)) > width", "range"),
        ("len(list_transform(generate_series(1, 1000000000), lambda x: x)) > 1", "generate_series"),
        ("sleep_ms(1000000) IS NULL", "sleep_ms"),
    ],
)
def test_calls_that_cost_any_time_or_memory_are_refused_by_name(
    db: duckdb.DuckDBPyConnection, text: str, name: str, tmp_path: Path
) -> None:
    recipe = validate(Recipe, {"dataset": str(tmp_path), "select": [{"name": "x", "where": text}]})
    with pytest.raises(RecipeError, match=rf"^select\.x\.where: calls {name}\(\), which "):
        check_conditions(recipe)
    assert costly_call(parse(db, text)) == name
    assert thresholds(db, {"x": text}) == []  # it computes constants


@pytest.mark.parametrize("statement", STATEMENTS)
def test_a_sealed_database_reaches_no_file_no_network_and_no_setting(
    db: duckdb.DuckDBPyConnection, statement: str, tmp_path: Path
) -> None:
    with pytest.raises(duckdb.Error):
        db.execute(statement.format(file=tmp_path / "stolen")).fetchall()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["(SELECT content FROM read_text('/etc/passwd')) <> ''", "exists(FROM glob('/*'))"])
def test_a_condition_reads_no_file(text: str, tmp_path: Path) -> None:
    recipe = validate(Recipe, {"dataset": str(tmp_path), "select": [{"name": "x", "where": text}]})
    with pytest.raises(RecipeError, match=r"select\.x\.where"):
        check_conditions(recipe)
