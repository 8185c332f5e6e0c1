"""Sections of the floors above: parsed once, typed, and no part of a recipe's value."""

import pickle

import pytest

from capstan.pipeline.config import Recipe
from capstan.pipeline.errors import RecipeError

RECIPE = Recipe.model_validate({"dataset": "x", "train": {"model": "diffusion", "steps": 3}})


def test_a_section_is_parsed_once() -> None:
    recipe, seen = RECIPE.model_copy(), list[object]()

    def parse(raw: dict[str, object]) -> int:
        seen.append(raw)
        return int(str(raw["steps"]))

    assert [recipe.section("train", parse, "x") for _ in range(3)] == [3, 3, 3]
    assert seen == [RECIPE.train]


def test_a_changed_section_is_parsed_again() -> None:
    first = RECIPE.section("train", lambda raw: raw["steps"], "x")
    changed = RECIPE.model_copy(update={"train": {"steps": 5}})
    assert (first, changed.section("train", lambda raw: raw["steps"], "x")) == (3, 5)
    assert RECIPE.section("train", lambda raw: raw["steps"], "x") == 3


def test_what_was_parsed_is_no_part_of_the_recipe() -> None:
    parsed, plain = RECIPE.model_copy(), Recipe.model_validate(RECIPE.model_dump())
    parsed.section("train", lambda _: object(), "x")
    assert parsed == plain
    assert parsed.model_dump() == plain.model_dump()
    assert pickle.loads(pickle.dumps(parsed)) == plain


def test_a_mistake_is_not_kept() -> None:
    def fails(_: dict[str, object]) -> None:
        raise RecipeError("train.steps", "is wrong", "correct it")

    recipe = RECIPE.model_copy(update={"train": {"steps": 4}})
    with pytest.raises(RecipeError, match="is wrong"):
        recipe.section("train", fails, "x")
    assert recipe.section("train", lambda raw: raw["steps"], "x") == 4


def test_a_missing_section_says_what_to_add() -> None:
    with pytest.raises(RecipeError, match=r"recaption: is missing. Fix: add it"):
        RECIPE.section("recaption", dict, "add it")
