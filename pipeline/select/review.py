"""Reviews: verdicts of people on rows, and the selection step that follows them

    review/<name>.parquet     key, verdict (reject | keep), note, who, when; one row per key, sorted by key

A verdict is given in `capstan view`. It changes nothing by itself: the step `review: <name>` of a recipe rejects the
rows that its review rejects. A review is small, so it is read and replaced as a whole, under the lease of its part.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from capstan.pipeline.config import Recipe, fingerprint
from capstan.pipeline.errors import DamagedFile, RecipeError
from capstan.pipeline.storage import Storage

FOLDER: Final = "review"
REJECT, KEEP = "reject", "keep"
VERDICTS: Final = (REJECT, KEEP)
NOTE_CHARS: Final = 1000
SCHEMA: Final = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("verdict", pa.string(), nullable=False),
        pa.field("note", pa.string(), nullable=False),
        pa.field("who", pa.string(), nullable=False),
        pa.field("when", pa.timestamp("ms", tz="UTC"), nullable=False),
    ]
)
_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_KEY: Final = r"^[0-9a-f]{32}$"
_HINT: Final = "restore it from a copy, or delete it and review again"


@dataclass(frozen=True)
class Verdict:
    """What a person decided on a row: `verdict` is reject, keep, or "" for none."""

    verdict: str
    note: str = ""


def review_file(name: str, field: str = "review") -> str:
    """Return the file of a review. Raises RecipeError for a name that cannot be one."""
    if not _NAME.fullmatch(name):
        raise RecipeError(field, f"{name!r} cannot be a name", "use at most 64 letters, digits, - and _")
    return f"{FOLDER}/{name}.parquet"


def list_reviews(storage: Storage) -> list[str]:
    """Return the names of all reviews, sorted."""
    files = [name.removeprefix(f"{FOLDER}/") for name in storage.names(FOLDER)]
    stems = [file.removesuffix(".parquet") for file in files if file.endswith(".parquet")]
    return [stem for stem in stems if _NAME.fullmatch(stem)]


def read_review(storage: Storage, name: str) -> pa.Table:
    """Return a review's verdicts (SCHEMA); none if it does not exist yet. Raises DamagedFile if it is not a review."""
    file = review_file(name)
    try:
        table = storage.read_table(file)
    except FileNotFoundError:
        return SCHEMA.empty_table()
    if problem := _problem(table):
        raise DamagedFile(storage.path(file), problem, _HINT)
    return table


def write_review(storage: Storage, name: str, table: pa.Table) -> None:
    """Publish a review's verdicts (SCHEMA)."""
    storage.write_table(review_file(name), table.cast(SCHEMA).sort_by("key"))


def changed(
    table: pa.Table, verdicts: Mapping[str, Verdict], who: str, when: datetime.datetime | None = None
) -> pa.Table:
    """Return a review with other verdicts on the keys of `verdicts`; an empty verdict takes a row out of it."""
    now = (when or datetime.datetime.now(datetime.UTC)).replace(microsecond=0)
    others = table.filter(pc.invert(pc.is_in(table["key"], pa.array(list(verdicts), pa.string()))))
    given = [
        {"key": key, "verdict": one.verdict, "note": one.note[:NOTE_CHARS], "who": who, "when": now}
        for key, one in verdicts.items()
        if one.verdict
    ]
    return pa.concat_tables([others.cast(SCHEMA), pa.Table.from_pylist(given, SCHEMA)]).sort_by("key")


def rejected_keys(storage: Storage, name: str) -> pa.Array:
    """Return the keys that a review rejects, sorted."""
    table = read_review(storage, name)
    return table.filter(pc.equal(table["verdict"], REJECT))["key"].combine_chunks().sort()


def check_reviews(recipe: Recipe, storage: Storage) -> None:
    """Raise RecipeError for a step that names a review which the dataset does not have."""
    for condition in recipe.select:
        if condition.review is not None and not storage.exists(review_file(condition.review)):
            known = list_reviews(storage)
            hint = f"use one of {', '.join(known)}" if known else "review rows in `capstan view`, or remove the step"
            raise RecipeError(
                f"select.{condition.name}.review", f"{storage.url} has no review {condition.review!r}", hint
            )


def reviews_of(recipe: Recipe, storage: Storage) -> dict[int, pa.Array]:
    """Return the number of each step of the recipe that follows a review → the keys that it rejects."""
    check_reviews(recipe, storage)
    steps = enumerate(recipe.select, 1)
    return {number: rejected_keys(storage, step.review) for number, step in steps if step.review is not None}


def reviews_signature(recipe: Recipe, storage: Storage) -> str:
    """Return a hash of what the recipe's reviews reject; "" for a recipe without reviews."""
    found = reviews_of(recipe, storage)
    return fingerprint([[number, keys.to_pylist()] for number, keys in found.items()]) if found else ""


def verify_reviews(storage: Storage) -> list[str]:
    """Return what is wrong with the reviews, one line each that names the file."""
    problems = []
    for file in storage.names(FOLDER):
        if file.endswith(".parquet"):
            try:
                problem = _problem(storage.read_table(file))
            except DamagedFile as error:
                problem = error.problem
            if problem:
                problems.append(f"{file}: damaged ({problem}): {_HINT}")
    return problems


def _problem(table: pa.Table) -> str:
    """Return what keeps a table from being a review, or ""."""
    if table.schema.names != SCHEMA.names or table.schema.types != SCHEMA.types:
        return f"its columns are not {', '.join(SCHEMA.names)}"
    keys = table["key"]
    if any(column.null_count for column in table.columns):
        return "a value is missing"
    if not pc.all(pc.match_substring_regex(keys, _KEY), min_count=0).as_py():
        return "a key is not 32 hexadecimal digits"
    if len(table) > 1 and not pc.all(pc.less(keys[:-1], keys[1:])).as_py():
        return "its keys are not sorted, or one is there twice"
    if not pc.all(pc.is_in(table["verdict"], _among(VERDICTS)), min_count=0).as_py():
        return f"a verdict is neither {' nor '.join(VERDICTS)}"
    return ""


def _among(values: Sequence[str]) -> pa.Array:
    return pa.array(list(values), pa.string())
