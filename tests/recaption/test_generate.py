"""What is wrong is drawn again, a bounded number of times; what is best is kept; nothing that was written is lost."""

from __future__ import annotations

from typing import Any

import pytest
from scripted_engine import ScriptedEngine, said

from capstan.pipeline.errors import RecipeError
from capstan.recaption.engines import Caption, Request
from capstan.recaption.generate import write
from capstan.recaption.lint.linter import Settings
from capstan.recaption.store import Row

LOOP, CUT, FINE = "a dog a dog a dog a dog", "a dog sits. it", "a dog sits on a mat"


def row_of(*raws: str, finish: Any = "end", retries: int = 2, slots: tuple[str, ...] = ("short",)) -> tuple[Row, int]:
    """The row of an image for which the engine writes these in turn, and how often the engine was asked."""
    engine = ScriptedEngine(lambda request, slot, attempt: Caption(raws[attempt], 3, finish, attempt))
    (rows,) = write(engine, [b""], [Request("aa", slots)], Settings(retries=retries), {})
    return rows["short"], len(engine.asked)


def test_a_good_caption_is_asked_for_once() -> None:
    row, asked = row_of(FINE)
    assert (row.text, row.flags, row.discarded, row.seed, asked) == (FINE, (), (), 0, 1)


def test_a_bad_caption_is_drawn_again_until_one_is_good() -> None:
    row, asked = row_of(LOOP, FINE)
    assert (row.text, row.flags, row.discarded, row.seed, asked) == (FINE, (), (LOOP,), 1, 2)


def test_tries_are_bounded_and_then_the_original_stands_in() -> None:
    row, asked = row_of(LOOP, LOOP + " a", "", retries=2)
    assert asked == 3
    assert row.flags == ("loop", "original")
    assert (row.raw, row.discarded) == (LOOP, (LOOP + " a", ""))
    assert row.with_original("what came with it").text == "what came with it"


def test_without_retries_it_is_flagged_at_once() -> None:
    row, asked = row_of(LOOP, retries=0)
    assert (row.flags, asked) == (("loop", "original"), 1)


def test_the_least_bad_is_kept_and_of_equals_the_first() -> None:
    opener = "the image shows a dog on a mat"
    row, _ = row_of(LOOP, opener, "this image depicts a cat on a mat")
    assert (row.text, row.flags) == (opener, ("opener",))
    assert row.discarded == (LOOP, "this image depicts a cat on a mat")
    assert row.with_original("what came with it").text == opener


def test_what_stands_before_the_cut_is_kept() -> None:
    row, asked = row_of(CUT, CUT, CUT, finish="length")
    assert (row.text, row.raw, row.flags, asked) == ("a dog sits.", CUT, ("no_end",), 3)


def test_only_the_slots_that_are_bad_are_asked_again() -> None:
    engine = ScriptedEngine(lambda r, slot, attempt: said(LOOP if slot == "short" and not attempt else FINE, attempt))
    requests = [Request(name, ("short", "descriptive"), "alt") for name in ("aa", "bb")]
    rows = write(engine, [b"", b""], requests, Settings(), {})
    assert [(request.sha256, request.slots, request.original, attempt) for request, attempt in engine.asked] == [
        ("aa", ("short", "descriptive"), "alt", 0),
        ("bb", ("short", "descriptive"), "alt", 0),
        ("aa", ("short",), "alt", 1),
        ("bb", ("short",), "alt", 1),
    ]
    assert all(list(slots) == ["short", "descriptive"] for slots in rows)
    assert rows[0]["short"].discarded == (LOOP,)
    assert rows[0]["descriptive"].discarded == ()


def test_an_engine_that_gives_nothing_is_not_asked_again_in_this_run() -> None:
    engine = ScriptedEngine(lambda *_: Caption("", 0, "none", 0, "http_503"))
    (rows,) = write(engine, [b""], [Request("aa", ("short",))], Settings(), {})
    assert (rows["short"].flags, rows["short"].text, len(engine.asked)) == (("failed", "http_503"), "", 1)


