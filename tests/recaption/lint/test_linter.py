"""Cleaning undoes what tokenizers do to text; flags say what is wrong; nothing else is touched."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
import yaml

from capstan.pipeline.config import WorldSource, validate
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.world.captions import descriptive, short
from capstan.pipeline.world.scene import draw_scene, vocabulary
from capstan.recaption.lint import linter, rules
from capstan.recaption.lint.linter import Settings, clean


def flags(
    text: str, finish: linter.Finish = "end", language: str | None = "en", slot: str = "", prompt: str = ""
) -> set:
    return set(linter.lint(text, finish, Settings(language=language), slot=slot, prompt=prompt).flags)


@pytest.mark.parametrize("module", [linter, rules])
def test_examples_in_the_docstrings_hold(module: object) -> None:
    assert doctest.testmod(module).failed == 0  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("a dog .", "a dog."),
        ("  two   dogs , one ( brown ) and a cat !", "two dogs, one (brown) and a cat!"),
        ("a sign that says 1 0 % off", "a sign that says 10% off"),
        ("it 's the dog 's ball", "it's the dog's ball"),
        ("A Dog. No Change Of Case - or dashes", "A Dog. No Change Of Case - or dashes"),
        ("line\nbreak\x00 and\ttab", "line break and tab"),
        ("", ""),
    ],
)
def test_clean(raw: str, text: str) -> None:
    assert clean(raw, parted=True) == text
    assert clean(text, parted=True) == text


@pytest.mark.parametrize(
    "text",
    [
        "Bus number 12 34th street and 5 000 people at 10 30",
        "Un chien ! Et 50 % de ( presque ) tout : voilà .",
        "the '90s sofa of the dogs 's owner",
        "क्\u200dष और क्\u200cष, می\u200cخواهم, 👨\u200d👩\u200d👧",
    ],
)
def test_only_what_clips_tokenizer_wrote_is_changed(text: str) -> None:
    assert clean(text) == text
    assert linter.lint(text, "end").text == text
    assert clean(text.replace(" ", " \x00\n")) == text


def test_letters_are_not_parted_from_their_joiners() -> None:
    assert clean("می\u200cخواهم .", parted=True) == "می\u200cخواهم."


def test_what_people_wrote_stays_as_it_is() -> None:
    text = " Bonjour , le monde !\n\t5 000 "
    assert linter.lint(text, "given", Settings(language=None)).text == text
    assert linter.lint(" \n", "given").text == ""


@pytest.mark.parametrize(
    ("raw", "finish", "text", "found", "action"),
    [
        ("a red circle .", "end", "a red circle.", (), "note"),
        ("", "end", "", ("empty",), "original"),
        (" ... ", "end", "...", ("empty", "short"), "original"),
        (" ", "length", "", ("empty", "no_end"), "original"),
        ("circle", "end", "circle", ("short",), "retry"),
        ("a red circle on a", "end", "a red circle on a", ("unfinished",), "original"),
        ("a red circle,", "end", "a red circle,", ("unfinished",), "original"),
        ("a red circle on a blue", "length", "a red circle on a blue", ("no_end", "unfinished"), "original"),
        ("a circle . a star ! a", "length", "a circle. a star!", ("no_end",), "retry"),
        ("a sign that says 1 0 0 0 0 , 2 0 2 0", "end", "a sign that says 10000, 2020", (), "note"),
        ("a dog 2 2 2 2 2 2 on a sofa", "end", "a dog 222222 on a sofa", ("loop",), "original"),
        ("a dog . 2 2 2 2 2 2", "length", "a dog.", ("no_end",), "retry"),
        ("2 2 2 2 2 2 2 2", "end", "22222222", ("loop", "short"), "original"),
        ("a cat and a cat and a cat and it", "end", "a cat and a cat and a cat and it", ("loop",), "original"),
        ("word " * 3, "end", "word word word", ("loop",), "original"),
        (" ".join(map(str, range(1000, 1250))).replace("1", "x"), "end", None, ("long",), "retry"),
    ],
)
def test_lint(raw: str, finish: linter.Finish, text: str | None, found: tuple[str, ...], action: str) -> None:
    linted = linter.lint(raw, finish, parted=True)
    assert (linted.flags, linted.action) == (found, action)
    assert text is None or linted.text == text


def test_what_only_returns_is_no_loop() -> None:
    assert not flags("a red circle, a red star, a red square and a red cross")
    assert "loop" in flags("there is a red car. it is red. there is a red car. it is big. there is a red car.")


@pytest.mark.parametrize(
    ("text", "flag"),
    [
        ("I'm sorry, but I can't help with that request.", "refusal"),
        ("As an AI language model I do not see pictures.", "refusal"),
        ("No image was provided, so nothing can be said here.", "refusal"),
        ("Assistant: a dog runs over a meadow", "prompt"),
        ("<|im_start|>a dog runs over a meadow", "prompt"),
        ("Sure! A dog runs over a meadow", "prompt"),
        ("Here is a detailed caption of it: a dog on a meadow", "prompt"),
        ("The image shows a dog on a meadow.", "opener"),
        ("In this picture, a dog runs over a meadow.", "opener"),
        ("a photo of a dog that runs over a meadow", "opener"),
        ("arafed dog running over a meadow", "opener"),
        ("ein roter Kreis links von einem blauen Quadrat", "language"),
        ("un cercle rouge à gauche d'un carré bleu", "language"),
        ("un círculo rojo a la izquierda de una estrella azul", "language"),
        ("красный круг слева от синего квадрата", "language"),
        ("蓝色正方形左边的红色圆圈 on white", "language"),
    ],
)
def test_what_models_are_known_to_write(text: str, flag: str) -> None:
    assert flag in flags(text)


@pytest.mark.parametrize(
    "text",
    [
        "a man holds an image of a saint; the picture shows through",
        "a sign that says “Вход”, and below it two people with an umbrella",
        "the facade of the museo de la casa de los angeles, with a tree",
        "a helpful assistant at the counter of a shop, sorry for the delay",
        "A photographer takes a picture of a bride on the beach",
        "two captions: one above the door and one below it",
        "a white van, a red van, and a blue van in a parking lot",
        "links, links and links of a chain, met by a die and a pod",
        "a sign with the letter a",
    ],
)
def test_what_an_image_may_show_is_not_a_fault(text: str) -> None:
    assert not flags(text)


def test_descriptions_of_the_captioned_world_are_in_order() -> None:
    words = vocabulary(WorldSource())
    for number in range(200):
        scene = draw_scene(0, number, words)
        assert not flags(short(scene), slot="short"), short(scene)
        assert not flags(descriptive(scene), slot="descriptive"), descriptive(scene)


def test_the_prompt_is_recognised_in_the_answer() -> None:
    prompt = "Write one paragraph that tells what is in the picture, its colours and its background."
    said = "One paragraph that tells what is in the picture, its colours: a dog."
    assert "prompt" in flags(said, prompt=prompt)
    assert "prompt" not in flags(said)
    assert "prompt" not in flags("A dog is in the picture, its fur and its background are brown.", prompt=prompt)


def test_slots_have_their_own_lengths() -> None:
    assert flags("a red circle", slot="descriptive") == {"short"}
    assert not flags("a red circle", slot="short")
    wordy = "a red circle " + " ".join(f"beside number{n}" for n in range(30))
    assert flags(wordy, slot="short") == {"long"}
    assert not flags(wordy, slot="descriptive")


def test_another_language_may_be_asked_for() -> None:
    german = "ein roter Kreis links von einem blauen Quadrat"
    assert not flags(german, language="de")
    assert not flags(german, language=None)
    assert flags("a red circle is on the left of the square", language="de") == {"language"}
    assert flags("a red circle is on the left", language="ja") == {"language"}


def test_only_english_captions_end_with_the_last_words_of_english_ones() -> None:
    german = "ein mann auf einer bank sieht sich ein bild an"
    assert not flags(german, language="de")
    assert not flags(german, language=None)
    assert flags("a red circle on a", language="en") == {"unfinished"}
    assert flags("ein roter Kreis,", language="de") == {"unfinished"}


ZH, JA, TH = "一只棕色的狗睡在红色的沙发上", "赤いソファで眠る茶色い犬", "สุนัขสีน้ำตาลนอนอยู่บนโซฟาสีแดง"


@pytest.mark.parametrize(("language", "text"), [("zh", ZH), ("ja", JA), ("th", TH)])
def test_letters_are_counted_where_no_space_parts_words(language: str, text: str) -> None:
    for slot in ("short", "descriptive"):
        assert not flags(text, language=language, slot=slot)
        assert not flags(text, language=None, slot=slot)
    assert flags(text[:2], language=language) == {"short"}
    assert flags(text[:6], language=language, slot="descriptive") == {"short"}
    assert "long" in flags(text * 8, language=language, slot="short")


def test_full_width_sentences_end_without_a_space() -> None:
    linted = linter.lint("一只狗。它在睡觉。他说「你好。」蓝色的", "length", Settings(language="zh"))
    assert (linted.text, linted.flags) == ("一只狗。它在睡觉。他说「你好。」", ("no_end",))
    assert linter.sentences(linted.text) == ["一只狗。", "它在睡觉。", "他说「你好。」"]
    assert linter.sentences("एक कुत्ता। वह सोता है। 3.5 m") == ["एक कुत्ता।", "वह सोता है।", "3.5 m"]


def test_a_recipe_decides_what_is_done() -> None:
    text = "the image shows a dog"
    assert linter.lint(text, "end").action == "retry"
    assert linter.lint(text, "end", Settings(actions={"opener": "note"})).action == "note"
    assert linter.lint(text, "end", Settings(actions={"opener": "note"})).flags == ("opener",)
    for wrong, hint in (({"actions": {"openers": "note"}}, "opener"), ({"language": "xx"}, "en, de")):
        with pytest.raises(RecipeError, match=hint):
            validate(Settings, wrong, "recaption.lint")


def test_every_flag_has_a_reason_and_every_rule_can_apply() -> None:
    shown = {rule.name: rule for rule in rules.load().rules}
    assert all(len(reason) > 20 for reason in linter.reasons().values())
    assert linter.reasons().keys() == shown.keys() | {linter.UNREADABLE, linter.FAILED, linter.ORIGINAL}


def test_rules_are_part_of_the_identity_and_their_wording_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def identity(change: str, into: str) -> object:
        text = Path(rules.__file__).with_name(rules.FILE).read_text(encoding="utf-8")
        assert change in text
        made = rules.Rules.model_validate(yaml.safe_load(text.replace(change, into)))
        monkeypatch.setattr(linter, "load", lambda: made)
        linter.identity.cache_clear()
        return linter.identity()

    same = identity("rules:", "rules:")
    assert identity("There is nothing to train on.", "Nothing there.") == same
    assert identity("signs: 8", "signs: 9") != same
    assert identity("share: 0.2", "share: 0.3") != same
    linter.identity.cache_clear()
