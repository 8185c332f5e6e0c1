"""One image's refusal is that image's; what fails for every image stops the requests. Against a real server."""

from __future__ import annotations

import base64
import gzip
import json
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import chat_server
import pytest
from chat_server import ChatServer, completion, engine, jpeg
from in_process import run_here

from capstan.cluster.cli import run
from capstan.pipeline import units
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage import Storage
from capstan.recaption import store
from capstan.recaption.engines import Request, rate_limit
from capstan.recaption.engines.exchange import MAX_ANSWER_BYTES

IMAGES = [jpeg(number) for number in range(6)]
MANY = [jpeg(number) for number in range(40)]
REQUESTS = [Request(f"image {n}", ("short",), "") for n in range(40)]
QUOTA = {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setattr(rate_limit, "FIRST_WAIT_S", 0.001)
    with chat_server.serving() as running:
        yield running


def shows(body: Any, data: bytes) -> bool:
    return base64.b64encode(data).decode() in json.dumps(body)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 422])
@pytest.mark.parametrize("place", [0, 3])
def test_one_images_refusal_is_that_images(server: ChatServer, status: int, place: int) -> None:
    answer = (status, {}, {"error": {"message": "flagged by moderation"}})
    server.misbehave = lambda body, tries: answer if shows(body, IMAGES[place]) else None
    made = engine(server, limits={"concurrency": 1}, slots=["short"])
    captions = [found["short"] for found in made.caption(IMAGES, REQUESTS[:6])]
    assert [caption.finish for caption in captions] == ["none" if n == place else "end" for n in range(6)]
    assert (captions[place].reason, captions[place].message) == (f"http_{status}", "flagged by moderation")
    assert not made.stopped
    assert len(server.bodies) <= 7


@pytest.mark.parametrize(
    ("answer", "field", "words"),
    [
        ({"error": {"message": "no such key", "code": 401}}, "recaption.server.key_env", "HTTP 401: no such key"),
        ({"error": {"message": "no such model", "code": "404"}}, "recaption.model", "HTTP 404: no such model"),
        ({"error": "overloaded"}, "recaption.server", "HTTP 500: overloaded"),
        (QUOTA, "recaption.server.key_env", "quota"),
        ({"choices": [{"error": {"message": "bad image", "code": 400}}]}, "recaption.server", "bad image"),
        (completion(None, "length"), "recaption.max_tokens", "reasoning.*enable_thinking"),
        (completion("<think>a dog or", "length"), "recaption.max_tokens", "reasoning"),
        (completion(None, "content_filter"), "recaption.server", "content_filter"),
        ("<html>", "recaption.server", "malformed"),
        (
            {"object": "error", "message": "no such adapter", "code": 40},
            "recaption.server",
            "HTTP 500: no such adapter",
        ),
        ({"detail": "model is loading"}, "recaption.server", "HTTP 500: model is loading"),
        ({"detail": [{"msg": "bad field", "type": "value"}]}, "recaption.server", "HTTP 500: bad field"),
        ({"errors": [{"message": "token expired", "code": 401}]}, "recaption.server.key_env", "token expired"),
        ({"message": "who are you", "statusCode": 401}, "recaption.server.key_env", "who are you"),
        (
            {"choices": [], "error": {"status": "UNAUTHENTICATED", "code": "401"}},
            "recaption.server.key_env",
            "HTTP 401",
        ),
    ],
)
def test_what_fails_for_every_image_stops_the_run_early(
    server: ChatServer, answer: Any, field: str, words: str
) -> None:
    """With the server's words, in answers of status 200 too."""
    server.misbehave = lambda body, tries: (200, {}, answer)
    limits = {"concurrency": 4, "retries": 1}
    with pytest.raises(RecipeError, match=f"(?s){words}") as caught:
        engine(server, limits=limits, slots=["short"]).caption(MANY, REQUESTS)
    assert caught.value.field == field
    assert len(server.bodies) < 2 * 25


@pytest.mark.parametrize(
    ("answer", "most"),
    [((429, {}, QUOTA), 5), ((402, {}, {}), 5), ((401, {}, {}), 5), ((200, {}, QUOTA), 5), ((503, {}, {}), 48)],
)
def test_what_fails_for_every_image_in_the_middle_stops_the_requests(
    server: ChatServer, answer: Any, most: int, caplog: pytest.LogCaptureFixture
) -> None:
    """What was captioned is kept; of the rest nothing is sent."""
    good = []

    def ten(body: Any, tries: int) -> Any:
        if len(good) == 10:
            return answer
        good.append(body)
        return None

    server.misbehave = ten
    made = engine(server, limits={"concurrency": 4, "retries": 1}, slots=["short"])
    captions = [found["short"] for found in made.caption(MANY, REQUESTS)]
    assert sum(caption.finish == "end" for caption in captions) == 10
    assert len(server.bodies) - 10 <= most
    sent = len(server.bodies)
    assert {found["short"].finish for found in made.caption(MANY, REQUESTS)} == {"none"}
    assert len(server.bodies) == sent
    assert made.stopped in caplog.text