def test_an_engine_that_fails_at_the_second_try_loses_nothing() -> None:
    none = Caption("", 0, "none", 0, "timeout")
    engine = ScriptedEngine(lambda r, slot, attempt: none if attempt else said("the image shows a dog"))
    (rows,) = write(engine, [b""], [Request("aa", ("short",))], Settings(), {})
    assert (rows["short"].text, rows["short"].flags) == ("the image shows a dog", ("opener",))


def test_a_prompt_in_the_answer_is_found() -> None:
    prompt = "Describe briefly the main subject of this image for a catalogue."
    engine = ScriptedEngine(lambda *_: said("the main subject of this image for a catalogue"))
    (rows,) = write(engine, [b""], [Request("aa", ("short",))], Settings(retries=0), {"short": prompt})
    assert "prompt" in rows["short"].flags


def test_spaces_are_taken_away_where_clips_tokenizer_set_them() -> None:
    raw = "2 0 dogs , on a mat"
    engine = ScriptedEngine(lambda r, slot, attempt: Caption(raw, 3, "end", 0, parted=slot == "short"))
    (rows,) = write(engine, [b""], [Request("aa", ("short", "other"))], Settings(), {})
    assert [(row.raw, row.text) for row in rows.values()] == [(raw, "20 dogs, on a mat"), (raw, raw)]


@pytest.mark.parametrize("together", [1, 3])
def test_rows_do_not_depend_on_the_batch(together: int) -> None:
    engine = ScriptedEngine(lambda r, slot, attempt: said(LOOP if r.sha256 == "aa" and not attempt else FINE, attempt))
    requests = [Request(name, ("short",)) for name in ("aa", "bb", "cc")]
    rows = [
        row
        for start in range(0, 3, together)
        for row in write(engine, [b""] * together, requests[start : start + together], Settings(), {})
    ]
    assert [row["short"].seed for row in rows] == [1, 0, 0]


def raising(*bad: str) -> ScriptedEngine:
    def say(request: Request, slot: str, attempt: int) -> Caption:
        if request.sha256 in bad:
            raise ValueError("absolute aspect ratio must be smaller than 200")
        return said(FINE)

    return ScriptedEngine(say)


@pytest.mark.parametrize("bad", [{"0"}, {"5"}, {"10"}, {"3", "4"}, {"0", "10"}, {str(n) for n in range(10)}])
def test_an_image_on_which_the_engine_raises_is_flagged_and_the_others_are_captioned(bad: set[str]) -> None:
    requests = [Request(str(n), ("short", "descriptive")) for n in range(11)]
    rows = write(raising(*bad), [b""] * 11, requests, Settings(), {})
    for request, slots in zip(requests, rows, strict=True):
        for row in slots.values():
            assert row.flags == (("engine_error", "failed") if request.sha256 in bad else ())
            assert row.raw == (FINE if request.sha256 not in bad else row.raw)
            assert ("aspect ratio" in row.raw) == (request.sha256 in bad)


def test_one_image_alone_is_flagged_too() -> None:
    (rows,) = write(raising("0"), [b""], [Request("0", ("short",))], Settings(), {})
    assert rows["short"].flags == ("engine_error", "failed")


def test_an_engine_that_raises_on_every_image_fails_the_unit() -> None:
    requests = [Request(str(n), ("short",)) for n in range(5)]
    with pytest.raises(ValueError, match="aspect ratio"):
        write(raising(*"01234"), [b""] * 5, requests, Settings(), {})


def test_what_the_user_must_fix_is_not_an_images_fault() -> None:
    def say(request: Request, slot: str, attempt: int) -> Caption:
        raise RecipeError("recaption.model", "x", "y")

    engine = ScriptedEngine(say)
    with pytest.raises(RecipeError):
        write(engine, [b""] * 5, [Request(str(n), ("short",)) for n in range(5)], Settings(), {})
    assert len(engine.asked) == 5
