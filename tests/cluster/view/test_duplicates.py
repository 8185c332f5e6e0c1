"""Duplicates in the viewer: groups by distance, verdicts on pairs, and what the next selection makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import pytest
from small_views import Viewing, build_here, wait, write_copies

from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.lease import lease
from capstan.pipeline.pack.verify import verify
from capstan.pipeline.select.pairs import pair, read_pairs
from capstan.pipeline.storage import Storage

KEY = "0" * 32


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return write_copies(tmp_path_factory.mktemp("view"))


@pytest.fixture(scope="module")
def viewing(recipe: Recipe) -> Iterator[Viewing]:
    with Viewing(Path(recipe.dataset)) as running:
        yield running


def verdicts(recipe: Recipe) -> dict[tuple[str, str], str]:
    return {(row["a"], row["b"]): row["verdict"] for row in read_pairs(Storage(recipe.dataset)).to_pylist()}


def groups(viewing: Viewing, query: str = "") -> dict[str, dict[str, int]]:
    """Kept key → key → distance, over all pages."""
    found, after = {}, ""
    while True:
        page = viewing.json(f"/api/duplicates?after={after}{query}")
        for one in page["groups"]:
            found[one["kept"]["key"]] = {member["key"]: member["distance"] for member in one["members"]}
        after = page["next"]
        if not after:
            return found


def test_groups_have_their_distances(viewing: Viewing) -> None:
    rows = {row["key"]: row["detail"] for row in viewing.json("/api/rows?outcome=duplicate")["rows"]}
    found = groups(viewing)
    assert {key: kept for kept, members in found.items() for key in members} == rows
    distances = sorted(distance for members in found.values() for distance in members.values())
    counts = viewing.json("/api/duplicates/counts")["counts"]
    assert sorted(one["distance"] for one in counts for _ in range(one["pairs"])) == distances
    assert all(list(members.values()) == sorted(members.values()) for members in found.values())
    far = groups(viewing, "&low=9&reason=perceptual")
    assert sorted(d for members in far.values() for d in members.values()) == [d for d in distances if d >= 9]
    assert groups(viewing, "&reason=exact") == {}


def test_a_verdict_is_remembered_and_undone(viewing: Viewing, recipe: Recipe) -> None:
    kept, members = next(iter(groups(viewing).items()))
    key = next(iter(members))
    status, answer = viewing.post("/api/duplicates", {"pairs": [[key, kept]], "verdict": "different"})
    assert (status, answer["judged"]) == (200, {"different": 1, "same": 0})
    assert verdicts(recipe) == {pair(kept, key): "different"}
    assert groups(viewing, "&verdict=different") == {min(kept, key): {max(kept, key): members[key]}}
    assert key not in groups(viewing, "&verdict=none").get(kept, {})
    assert verify(Storage(recipe.dataset)) == []
    assert viewing.post("/api/duplicates", {"pairs": [[kept, key]], "verdict": "same"})[0] == 200
    assert groups(viewing, "&verdict=same") == {kept: {key: members[key]}}
    assert viewing.post("/api/duplicates/undo", {})[1]["judged"] == {"different": 1, "same": 0}
    assert viewing.post("/api/duplicates/undo", {})[1]["judged"] == {"different": 0, "same": 0}
    assert viewing.post("/api/duplicates/undo", {})[1]["pairs"] == 0
    assert verdicts(recipe) == {}


def test_all_pairs_up_to_a_distance_are_marked_together(viewing: Viewing, recipe: Recipe) -> None:
    near = groups(viewing, "&high=8")
    answer = viewing.post("/api/duplicates", {"chosen": {"high": 8}, "verdict": "same"})[1]
    assert set(verdicts(recipe)) == {pair(kept, key) for kept, members in near.items() for key in members}
    assert answer["pairs"] == answer["judged"]["same"] == sum(map(len, near.values()))
    viewing.post("/api/duplicates/undo", {})


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/duplicates", {"pairs": [[KEY, "1" * 32]], "verdict": "different"}),  # no rows of the dataset
        ("/api/duplicates", {"pairs": [["x", "../y"]], "verdict": "different"}),
        ("/api/duplicates", {"pairs": "all", "verdict": "different"}),
        ("/api/duplicates", {"chosen": {"low": "x"}, "verdict": "different"}),
        ("/api/duplicates", {"chosen": {"reason": "') OR true --"}, "verdict": "different"}),
        ("/api/duplicates", {"chosen": {}, "verdict": "kept"}),
        ("/api/duplicates", []),
    ],
)
def test_what_is_no_verdict_changes_nothing(viewing: Viewing, recipe: Recipe, path: str, body: Any) -> None:
    before = verdicts(recipe)
    assert viewing.post(path, body)[0] == 400
    assert verdicts(recipe) == before


def test_a_row_is_not_a_pair_with_itself(viewing: Viewing) -> None:
    key = viewing.json("/api/rows")["rows"][0]["key"]
    assert viewing.post("/api/duplicates", {"pairs": [[key, key]], "verdict": "same"})[0] == 400


def test_the_next_selection_keeps_what_is_different(tmp_path: Path) -> None:
    recipe = write_copies(tmp_path)
    storage = Storage(recipe.dataset)
    before = Dataset(storage).manifest.counts["kept"]
    with Viewing(Path(recipe.dataset)) as running:
        far = groups(running, "&low=9")
        with lease(storage, "build"):
            assert running.post("/api/duplicates", {"chosen": {"low": 9}, "verdict": "different"})[0] == 409
        assert running.post("/api/duplicates", {"chosen": {"low": 9}, "verdict": "different"})[0] == 200
    build_here(recipe)
    assert verify(storage) == []
    ledger = {row["key"]: row for row in Dataset(storage).ledger(["key", "outcome", "detail"]).to_pylist()}
    marked = {frozenset(both) for both in verdicts(recipe)}
    for kept, members in far.items():
        assert ledger[kept]["outcome"] == "kept"
        for key in members:
            assert frozenset((key, ledger[key]["detail"])) not in marked
            assert ledger[key]["detail"] not in (kept, *members)
    assert Dataset(storage).manifest.counts["kept"] > before
    build_here(recipe)  # the same again: nothing is decided anew
    assert {row["key"]: row for row in Dataset(storage).ledger(["key", "outcome", "detail"]).to_pylist()} == ledger


@pytest.mark.skipif(browser.find() is None, reason="needs Chromium")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_a_person_judges_pairs(viewing: Viewing, recipe: Recipe, width: int, dark: bool) -> None:
    binary, far = browser.find(), groups(viewing, "&low=9")
    assert binary is not None
    several = "[...document.querySelectorAll('.group')].find(g => g.querySelectorAll('li').length > 2)"
    bulk = "document.querySelector('#bulk [value=different]')"
    with browser.start(binary) as chromium:
        answers = chromium.visit(
            f"{viewing.url}#view=duplicates",
            wait("document.querySelectorAll('.group').length === 4", "document.querySelectorAll('.group li').length"),
            "document.querySelector('.group .distance').textContent",
            "document.querySelector('.group [value=same]').click()",
            wait("document.querySelector('.group [value=same]').getAttribute('aria-pressed') === 'true'"),
            "document.querySelector('.group [value=same]').click()",
            wait("document.querySelector('.group [value=same]').getAttribute('aria-pressed') === 'false'"),
            f"{several}.querySelector(':scope > .buttons button').click()",
            wait(f"{several}.querySelectorAll('[data-verdict=different]').length > 1"),
            "document.querySelector('[data-undo]').click()",
            wait("document.querySelectorAll('[data-verdict=different]').length === 0"),
            "const s = document.querySelector('.distances select'); s.value = '>=';"
            "s.dispatchEvent(new Event('change'));"
            "const r = document.querySelector('.distances input'); r.value = 9; r.dispatchEvent(new Event('input'));"
            "document.querySelector('.distances output').textContent",
            wait(f"{bulk} && {bulk}.parentNode.textContent.includes('Mark all 5 pairs')"),
            f"{bulk}.click()",
            wait("document.querySelector('#groups').textContent.includes('No such pairs')"),
            "document.querySelector('#view [role=status]').textContent",
            "location.hash",
            "const v = document.getElementById('pair-verdict'); v.value = 'different';"
            "v.dispatchEvent(new Event('change'))",
            wait("document.querySelectorAll('[data-verdict=different]').length > 4"),
            "document.querySelector('[data-undo]').click()",
            wait("document.querySelector('#groups').textContent.includes('No such pairs')"),
            "document.documentElement.scrollWidth <= innerWidth && window.ran === undefined",
            width=width,
            dark=dark,
        ).answers
    told = [answer for answer in answers if answer is not None]
    assert told[:2] == [16, "kept"]
    assert "timeout" not in told
    assert "9 bits: 5 pairs" in told
    assert sum(map(len, far.values())) == 5
    assert any("marked as not duplicates" in str(one) for one in told)
    assert any("view=duplicates" in str(one) and "pairs=" in str(one) for one in told)
    assert told[-1] is True
    assert verdicts(recipe) == {}
