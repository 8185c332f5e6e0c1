"""Blind votes in the viewer: what is shown tells no layer, and what is chosen is stored for the right one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import browser
import pytest
from browser import Press
from small_views import Viewing, wait

from capstan.pipeline.pack.verify import verify
from capstan.pipeline.storage import Storage
from capstan.recaption.compare.votes import FILE, read_votes

PAIR = {"a": "people:short", "b": "model:short"}
QUERY = "/api/ballot?a=people:short&b=model:short"


def stored(dataset: Path) -> list[dict[str, Any]]:
    return list(read_votes(Storage(str(dataset))).to_pylist())


def test_a_vote_counts_for_the_layer_that_stood_there(viewing: Viewing, dataset: Path) -> None:
    first = viewing.json(f"{QUERY}&again=1")
    assert set(first) == {"ballot", "votes"}
    assert set(first["ballot"]) == {"key", "left", "right"}
    assert "people" not in json.dumps(first) + first["ballot"]["key"]
    voted = []
    for _ in range(3):
        ballot = viewing.json(QUERY)["ballot"]
        voted.append(ballot["key"])
        side = "left" if ballot["left"].startswith("what a person wrote") else "right"
        status, answer = viewing.post("/api/vote", {**PAIR, "key": ballot["key"], "choice": side})
        assert (status, answer["votes"]) == (200, len(voted))
    assert len({first["ballot"]["key"], *voted}) == 4  # an image comes once
    (result,) = viewing.json("/api/votes")["results"]
    assert {name: result[name] for name in ("a", "b", "a_wins", "b_wins", "ties", "rate")} == {
        "a": "model:short",
        "b": "people:short",
        "a_wins": 0,
        "b_wins": 3,
        "ties": 0,
        "rate": 0,
    }
    assert 0.4 < result["high"] < 0.7
    assert {row["winner"] for row in stored(dataset)} == {"b"}
    assert all(row["who"] and row["when"] for row in stored(dataset))
    assert verify(Storage(str(dataset))) == []
    for key in voted:
        assert viewing.post("/api/vote", {**PAIR, "key": key, "choice": ""})[0] == 200
    assert stored(dataset) == []
    assert viewing.json(f"{QUERY}&again=1")["ballot"]["key"] == first["ballot"]["key"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"key": "0" * 32},
        {"choice": "a"},
        {"a": "model:short"},
        {"a": "nothing:short"},
        {"a": "people"},
        {"b": 7},
    ],
)
def test_what_is_no_vote_changes_nothing(viewing: Viewing, dataset: Path, wrong: dict[str, Any]) -> None:
    key = viewing.json("/api/rows?outcome=kept")["rows"][0]["key"]
    assert viewing.post("/api/vote", {**PAIR, "key": key, "choice": "left", **wrong})[0] == 400
    assert stored(dataset) == []


@pytest.mark.skipif(browser.find() is None, reason="needs Chromium")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_a_person_votes(viewing: Viewing, dataset: Path, width: int, dark: bool) -> None:
    binary, votes = browser.find(), "document.querySelector('.ballot [role=status]').textContent.startsWith('{} ')"
    assert binary is not None
    with browser.start(binary) as chromium:
        answers = chromium.visit(
            f"{viewing.url}#view=votes",
            wait("document.getElementById('side-b')"),
            "document.getElementById('side-a').value = 'people:short';"
            "document.getElementById('side-b').value = 'model:short';"
            "document.querySelector('.choices button').click()",
            wait("document.querySelectorAll('.options button').length === 2"),
            "document.querySelector('.ballot').textContent.includes('model:short')",
            Press("ArrowLeft"),
            wait(votes.format(1)),
            Press("ArrowDown"),
            wait(votes.format(2)),
            "document.querySelector('.options [value=right]').click()",
            wait(votes.format(3)),
            Press("s"),
            wait("document.querySelector('.options')"),
            Press("u"),
            wait(votes.format(2)),
            "document.querySelector('#results summary').click()",
            wait("document.querySelector('#results td')", "document.querySelector('#results tbody').textContent"),
            "document.documentElement.scrollWidth <= innerWidth && window.ran === undefined",
            Press("u"),
            wait(votes.format(1)),
            Press("u"),
            wait(votes.format(0)),
            width=width,
            dark=dark,
        ).answers
    told = [answer for answer in answers if answer is not None]
    assert "timeout" not in told
    assert told[2] is False
    (line,) = [answer for answer in told if isinstance(answer, str)]
    assert line.startswith("model:shortpeople:short")
    assert line.endswith("%")
    assert all(answer is True for answer in told if answer is not line and answer is not told[2])
    assert stored(dataset) == []
    assert (dataset / FILE).exists()
