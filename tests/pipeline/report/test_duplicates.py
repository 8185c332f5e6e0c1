"""Pairs of duplicates: chosen by distance, reason and verdict, and all of them at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pyarrow as pa
import pytest
from small_views import write_copies

from capstan.pipeline.errors import RecipeError
from capstan.pipeline.report import duplicates
from capstan.pipeline.report.duplicates import Chosen
from capstan.pipeline.report.explore import Explorer
from capstan.pipeline.report.query import Rows
from capstan.pipeline.select.pairs import SCHEMA, changed, pair
from capstan.pipeline.storage import Storage

NOBODY = SCHEMA.empty_table()


@pytest.fixture(scope="module")
def explorer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Explorer]:
    storage = Storage(write_copies(tmp_path_factory.mktemp("copies")).dataset)
    with Rows(storage) as rows:
        yield Explorer(rows)


def members(explorer: Explorer, judged: pa.Table, chosen: Chosen) -> dict[str, list[str]]:
    found, after = {}, ""
    while True:
        page, after = duplicates.groups(explorer, judged, chosen, after, limit=3)
        found |= {group.kept: [one.key for one in group.members] for group in page}
        if not after:
            return found


def test_pages_hold_every_pair_once(explorer: Explorer) -> None:
    found = members(explorer, NOBODY, Chosen())
    listed = [pair(kept, key) for kept, keys in found.items() for key in keys]
    assert sorted(listed) == sorted(duplicates.all_pairs(explorer, NOBODY, Chosen(), among_copies=False))
    assert len(set(listed)) == 12


def test_all_pairs_among_copies_are_those_of_each_group(explorer: Explorer) -> None:
    chosen = Chosen(low=7)
    wanted = {
        pair(*both)
        for kept, keys in members(explorer, NOBODY, chosen).items()
        for both in itertools.combinations([kept, *keys], 2)
    }
    assert set(duplicates.all_pairs(explorer, NOBODY, chosen, among_copies=True)) == wanted


def test_pairs_are_found_by_what_was_said_of_them(explorer: Explorer) -> None:
    every = duplicates.all_pairs(explorer, NOBODY, Chosen(), among_copies=False)
    judged = changed(NOBODY, {every[0]: "different", every[1]: "same"}, "somebody")
    left = duplicates.all_pairs(explorer, judged, Chosen(verdict="none"), among_copies=False)
    assert set(left) == set(every[2:])
    assert duplicates.all_pairs(explorer, judged, Chosen(verdict="same"), among_copies=False) == [every[1]]
    (group,), end = duplicates.remembered(explorer, judged)
    assert (group.kept, [one.key for one in group.members], end) == (every[0][0], [every[0][1]], "")
    assert sum(one["pairs"] for one in duplicates.counts(explorer, judged, "none")) == 10


def test_too_many_pairs_are_refused(explorer: Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "MOST_PAIRS", 20)
    assert len(duplicates.all_pairs(explorer, NOBODY, Chosen(), among_copies=False)) == 12
    with pytest.raises(RecipeError, match="more than 20"):
        duplicates.all_pairs(explorer, NOBODY, Chosen(), among_copies=True)


@pytest.mark.parametrize("asked", [{"reason": "x"}, {"verdict": "kept"}, {"low": "near"}, {"high": None}])
def test_what_cannot_be_chosen(asked: dict[str, str]) -> None:
    with pytest.raises(RecipeError, match="Fix"):
        Chosen.of(asked)
