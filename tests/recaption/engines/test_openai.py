"""The openai engine: against `transformers serve`, and against a server that does all that servers do wrong."""

from __future__ import annotations

import base64
import io
import json
import pickle
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import chat_server
import numpy as np
import pytest
import vision_models
from chat_server import ChatServer, completion, engine, jpeg
from PIL import Image

from capstan.pipeline.errors import RecipeError
from capstan.recaption.config import RecaptionConfig
from capstan.recaption.engines import CaptionEngine, Request, TextEngine, make, rate_limit

SLOTS = ("short", "descriptive")
REQUESTS = [Request(f"image {n}", SLOTS, f"text {n}") for n in range(6)]


IMAGES = [jpeg(n) for n in range(6)]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setattr(rate_limit, "FIRST_WAIT_S", 0.01)
    with chat_server.serving() as running:
        yield running


def test_what_is_asked(server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret-key")
    prompts = {"descriptive": "fuse: {original}"}
    extra = {"seed": None, "chat_template_kwargs": {"enable_thinking": False}}
    made = engine(
        server, limits={"key_env": "MY_KEY", "extra": extra}, system="be brief", prompts=prompts, max_tokens=7
    )
    assert isinstance(made, CaptionEngine)
    assert isinstance(made, TextEngine)
    assert made.uses_original
    made.caption(IMAGES[:1], [Request("a", ("descriptive",), "a  dog\n")])
    (body,), (headers,) = server.bodies, server.headers
    assert headers["Authorization"] == "Bearer secret-key"
    system, user = body.pop("messages")
    image, text = user["content"]
    assert system == {"role": "system", "content": "be brief"}
    assert text == {"type": "text", "text": "fuse: a dog"}
    prefix, _, encoded = image["image_url"]["url"].partition(",")
    assert (prefix, base64.b64decode(encoded)) == ("data:image/jpeg;base64", IMAGES[0])
    settings = {"model": "m", "max_tokens": 7, "temperature": 0.0, "top_p": 1.0}
    assert body == settings | {"chat_template_kwargs": {"enable_thinking": False}}
    kept = [json.dumps(made.describe()), pickle.dumps(made).decode("latin1")]
    assert not any("secret-key" in text for text in kept)


def test_the_same_for_every_order_and_concurrency(server: ChatServer) -> None:
    decoding = {"method": "top_p", "temperature": 0.7}
    expected = engine(server, decoding=decoding).caption(IMAGES, REQUESTS)
    assert len({caption.raw for captions in expected for caption in captions.values()}) == 12
    one = engine(server, limits={"concurrency": 1}, decoding=decoding)
    assert one.caption(IMAGES[::-1], REQUESTS[::-1])[::-1] == expected
    assert [one.caption([p], [r])[0] for p, r in zip(IMAGES, REQUESTS, strict=True)] == expected
    seeds = {caption.seed for captions in expected for caption in captions.values()}
    assert len(seeds) == 12
    assert max(seeds) < 2**31
    again = one.caption(IMAGES, REQUESTS, attempt=1)
    assert not seeds & {caption.seed for captions in again for caption in captions.values()}
    greedy = engine(server).caption(IMAGES, REQUESTS)
    assert {caption.seed for captions in greedy for caption in captions.values()} == {0}
    assert engine(server).caption(IMAGES, REQUESTS, attempt=1) != greedy


def test_no_more_requests_at_once_than_allowed(server: ChatServer) -> None:
    server.delay_s = 0.03
    engine(server, limits={"concurrency": 3}).caption(IMAGES, REQUESTS)
    assert server.most_running == 3
    assert len(server.bodies) == 12


@pytest.mark.parametrize("fault", [429, 500, 503, 0, "not json", "[]", '{"choices": []}'])
def test_what_heals_is_asked_again(server: ChatServer, fault: int | str) -> None:
    answer = (fault, {}, {}) if isinstance(fault, int) else (200, {}, fault)
    server.misbehave = lambda body, tries: answer if tries < 3 else None
    found = engine(server).caption(IMAGES[:2], REQUESTS[:2])
    assert {caption.finish for captions in found for caption in captions.values()} == {"end"}
    assert len(server.bodies) == 12


@pytest.mark.parametrize(
    ("answer", "reason", "asked"),
    [
        ((503, {}, {}), "http_503", 3),
        ((429, {}, {}), "http_429", 3),
        ((400, {}, {"error": "too long"}), "http_400", 1),
        ((0, {}, {}), "connect", 3),
        ((200, {}, "<html>"), "malformed", 3),
        ((200, {}, {**completion("x"), "usage": {"completion_tokens": "some"}}), "malformed", 3),
        ((200, {}, completion(None, "content_filter")), "content_filter", 1),
        ((200, {}, completion(None, "length")), "cut_before_text", 1),
        ((200, {}, completion("<think>a dog, or", "length")), "cut_before_text", 1),
        ((200, {}, completion(None)), "empty", 1),
    ],
)
def test_what_does_not_heal_is_a_caption_with_a_reason(
    server: ChatServer, answer: Any, reason: str, asked: int
) -> None:
    bad = base64.b64encode(IMAGES[1]).decode()
    server.misbehave = lambda body, tries: answer if bad in json.dumps(body) else None
    found = engine(server, limits={"retries": 2}, slots=["short"]).caption(IMAGES[:3], [Request("a", ("short",))] * 3)
    assert [captions["short"].finish for captions in found] == ["end", "none", "end"]
    assert [captions["short"].reason for captions in found] == ["", reason, ""]
    assert len(server.bodies) == asked + 2


def test_a_server_that_is_slow_or_not_there(server: ChatServer) -> None:
    server.delay_s = 0.5
    limits = {"timeout_s": 0.05, "retries": 1}
    caption = engine(server, limits=limits).caption(IMAGES[:1], REQUESTS[:1])[0]["short"]
    assert (caption.finish, caption.reason) == ("none", "timeout")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = ChatServer(url=f"http://127.0.0.1:{free.getsockname()[1]}/v1")
        with pytest.raises(RecipeError, match=r"recaption\.server\.url: .* cannot be reached"):
            engine(nowhere, limits=limits).caption(IMAGES[:1], REQUESTS[:1])


def test_what_a_server_refuses_from_the_start_ends_the_run(
    server: ChatServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    problem = "Unsupported parameter: 'max_tokens' (secret-key)"
    server.misbehave = lambda body, tries: (400, {}, {"error": problem}) if "max_tokens" in body else None
    with pytest.raises(RecipeError, match=r"recaption\.server: .*HTTP 400.*Unsupported parameter.*max_tokens: null"):
        engine(server).caption(IMAGES, REQUESTS)
    assert caplog.text.count("Unsupported parameter: 'max_tokens' (…)") == 1
    corrected = engine(server, limits={"extra": {"max_tokens": None}})
    assert all(caption.finish == "end" for found in corrected.caption(IMAGES, REQUESTS) for caption in found.values())


def test_images_that_a_server_refuses_do_not_end_the_run(server: ChatServer, caplog: pytest.LogCaptureFixture) -> None:
    """Also where there are no others, as in a run that asks again for what failed."""
    bad = [base64.b64encode(image).decode() for image in IMAGES]
    server.misbehave = lambda body, tries: (400, {}, "too small") if any(b in json.dumps(body) for b in bad) else None
    made = engine(server)
    for _ in range(2):
        found = made.caption(IMAGES, REQUESTS)
        assert {caption.reason for captions in found for caption in captions.values()} == {"http_400"}
    assert len(server.bodies) == 25  # one of them asks whether it is the images
    assert caplog.text.count("too small") == 1


def test_a_server_that_goes_away_later_does_not_end_the_run(server: ChatServer) -> None:
    made = engine(server, limits={"retries": 0})
    made.caption(IMAGES[:1], REQUESTS[:1])
    server.misbehave = lambda body, tries: (0, {}, {})
    assert made.caption(IMAGES[:1], REQUESTS[:1])[0]["short"].reason == "connect"


@pytest.mark.parametrize(("status", "field"), [(401, "key_env"), (403, "key_env"), (404, "model")])
def test_mistakes_end_the_run(server: ChatServer, status: int, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    server.misbehave = lambda body, tries: (status, {}, {"error": "wrong: secret-key"})
    with pytest.raises(RecipeError, match=f"{field}: .*HTTP {status}") as caught:
        engine(server).caption(IMAGES, REQUESTS)
    assert "secret-key" not in str(caught.value)


def test_finish_reasons_and_token_counts_are_the_servers(server: ChatServer) -> None:
    server.misbehave = lambda body, tries: (200, {}, completion(" cut off ", "length", 9))
    caption = engine(server).caption(IMAGES[:1], REQUESTS[:1])[0]["short"]
    assert (caption.raw, caption.tokens, caption.finish) == ("cut off", 9, "length")


@pytest.mark.parametrize(
    "finish",
    [
        *["stop", "eos_token", "eos", "stop_sequence", "end_turn", "STOP", "", None, "a word of tomorrow"],
        *["</s>", "tool_calls", "COMPLETE", 2, {"type": "stop", "matched": 2}, ["stop"], "unlimited"],
    ],
)
def test_text_with_any_finish_reason_is_a_caption(server: ChatServer, finish: Any) -> None:
    server.misbehave = lambda body, tries: (200, {}, completion("a brown dog", finish))
    caption = engine(server).caption(IMAGES[:1], REQUESTS[:1])[0]["short"]
    assert (caption.raw, caption.tokens, caption.finish, caption.reason) == ("a brown dog", 3, "end", "")


def test_a_text_that_stands_beside_its_message_is_a_caption(server: ChatServer) -> None:
    """As servers of the older completions API answer."""
    server.misbehave = lambda body, tries: (200, {}, {"choices": [{"text": "a brown dog", "finish_reason": "stop"}]})
    assert engine(server).caption(IMAGES[:1], REQUESTS[:1])[0]["short"].raw == "a brown dog"


def test_a_missing_finish_reason_is_an_end(server: ChatServer) -> None:
    answer = completion("a brown dog")
    del answer["choices"][0]["finish_reason"]
    server.misbehave = lambda body, tries: (200, {}, answer)
    assert engine(server).caption(IMAGES[:1], REQUESTS[:1])[0]["short"].finish == "end"


@pytest.mark.parametrize(
    ("finish", "flag"),
    [
        *[(word, "") for word in ("MAX_TOKENS", "max_tokens", "max_new_tokens", "MaxOutputTokens", "token-limit")],
        *[(word, "") for word in ("model_context_window_exceeded", "truncated", {"type": "length", "length": 30})],
        *[(word, "content_filter") for word in ("content_filter", "SAFETY", "IMAGE_PROHIBITED_CONTENT", "moderation")],
        *[(word, "content_filter") for word in ("content_policy_violation", "guardrail_intervened", "BLOCKED")],
    ],
)
def test_only_a_known_cut_flags_a_text(server: ChatServer, finish: Any, flag: str) -> None:
    server.misbehave = lambda body, tries: (200, {}, completion("a dog on a", finish))
    caption = engine(server).caption(IMAGES[:1], REQUESTS[:1])[0]["short"]
    assert (caption.raw, caption.finish, caption.reason) == ("a dog on a", "length", flag)


def test_half_a_character_does_not_reach_the_tables(server: ChatServer) -> None:
    """JSON may spell one of a pair of surrogates, which no UTF-8 and so no Parquet can hold."""
    server.misbehave = lambda body, tries: (200, {}, completion("a cat \ud83d", "stop", 9))
    caption = engine(server).caption(IMAGES[:1], REQUESTS[:1])[0]["short"]
    assert (caption.raw, caption.finish) == ("a cat ?", "end")


@pytest.mark.parametrize("header", ["seconds", "milliseconds", "date"])
def test_waits_as_long_as_the_server_says(server: ChatServer, header: str) -> None:
    """All requests wait, not only the one that was told to."""
    date = format_datetime(datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=2), usegmt=True)
    headers = {
        "seconds": {"Retry-After": "1"},
        "milliseconds": {"retry-after-ms": "800"},
        "date": {"Retry-After": date},
    }
    first: list[float] = []

    def once(body: Any, tries: int) -> Any:
        if first:
            return None
        first.append(time.monotonic())
        return 429, headers[header], {}

    server.misbehave = once
    engine(server, limits={"concurrency": 1}, slots=["short"]).caption(IMAGES[:3], [Request("a", ("short",))] * 3)
    waited = server.times[1] - first[0]
    assert 0.7 < waited < 4
    assert len(server.bodies) == 4


def test_keeps_to_requests_and_tokens_a_minute(server: ChatServer) -> None:
    """Evenly, and each of several workers to its share."""
    asked = [Request("a", ("short",))] * 6
    limits = {"requests_per_minute": 1200}  # 20 a second, 10 for each of two workers
    engine(server, workers=2, limits=limits, slots=["short"]).caption(IMAGES, asked)
    gaps = np.diff(server.times)
    assert gaps.min() > 0.05
    assert server.times[-1] - server.times[0] > 0.45
    server.times.clear()
    # About 1,300 tokens are expected of each until the server says that it were 50.
    made = engine(server, limits={"tokens_per_minute": 600_000, "concurrency": 1}, slots=["short"])
    made.caption(IMAGES, asked)
    assert server.times[-1] - server.times[0] < 0.4
    server.misbehave = lambda body, tries: (200, {}, completion("x", total=3000))
    server.times.clear()
    made.caption(IMAGES, asked)
    assert server.times[-1] - server.times[0] > 1.2  # 5 × 3,000 at 10,000 a second


def test_only_its_captions_are_part_of_a_layers_id(server: ChatServer) -> None:
    base = engine(server).describe()
    for same in (
        {"limits": {"url": "http://127.0.0.1:1/v1", "concurrency": 2, "retries": 0, "requests_per_minute": 3}},
        {"workers": 4},
        {"batch": 5},
    ):
        assert engine(server, **same).describe() == base, same
    for change in (
        {"limits": {"extra": {"top_k": 1}}},
        {"model": "n"},
        {"pretrained": "second training"},
        {"prompts": {"short": "x"}},
        {"system": "x"},
        {"max_tokens": 5},
        {"max_side": 64},
        {"decoding": {"method": "top_p"}},
    ):
        assert engine(server, **change).describe() != base, change


def test_images_travel_as_they_are_or_bounded(server: ChatServer) -> None:
    made = engine(server, max_side=64)
    assert made.prepare(IMAGES[0]) == IMAGES[0]
    with Image.open(io.BytesIO(made.prepare(jpeg(0, 200)))) as image:
        assert (image.size, image.format) == ((64, 64), "JPEG")
    with pytest.raises(OSError, match=r"(?i)truncated"):
        made.prepare(jpeg(0, 200)[:700])


def test_recipes_that_cannot_work(server: ChatServer) -> None:
    for wrong, problem in (({"decoding": {"method": "beam"}}, "beam"), ({"context": 80}, "context")):
        with pytest.raises(ValueError, match=problem):
            engine(server, **wrong)
    with pytest.raises(ValueError, match=r"server\.url"):
        RecaptionConfig(engine="openai")
    with pytest.raises(ValueError, match=r"localhost:8000/v1 does not start with http:// or https://"):
        engine(ChatServer(url="localhost:8000/v1"))


@pytest.mark.integration
def test_against_transformers_serve(tmp_path: Path) -> None:
    """A real server with a small model of random weights: what it writes is what the transformers engine writes."""
    folder = vision_models.llava(tmp_path / "llava")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    code = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", code, "serve", str(folder), *options]
    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            _until_ready(f"http://127.0.0.1:{port}/health", process, tmp_path / "log")
            made = engine(ChatServer(url=f"http://127.0.0.1:{port}/v1"), model=str(folder), max_tokens=6, max_side=None)
            found = made.caption(IMAGES[:3], REQUESTS[:3])
            text = made.write(["describe the red circle"], seeds=[1], max_tokens=4)[0]
        finally:
            process.terminate()
    section = {"engine": "transformers", "model": str(folder), "max_tokens": 6, "max_side": None}
    local = make(RecaptionConfig.model_validate(section))
    expected = local.caption([local.prepare(data) for data in IMAGES[:3]], REQUESTS[:3])
    assert [{slot: c.raw for slot, c in captions.items()} for captions in found] == [
        {slot: c.raw for slot, c in captions.items()} for captions in expected
    ]
    assert 0 < text.tokens <= 4


def _until_ready(address: str, process: subprocess.Popen[Any], log: Path) -> None:
    deadline = time.monotonic() + 300
    while True:
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                assert answer.status == 200
                return
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.3)
