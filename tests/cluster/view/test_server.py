"""The viewer as a program: who may ask, what it answers, and that it ends."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import psutil
import pytest
from PIL import Image
from small_views import Viewing, wait, write_viewed

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def viewing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Viewing]:
    """`capstan view` of a small dataset with a caption layer and hostile captions."""
    folder = write_viewed(tmp_path_factory.mktemp("view"))
    with Viewing(folder) as running:
        yield running


def status(viewing: Viewing, path: str, headers: dict[str, str] | None = None, data: bytes | None = None) -> int:
    request = urllib.request.Request(viewing.origin + path, data=data, headers=headers or {})
    try:
        with urllib.request.build_opener(NoRedirect).open(request, timeout=120) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def test_only_the_token_opens_it(viewing: Viewing) -> None:
    assert status(viewing, "/api/dataset") == 401
    assert status(viewing, "/?token=wrong") == 401
    assert status(viewing, "/api/dataset?token=" + viewing.token) == 401  # the token opens the page, nothing else
    assert status(viewing, "/?token=" + viewing.token) == 302
    assert status(viewing, "/api/dataset", viewing.cookie) == 200


def test_the_cookie_is_not_for_scripts_or_other_sites(viewing: Viewing) -> None:
    request = urllib.request.Request(viewing.url)
    try:
        answer = urllib.request.build_opener(NoRedirect).open(request, timeout=120)
    except urllib.error.HTTPError as error:
        answer = error
    cookie = answer.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert answer.headers["Location"] == "/"


def test_other_names_pages_and_forms_are_refused(viewing: Viewing) -> None:
    good = viewing.cookie
    assert status(viewing, "/api/dataset", good | {"Host": "evil.example"}) == 403  # DNS rebinding
    assert status(viewing, "/api/dataset", good | {"Origin": "http://evil.example"}) == 403
    assert status(viewing, "/api/dataset", good | {"Origin": "null"}) == 403
    body = json.dumps({"conditions": []}).encode()
    assert status(viewing, "/api/funnel", good, body) == 403  # a form of another site cannot set the header
    assert status(viewing, "/api/funnel", good | {"X-Capstan": "1", "Content-Type": "application/json"}, body) == 200


@pytest.mark.parametrize(
    "path",
    [
        "/static/../server.py",
        "/static/%2e%2e/server.py",
        "/image/../../etc/passwd/256",
        "/image/..%2f..%2f..%2fetc%2fpasswd/0",
        f"/image/{'0' * 32}/256",
        f"/image/{'0' * 31}g/256",
        f"/image/{'0' * 32}/9999",
        "/api/row/nothing",
    ],
)
def test_paths_lead_nowhere_else(viewing: Viewing, path: str) -> None:
    assert status(viewing, path, viewing.cookie) == 404


def test_every_answer_forbids_what_a_page_could_load(viewing: Viewing) -> None:
    for path in ("/", "/api/dataset", "/static/main.js", "/image/x/1", "/nothing"):
        headers = viewing.get(path)[1]
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"


def test_it_answers_about_rows(viewing: Viewing) -> None:
    dataset = viewing.json("/api/dataset")
    assert {one["outcome"] for one in dataset["outcomes"]} >= {"kept", "failed", "duplicate", "rejected"}
    assert dataset["layers"] == ["people"]
    kept = viewing.json("/api/rows?outcome=kept")["rows"]
    assert kept
    key = kept[0]["key"]
    detail = viewing.json(f"/api/row/{key}")
    assert [one["text"] for one in detail["captions"]] == [f"what a person wrote of {key[:4]}"]
    image = Image.open(io.BytesIO(viewing.get(f"/image/{key}/0")[2]))
    assert image.size == (kept[0]["width"], kept[0]["height"])
    assert max(Image.open(io.BytesIO(viewing.get(f"/image/{key}/256")[2])).size) <= 256


def test_dropped_rows_show_their_images_and_failed_ones_their_reason(viewing: Viewing) -> None:
    for outcome in ("rejected", "duplicate"):
        row = viewing.json(f"/api/rows?outcome={outcome}")["rows"][0]
        assert viewing.get(f"/image/{row['key']}/256")[0] == 200
    failed = viewing.json("/api/rows?outcome=failed")["rows"][0]
    assert (failed["image"], failed["reason"]) == (False, failed["why"])
    assert viewing.get(f"/image/{failed['key']}/256")[0] == 404


def test_mistakes_are_named(viewing: Viewing) -> None:
    code, _, body = viewing.get("/api/rows?where=widht%20%3E%203")
    assert code == 400
    assert json.loads(body)["field"] == "where"
    assert viewing.get("/api/rows?order=nothing")[0] == 400
    assert viewing.get("/api/rows?after=%7B%7D")[0] == 400
    assert viewing.get("/api/rows?after=nonsense")[0] == 400
    assert viewing.get("/api/nearest?subject=x&threshold=y")[0] == 400
    assert status(viewing, "/api/funnel", viewing.cookie | {"X-Capstan": "1"}, b"[]") == 400
    assert status(viewing, "/api/funnel", viewing.cookie | {"X-Capstan": "1"}, b"x" * 100_000) == 413


def test_it_listens_on_this_machine_only(viewing: Viewing) -> None:
    connections = psutil.Process(viewing.process.pid).net_connections()
    assert {c.laddr.ip for c in connections if c.status == "LISTEN"} == {"127.0.0.1"}


def test_it_ends_at_ctrl_c(tmp_path: Path) -> None:
    with Viewing(write_viewed(tmp_path)) as running:
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(timeout=300) == 0


def test_what_is_no_dataset_is_a_mistake(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "capstan", "view", str(tmp_path / "nothing"), "--no-browser"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ)
    assert done.returncode == 2
    assert "capstan build" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(browser.find() is None, reason="needs Chromium")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (420, True)])
def test_the_page_in_a_browser(viewing: Viewing, width: int, dark: bool) -> None:
    binary = browser.find()
    assert binary is not None
    with browser.start(binary) as chromium:
        visit = chromium.visit(
            viewing.url,
            wait("document.body.dataset.ready === 'yes'"),
            "document.querySelectorAll('.grid > li').length",
            "document.documentElement.scrollWidth <= innerWidth",
            "window.ran === undefined",
            "[...document.querySelectorAll('.facets button')].find(b => b.textContent.startsWith('failed')).click()",
            wait("document.querySelector('.grid .outcome').textContent.startsWith('failed')"),
            "document.querySelector('.grid .outcome').textContent",
            "[...document.querySelectorAll('.facets button')].find(b => b.textContent.startsWith('duplicate')).click()",
            wait("document.querySelector('.grid .outcome').textContent.startsWith('duplicate')"),
            "document.querySelector('.card').click()",
            wait("document.querySelector('dialog[open] dl')"),
            "document.querySelectorAll('dialog .big img').length",
            "document.querySelector('dialog').textContent.includes('null')",
            "document.querySelector('dialog .close').click()",
            wait("!location.hash.includes('key=')"),
            "const w = document.getElementById('where'); w.value = 'widht > 3'; w.form.requestSubmit()",
            wait(
                "document.getElementById('message').textContent !== ''",
                "document.getElementById('message').textContent",
            ),
            width=width,
            dark=dark,
        )
    answers = visit.answers
    assert answers[0] is True
    assert answers[1] > 10
    assert answers[2:4] == [True, True]
    assert answers[6].startswith("failed: ")
    assert answers[11] == 2  # a duplicate next to the image that was kept
    assert answers[12] is False
    assert "widht" in answers[-1]
    assert "Fix:" in answers[-1]
    assert {url.split("/")[2] for url in visit.requests} == {f"127.0.0.1:{viewing.port}"}
    unexpected = [problem for problem in visit.problems if "400" not in problem and "404" not in problem]
    assert not unexpected


@pytest.mark.skipif(browser.find() is None, reason="needs Chromium")
def test_a_threshold_is_dragged_and_becomes_yaml(viewing: Viewing) -> None:
    binary = browser.find()
    assert binary is not None
    with browser.start(binary) as chromium:
        visit = chromium.visit(
            viewing.url + "#subject=Caption%2C+characters",
            wait("document.querySelector('.histogram') && document.querySelector('.step')"),
            "const r = document.querySelector('input[type=range]'); r.value = 900; r.dispatchEvent(new Event('input'))",
            wait("document.querySelectorAll('.step').length === document.querySelectorAll('.condition').length + 1"),
            "[...document.querySelectorAll('.step .count')].map(c => Number(c.textContent.replace(/,/g, '')))",
            "[...document.querySelectorAll('button')].find(b => b.textContent === 'Copy as YAML').click()",
            wait("!document.querySelector('.yaml').hidden", "document.querySelector('.yaml').textContent"),
            wait("document.querySelectorAll('.near img').length > 0"),
        )
    counts, yaml, near = visit.answers[3], visit.answers[5], visit.answers[6]
    assert counts[0] >= counts[1] > counts[2]
    assert "name: caption_characters" in yaml
    assert "length(caption) >= " in yaml
    assert near is True
