"""Captions: true, regular and read back without loss; alt texts in the promised shares."""

from __future__ import annotations

import hashlib
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capstan.pipeline.world.captions import ALT_KINDS, alt, alt_kind, compare, descriptive, facts, short
from capstan.pipeline.world.scene import BACKGROUNDS, COLOURS, Scene, Thing, Vocabulary, draw_scene
from capstan.pipeline.world.translate import LANGUAGES, translate

SCENES = [draw_scene(5, index, Vocabulary()) for index in range(1000)]
PAIR = Scene(
    0,
    0,
    "beige",
    (
        Thing("red", "circle", "large", "plain", 0.3, 0.5, 0.24),
        Thing("orange", "star", "small", "striped", 0.8, 0.2, 0.15),
    ),
)


def test_wording_is_the_same_on_every_machine() -> None:
    words = "\n".join(f"{short(scene)}|{descriptive(scene)}|{alt(scene)}" for scene in SCENES[:200])
    assert hashlib.blake2b(words.encode(), digest_size=8).hexdigest() == "f24139f295533cff"


def test_descriptions_state_everything() -> None:
    assert short(PAIR) == "a red circle and an orange star"
    text = descriptive(PAIR)
    assert "a large red circle on the left and a small striped orange star at the top right." in text
    assert "beige background" in text
    assert "two things" in text
    assert text.endswith(("the red circle is left of the orange star.", "the orange star is right of the red circle."))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 10**8))
def test_a_description_read_back_gives_the_scene(seed: int, index: int) -> None:
    scene = draw_scene(seed, index, Vocabulary())
    text = descriptive(scene)
    assert 20 <= len(text.split()) <= 50
    assert text == text.lower()
    found = compare(facts(text), scene)
    assert all(value == 1 for name, value in found.items() if not (name == "relation" and len(scene.things) == 1))
    read = facts(short(scene))
    assert [(t.colour, t.shape) for t in read.things] == [(t.colour, t.shape) for t in scene.things]


def test_facts_survive_a_captioners_spelling() -> None:
    read = facts("On a BEIGE background there are two things : a large red circle on the left , and a blue square .")
    assert (read.background, read.count) == ("beige", 2)
    first, second = read.things
    assert (first.size, first.texture, first.colour, first.shape, first.place) == (
        "large",
        "plain",
        "red",
        "circle",
        "on the left",
    )
    assert (second.size, second.colour, second.place) == (None, "blue", None)


def test_wrong_captions_score_low() -> None:
    wrong = facts(
        "on a navy background there are three things: a small red square. the red circle is above the orange star."
    )
    found = compare(wrong, PAIR)
    assert (found["background"], found["count"], found["colours"], found["colour_shape"]) == (0, 0, 0.5, 0)
    assert found["relation"] == 0
    assert math.isnan(found["size"])
    assert compare(facts(""), PAIR)["colours"] == 0
    true_relation = compare(facts("the orange star is right of the red circle"), PAIR)
    assert true_relation["relation"] == 1
    assert true_relation["colour_shape"] == 0


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=80))
def test_facts_never_fail(text: str) -> None:
    assert all(math.isnan(value) or 0 <= value <= 1 for value in compare(facts(text), PAIR).values())


def test_the_careless_web_keeps_its_shares() -> None:
    kinds = Counter(alt_kind(scene) for scene in SCENES)
    assert sum(ALT_KINDS.values()) == pytest.approx(1)
    for kind, share in ALT_KINDS.items():
        assert kinds[kind] / len(SCENES) == pytest.approx(share, abs=0.04)


def test_each_kind_of_alt_text_is_what_it_is_called() -> None:
    for scene in SCENES[:400]:
        text, kind = alt(scene), alt_kind(scene)
        words = set(text.lower().split())
        if kind in ("fragment", "file_name", "spam"):
            assert not words & set(COLOURS)
        elif kind == "honest":
            assert text == short(scene)
        elif kind == "partial":
            assert compare(facts(text), scene)["colour_shape"] == 1 / len(scene.things)
        elif kind == "language":
            assert text in [translate(scene, language) for language in LANGUAGES]
        assert not any(f"{background} background" in text for background in BACKGROUNDS)


def test_a_copy_has_its_own_alt_text() -> None:
    assert any(alt(scene, row=scene.index + 1) != alt(scene) for scene in SCENES[:10])


def test_languages_agree_in_gender() -> None:
    assert translate(PAIR, "German") == "ein roter Kreis und ein orangefarbener Stern"
    assert translate(PAIR, "Spanish") == "un círculo rojo y una estrella naranja"
    assert translate(PAIR, "French") == "un cercle rouge et une étoile orange"
    with pytest.raises(ValueError, match="language"):
        translate(PAIR, "Klingon")
