"""A batch that raises is halved until the samples at fault are found; the others are done."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from capstan.pipeline.errors import StorageError
from capstan.pipeline.units.by_halves import by_halves, model_errors


def raising_on(*bad: int) -> Callable[[Sequence[int]], list[int]]:
    def compute(places: Sequence[int]) -> list[int]:
        if found := [place for place in places if place in bad]:
            raise ValueError(f"cannot take\n{found[0]}")
        return [place * 10 for place in places]

    return compute


@pytest.mark.parametrize("bad", [(), (0,), (6,), (2, 3), (0, 1, 2), (0, 2, 4, 6), (1, 2, 3, 4, 5, 6)])
def test_only_those_at_fault_are_flagged(bad: tuple[int, ...]) -> None:
    found, errors = by_halves(range(7), raising_on(*bad))
    assert {place: value for places, values in found for place, value in zip(places, values, strict=True)} == {
        place: place * 10 for place in range(7) if place not in bad
    }
    assert model_errors(errors) == {place: f"model_error: ValueError: cannot take {place}" for place in bad}


def test_a_model_that_raises_on_everything_is_at_fault_itself() -> None:
    with pytest.raises(ValueError, match="cannot take"):
        by_halves(range(4), raising_on(*range(4)))
    found, errors = by_halves([3], raising_on(3))
    assert (found, model_errors(errors)) == ([], {3: "model_error: ValueError: cannot take 3"})

    def storage_is_out(places: Sequence[int]) -> None:
        raise StorageError("dataset", "the bucket is away", "wait")

    with pytest.raises(StorageError):
        by_halves(range(4), storage_is_out)
