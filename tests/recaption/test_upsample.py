"""Short prompts are expanded into the style of the captions that a model was trained on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chat_server
import pytest
from chat_server import ChatServer, completion

from capstan.pipeline.errors import CapstanError, RecipeError
from capstan.recaption.config import RecaptionConfig
from capstan.recaption.upsample import PAPER, Style, expand, instruct, text_engine

CAPTIONS = [f"a {'very ' * n}red circle on grey." for n in range(11)]  # 5 to 15 words and so on
STYLE = Style(words=(4, 6, 10), examples=("a red circle on grey.",))


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with chat_server.serving() as running:
        yield running


def config(server: ChatServer) -> RecaptionConfig:
    return RecaptionConfig.model_validate({"engine": "openai", "model": "m", "server": {"url": server.url}})


def asked(body: dict[str, Any]) -> str:
    return str(body["messages"][0]["content"][0]["text"])


def test_a_style_is_measured_on_captions() -> None:
    style = Style.of(CAPTIONS)
    assert style.words == (6, 10, 14)
    assert style.lower_case
    assert style.full_stop
    assert [len(text.split()) for text in style.examples] == [7, 10, 12]
    assert set(style.examples) <= set(CAPTIONS)
    other = Style.of(["A dog", "A cat", "  "])
    assert (other.lower_case, other.full_stop, other.words) == (False, False, (2, 2, 2))
    assert Style.read(json.loads(json.dumps(style.facts()))) == style
    assert Style.of([]) == PAPER
    assert PAPER.words[::2] == (15, 80)


def test_the_engine_is_told_prompt_bounds_and_style(server: ChatServer) -> None:
    server.misbehave = lambda body, tries: (200, {}, completion('"a dog that runs in a park"'))
    assert expand(text_engine(config(server)), ["a\ndog"], STYLE) == ["a dog that runs in a park"]
    (body,) = server.bodies
    assert asked(body) == instruct("a dog", STYLE)
    for part in ("Request: a dog", "between 4 and 10 words", "- a red circle on grey."):
        assert part in asked(body)
    assert body["temperature"] > 0  # drawn, so that another try is another text
    assert body["max_tokens"] == 20


def test_the_same_seed_gives_the_same_text_in_any_batch(server: ChatServer) -> None:
    engine, style = text_engine(config(server)), Style(words=(1, 2, 3))
    together = expand(engine, ["a dog", "a cat", "a cow"], style)
    assert len(set(together)) == 3
    assert expand(engine, ["a cow"], style) == together[2:]
    assert expand(engine, ["a cow"], style, seed=1) != together[2:]


def test_a_text_of_another_length_is_written_again_with_another_seed(
    server: ChatServer, caplog: pytest.LogCaptureFixture
) -> None:
    lengths = iter([1, 100, 6, 1, 1, 1])
    server.misbehave = lambda body, tries: (200, {}, completion(" ".join(["word"] * next(lengths))))
    engine = text_engine(config(server))
    assert expand(engine, ["a dog"], STYLE) == [" ".join(["word"] * 6)]
    assert len({body["seed"] for body in server.bodies}) == 3
    assert not caplog.records
    assert expand(engine, ["a dog"], STYLE) == ["word"]  # three tries, and the user hears of it
    assert "captions have 4 to 10" in caplog.text


def test_no_text_is_an_error_that_says_why(server: ChatServer) -> None:
    server.misbehave = lambda body, tries: (200, {}, completion("", "content_filter"))
    with pytest.raises(CapstanError, match="content_filter"):
        expand(text_engine(config(server)), ["a dog"], STYLE)


def test_an_engine_that_cannot_be_told_anything_is_refused(captioner: Path) -> None:
    with pytest.raises(RecipeError, match="use engine transformers or openai"):
        text_engine(RecaptionConfig(model=str(captioner)))
