"""A batch on which a model raises → the samples that are at fault, and the results of all others"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from capstan.pipeline.errors import CapstanError
from capstan.pipeline.records import storable

Result = TypeVar("Result")

_SHOWN = 300  # characters of an error


def by_halves(
    places: Sequence[int], compute: Callable[[Sequence[int]], Result]
) -> tuple[list[tuple[list[int], Result]], dict[int, Exception]]:
    """Return [(places, their result)] and place → error of those that `compute` raises on.

    A batch that raises is halved until the places at fault are found. Raises the error if every one of several places
    raises: then the model is at fault. Errors of the recipe, a server or the storage (CapstanError) are raised, too.
    """
    found, errors = _halved(list(places), compute)
    if len(errors) == len(places) > 1:
        raise next(iter(errors.values()))
    return found, errors


def _halved(
    places: list[int], compute: Callable[[Sequence[int]], Result]
) -> tuple[list[tuple[list[int], Result]], dict[int, Exception]]:
    try:
        return [(places, compute(places))], {}
    except CapstanError:
        raise
    except Exception as error:  # noqa: BLE001 - sample boundary: models raise errors of every kind
        if len(places) == 1:
            return [], {places[0]: error}
    middle = len(places) // 2
    (first, errors), (second, others) = _halved(places[:middle], compute), _halved(places[middle:], compute)
    return first + second, errors | others


def shown(error: Exception) -> str:
    """Return an error's type and message as one line that a table can hold."""
    return storable(" ".join(f"{type(error).__name__}: {error}".split())[:_SHOWN])


def model_errors(errors: dict[int, Exception]) -> dict[int, str]:
    """Return place → reason of samples on which a model raised."""
    return {place: f"model_error: {shown(error)}" for place, error in errors.items()}