def test_a_plain_image_that_passes_lets_the_run_continue(server: ChatServer) -> None:
    """Many refused images in a row: each probe that passes makes the next one rarer."""
    server.misbehave = lambda body, tries: (403, {}, "moderated") if any(shows(body, data) for data in MANY) else None
    made = engine(server, limits={"concurrency": 1}, slots=["short"])
    captions = [found["short"] for found in made.caption(MANY, REQUESTS)]
    assert {caption.reason for caption in captions} == {"http_403"}
    assert not made.stopped
    assert len(server.bodies) <= 40 + 6


@pytest.mark.parametrize("packed", [True, False])
def test_answers_are_bounded_while_they_arrive(server: ChatServer, packed: bool) -> None:
    text = b" " * (64 << 20) if packed else b" " * (MAX_ANSWER_BYTES + 1)
    headers = {"Content-Encoding": "gzip"} if packed else {}
    data = gzip.compress(text) if packed else text
    server.misbehave = lambda body, tries: (200, headers, data) if shows(body, IMAGES[1]) else None
    made = engine(server, limits={"retries": 0}, slots=["short"])
    del text
    tracemalloc.start()
    captions = [found["short"] for found in made.caption(IMAGES[:3], REQUESTS[:3])]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [caption.reason for caption in captions] == ["", "too_large", ""]
    assert peak < 32 << 20


def test_packed_answers_are_read(server: ChatServer) -> None:
    data = gzip.compress(json.dumps(completion("a dog")).encode())
    server.misbehave = lambda body, tries: (200, {"Content-Encoding": "gzip"}, data)
    assert engine(server, slots=["short"]).caption(IMAGES[:1], REQUESTS[:1])[0]["short"].raw == "a dog"


def test_control_characters_never_reach_a_terminal(server: ChatServer, caplog: pytest.LogCaptureFixture) -> None:
    words = "no\x1b[2J\x1b]0;title\x07 \x9b31m\u202eevil\r\nnext"
    server.misbehave = lambda body, tries: (400, {}, words) if shows(body, IMAGES[1]) else None
    captions = engine(server, slots=["short"]).caption(IMAGES[:3], REQUESTS[:3])
    message = captions[1]["short"].message
    assert message.isprintable()
    assert "evil next" in message
    assert message in caplog.text
    assert not any(character in caplog.text for character in "\x1b\x07\x9b\u202e\r")


@pytest.mark.parametrize("fault", [(503, {}, "busy"), (200, {}, "<html>"), (0, {}, {}), (200, {}, completion(None))])
def test_the_first_failure_of_each_kind_is_logged(
    server: ChatServer, fault: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server.misbehave = lambda body, tries: fault if shows(body, IMAGES[1]) or shows(body, IMAGES[2]) else None
    found = engine(server, limits={"retries": 1}, slots=["short"]).caption(IMAGES[:4], REQUESTS[:4])
    assert caplog.text.count(f": {found[1]['short'].reason}: ") == 1


def test_a_quota_that_ends_in_the_middle_loses_no_caption(
    server: ChatServer,
    build: Callable[..., Storage],
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 3 with the server's words; the next run requests only what is missing."""
    monkeypatch.setattr(units, "run", run_here)
    storage = build([[0, 1, 2, 3], [4, 5, 6]])
    file = tmp_path / "recipe.yaml"
    section = {"engine": "openai", "model": "m", "slots": ["short"], "lint": {"retries": 0}}
    section["server"] = {"url": server.url, "concurrency": 1}
    file.write_text(json.dumps({"dataset": storage.url, "recaption": section}))
    spent = True
    server.misbehave = lambda body, tries: (429, {}, QUOTA) if spent and len(server.bodies) > 3 else None
    assert run(["recaption", str(file)]) == 3
    assert "quota is used up (HTTP 429: You exceeded your current quota)" in capsys.readouterr().err
    assert len(server.bodies) == 5
    (layer,) = {name.split("/")[1] for name in storage.names("captions")}
    rows = storage.read_table(store.file_name(layer, "shard-000000")).to_pylist()
    assert sum(row["finish"] == "end" for row in rows) == 3
    (failed,) = [row for row in rows if row["finish"] == "none"]
    assert failed["flags"] == ["failed", "quota"]
    assert "You exceeded your current quota" in failed["raw"]
    spent = False
    server.bodies.clear()
    assert run(["recaption", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["captions"] == 7
    assert len(server.bodies) == 4
