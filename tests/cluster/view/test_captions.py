"""Captions in the viewer: every layer with what a model wrote and threw away, and edits that become a layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import browser
import pytest
from browser import Press
from small_views import HOSTILE, Viewing, wait

from capstan.pipeline.pack.verify import verify
from capstan.pipeline.storage import Storage
from capstan.recaption import store


def kept(viewing: Viewing) -> list[dict[str, Any]]:
    return list(viewing.json("/api/rows?outcome=kept")["rows"])


def text_in(dataset: Path, layer: str, row: dict[str, Any], slot: str) -> str:
    return store.read_layer(Storage(str(dataset)), layer, row["shard"])[row["key"]][slot]


def test_a_row_has_all_that_its_layers_say(viewing: Viewing) -> None:
    captions = viewing.json(f"/api/row/{kept(viewing)[0]['key']}")["captions"]
    assert [(one["layer"], one["slot"]) for one in captions[:3]] == [
        ("people", "short"),
        ("model", "short"),
        ("model", "descriptive"),
    ]
    short = captions[1]
    assert (short["text"], short["raw"]) == ("a photo of blocks.", "a photo of blocks . ")
    assert (short["flags"], short["discarded"]) == (["opener"], [HOSTILE, "blocks blocks"])


def test_an_edit_is_a_layer_that_readers_understand_and_can_be_taken_back(viewing: Viewing, dataset: Path) -> None:
    first, second = kept(viewing)[:2]
    asked = {"key": first["key"], "layer": "model", "slot": "short", "text": "red blocks"}
    status, answer = viewing.post("/api/edit", asked)
    assert (status, answer["before"]) == (200, None)
    assert ("model-edited", "model", "red blocks") in [
        (one["layer"], one["over"], one["text"]) for one in answer["captions"]
    ]
    assert text_in(dataset, "model-edited", first, "short") == "red blocks"
    assert text_in(dataset, "model-edited", second, "short") == "a photo of blocks."
    assert text_in(dataset, "model", first, "short") == "a photo of blocks."
    assert viewing.post("/api/edit", asked | {"text": "blue blocks"})[1]["before"] == "red blocks"
    assert verify(Storage(str(dataset))) == []
    assert viewing.post("/api/edit", asked | {"text": None})[0] == 200
    assert text_in(dataset, "model-edited", first, "short") == "a photo of blocks."


@pytest.mark.parametrize(
    "wrong",
    [
        {"key": "0" * 32},
        {"key": "../x"},
        {"layer": "nothing"},
        {"layer": "../../review"},
        {"layer": "people-edited"},
        {"slot": "descriptiv"},
        {"text": "  "},
        {"text": 7},
        {"text": "x" * 10_001},
    ],
)
def test_what_is_no_edit_changes_nothing(viewing: Viewing, dataset: Path, wrong: dict[str, Any]) -> None:
    asked = {"key": kept(viewing)[0]["key"], "layer": "people", "slot": "short", "text": "red blocks"}
    assert viewing.post("/api/edit", asked | wrong)[0] == 400
    assert not (dataset / "captions/people-edited").exists()


CARD = "document.querySelector('[data-layer=\"{}\"][data-slot=short]')"


@pytest.mark.skipif(browser.find() is None, reason="needs Chromium")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_a_person_compares_and_edits_captions(viewing: Viewing, dataset: Path, width: int, dark: bool) -> None:
    binary, row = browser.find(), kept(viewing)[2 if dark else 1]
    assert binary is not None
    model, edited = CARD.format("model"), CARD.format("model-edited")
    with browser.start(binary) as chromium:
        answers = chromium.visit(
            f"{viewing.url}#key={row['key']}",
            wait("document.querySelectorAll('dialog[open] .layer-card').length === 4"),
            f"{model}.querySelector('.flags').textContent",
            f"{model}.querySelector('.raw summary').click(); {model}.querySelector('.raw').textContent",
            "const s = document.getElementById('compared'); s.value = 'model short';"
            "s.dispatchEvent(new Event('change'));"
            "[...document.querySelectorAll('[data-layer=people] mark')].map(m => m.textContent).join(' ')",
            f"{model}.querySelector('.edit').click(); document.activeElement.value",
            "document.activeElement.value = ''",
            Press("j"),  # is typed, and does not go to the next row
            f"{model}.querySelector('.buttons button').click()",
            wait(f"{edited} && {edited}.querySelector('.text')", f"{edited}.querySelector('.text').textContent"),
            f"{edited}.querySelector('.edit').click()",
            "document.activeElement.value = ' '",
            f"{edited}.querySelector('.buttons button').click()",
            wait("document.getElementById('message').textContent", "document.getElementById('message').textContent"),
            Press("Escape"),  # ends the edit only
            wait(f"{edited}.querySelector('.text') && document.querySelector('dialog[open]')"),
            f"[...{edited}.querySelectorAll('button')].find(b => b.textContent === 'Take back').click()",
            wait(f"!{edited}"),
            "[...document.querySelectorAll('#captions [role=status] button')].at(-1).click()",
            wait(edited, f"{edited}.querySelector('.text').textContent"),
            "document.documentElement.scrollWidth <= innerWidth && window.ran === undefined",
            width=width,
            dark=dark,
        ).answers
    told = [answer for answer in answers if answer is not None and answer != ""]
    assert told[:2] == [True, "opener"]
    assert "a photo of blocks" in told[2]
    assert "⟨U+202E⟩" in told[2]
    assert "⟨U+001B⟩[31m" in told[2]
    assert "person" in told[3]
    assert "a photo of blocks." in told
    assert "text: is empty. Fix: write a caption, or take the edit back" in told
    assert told[-2:] == ["j", True]
    assert text_in(dataset, "model-edited", row, "short") == "j"
