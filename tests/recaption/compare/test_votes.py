"""Blind votes: what is voted on, on which side it stands, and what the votes say."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_dataset import as_if_a_model_wrote_it
from takedowns import scrub

from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import DamagedFile, RecipeError
from capstan.pipeline.records import make_key
from capstan.pipeline.storage import Storage
from capstan.recaption import store
from capstan.recaption.compare.votes import (
    FILE,
    a_is_left,
    ballots,
    changed,
    check_sides,
    read_votes,
    results,
    sides_of,
    voted,
    winner_of,
    write_votes,
)

KEY = [make_key(str(number)) for number in range(6)]
PAIR = ("mine:short", "original")


@pytest.fixture
def storage(build: Callable[..., Storage]) -> Storage:
    """Six images; a layer that says the same as the original of one and nothing of another."""
    storage = build([[0, 1, 2], [3, 4, 5]])
    texts = {key: {"short": f"a dog {number}"} for number, key in enumerate(KEY)}
    store.write_given_layer(storage, "mine", {**texts, KEY[1]: {"short": "alt 1"}, KEY[4]: {"other": "x"}})
    return storage


def test_images_on_which_the_sides_differ_are_voted_on(storage: Storage) -> None:
    assert sides_of(storage) == ["original", "mine:other", "mine:short"]
    assert check_sides(storage, "original", "mine:short") == PAIR
    found = list(ballots(Dataset(storage), PAIR))
    assert [one.key for one in found] == [KEY[0], KEY[2], KEY[3], KEY[5]]
    for one in found:
        number = KEY.index(one.key)
        assert {one.left, one.right} == {f"a dog {number}", f"alt {number}"}
        assert (one.left == f"a dog {number}") is a_is_left(PAIR, one.key)
    as_if_a_model_wrote_it(storage, "mine")
    storage.delete(store.file_name("mine", "shard-000000"))  # not captioned yet
    assert [one.key for one in ballots(Dataset(storage), PAIR)] == [KEY[3], KEY[5]]


@pytest.mark.parametrize("pair", [("original", "original"), ("original", "mine"), ("original", "mine:x"), ("", "")])
def test_sides_that_cannot_be_compared(storage: Storage, pair: tuple[str, str]) -> None:
    with pytest.raises(RecipeError, match="side"):
        check_sides(storage, *pair)


def test_either_side_is_as_often_on_the_left() -> None:
    left = sum(a_is_left(PAIR, make_key(str(number))) for number in range(1000))
    assert 430 < left < 570


@given(key=st.sampled_from(KEY), winner=st.sampled_from(["a", "b"]))
def test_the_winner_is_whoever_stood_there(key: str, winner: str) -> None:
    side = "left" if a_is_left(PAIR, key) is (winner == "a") else "right"
    assert winner_of(PAIR, key, side) == winner
    assert winner_of(PAIR, key, "tie") == "tie"
    with pytest.raises(RecipeError, match="choice"):
        winner_of(PAIR, key, winner)


def test_votes_are_changed_taken_back_and_counted(storage: Storage) -> None:
    table = read_votes(storage)
    for key, winner in zip(KEY, ["a", "a", "a", "b", "tie", "b"], strict=True):
        table = changed(table, PAIR, key, winner, "somebody")
    table = changed(table, ("mine:other", "original"), KEY[0], "b", "somebody")
    table = changed(table, PAIR, KEY[5], "", "somebody")
    table = changed(table, PAIR, KEY[0], "a", "somebody else")
    write_votes(storage, table)
    assert voted(read_votes(storage), PAIR) == set(KEY[:5])
    other, ours = results(read_votes(storage))
    assert (other["a_wins"], other["b_wins"]) == (0, 1)
    assert {name: ours[name] for name in ("a", "b", "a_wins", "b_wins", "ties", "rate")} == {
        "a": "mine:short",
        "b": "original",
        "a_wins": 3,
        "b_wins": 1,
        "ties": 1,
        "rate": 0.7,
    }
    assert ours["low"] < 0.5 < 0.7 < ours["high"] < 1  # five votes decide nothing


def test_a_takedown_removes_votes(storage: Storage) -> None:
    table = read_votes(storage)
    for key in KEY[:2]:
        table = changed(table, PAIR, key, "a", "somebody")
    write_votes(storage, table)
    scrub(storage, KEY[0])
    assert voted(read_votes(storage), PAIR) == {KEY[1]}


def test_a_file_that_holds_no_votes_is_named(storage: Storage) -> None:
    storage.write_table(FILE, storage.read_table("shards/shard-000000.parquet", ["key"]))
    with pytest.raises(DamagedFile, match="vote again"):
        read_votes(storage)
