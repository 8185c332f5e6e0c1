"""A blend that is not the recipe's is reported."""

from __future__ import annotations

from capstan.training.monitoring.blend import blend_warning

RECIPE = {"descriptive": 0.95, "original": 0.05}


def test_a_shifted_blend_is_reported() -> None:
    warning = blend_warning({"original": 16}, RECIPE)
    assert "original 100% (recipe: 5%)" in warning
    assert "capstan recaption" in warning
    assert blend_warning({"original": 300, "descriptive": 700}, RECIPE)


def test_chance_and_few_samples_are_not() -> None:
    assert not blend_warning({}, RECIPE)
    assert not blend_warning({"original": 1}, RECIPE)
    assert not blend_warning({"original": 2, "descriptive": 14}, RECIPE)
    assert not blend_warning({"original": 61, "descriptive": 939}, RECIPE)
