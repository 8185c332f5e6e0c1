"""Intervals against closed forms, and how often they hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from capstan.training.experiment.intervals import Interval, difference, interval, student

NAN = math.nan


def crossed(chance: np.random.Generator, seeds: int, prompts: int, spread: tuple[float, float, float]) -> np.ndarray:
    """Values around 0 with these standard deviations of seeds, of prompts, and of each image."""
    by_seed, by_prompt, own = spread
    values = by_seed * chance.normal(size=(seeds, 1)) + by_prompt * chance.normal(size=(1, prompts))
    return np.asarray(values + own * chance.normal(size=(seeds, prompts)))


def test_many_prompts_of_one_seed_give_the_interval_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, (1, 400))
    found = interval(values, draws=4000)
    half = 1.966 * values.std(ddof=1) / math.sqrt(400)  # Student's t of 399
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.06 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.06 * half)


def test_three_seeds_that_alone_differ_give_students_interval_of_two_degrees() -> None:
    values = np.repeat([[1.0], [2.0], [4.0]], 200, axis=1)
    found = interval(values, draws=20_000)
    spread = np.std([1, 2, 4], ddof=1) / math.sqrt(3)
    # Means of two draws of three values are few, and lumpy: their percentiles are the extremes, 1 and 4.
    stretch = student(2) / 1.959964
    assert found.low == pytest.approx(7 / 3 - (7 / 3 - 1) * stretch)
    assert found.high == pytest.approx(7 / 3 + (4 - 7 / 3) * stretch)
    assert found.high - found.low >= 2 * student(2) * spread * 0.7


def test_differences_are_of_what_is_defined_for_both() -> None:
    """Of things that are there: an arm that draws only the easy ones is not the better for it."""
    easy_only, both = np.array([[1.0, NAN, 1.0, NAN]] * 3), np.array([[1.0, 0.0, 1.0, 0.0]] * 3)
    assert difference(easy_only, both).mean == 0
    assert interval(easy_only).mean - interval(both).mean == 0.5


@pytest.mark.parametrize("spread", [(0.0, 0.3, 0.3), (0.05, 0.3, 0.3), (0.3, 0.1, 0.1)])
def test_intervals_hold_the_truth_as_often_as_they_say(spread: tuple[float, float, float]) -> None:
    chance, trials = np.random.default_rng(1), 250
    held = 0
    for _ in range(trials):
        found = interval(crossed(chance, 3, 60, spread), draws=300)
        held += found.low <= 0 <= found.high
    assert held / trials >= 0.92
    assert held / trials <= 0.999 or spread[0] == 0.3  # few seeds: on the wide side


def test_what_prompts_have_in_common_goes_out_of_a_difference() -> None:
    chance = np.random.default_rng(2)
    prompts = chance.normal(size=(1, 200))
    a, b = (prompts + 0.05 * chance.normal(size=(3, 200)) + shift for shift in (0.1, 0.0))
    paired = difference(a, b)
    assert paired.mean == pytest.approx(0.1, abs=0.02)
    assert paired.excludes_zero
    assert paired.high - paired.low < 0.1 * (interval(a).high - interval(a).low)
    swapped = difference(b, a)
    assert (swapped.mean, swapped.low) == (pytest.approx(-paired.mean), pytest.approx(-paired.high, abs=0.01))


def test_differences_that_are_none_mostly_include_zero() -> None:
    chance, trials = np.random.default_rng(3), 200
    excluded = 0
    for _ in range(trials):
        prompts = 0.3 * chance.normal(size=(1, 50))
        a, b = (prompts + crossed(chance, 3, 50, (0.02, 0.0, 0.3)) for _ in range(2))
        excluded += difference(a, b, draws=300).excludes_zero
    assert excluded / trials <= 0.08


def test_undefined_values_are_left_out() -> None:
    values = np.array([[1.0, NAN, 3.0, NAN], [1.0, NAN, 5.0, 2.0]])
    found = interval(values, draws=200)
    assert found.mean == pytest.approx(12 / 5)
    assert found.low <= found.mean <= found.high
    nothing = interval(np.full((2, 3), NAN), draws=100)
    assert math.isnan(nothing.mean)
    assert nothing.facts() == [None, None, None]
    assert not nothing.excludes_zero


def test_the_same_values_give_the_same_interval() -> None:
    values = crossed(np.random.default_rng(4), 3, 30, (0.1, 0.3, 0.3))
    assert interval(values) == interval(values.copy())
    assert interval(np.full((3, 20), 0.5)) == Interval(0.5, 0.5, 0.5)
