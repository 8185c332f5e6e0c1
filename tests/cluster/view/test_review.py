"""Reviews and takedown lists, as the page uses them and as a person does."""

from __future__ import annotations

import json
import shlex
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import pytest
from browser import Press
from small_views import Viewing, wait, write_viewed

from capstan.cluster.view.leased import LeasedTables
from capstan.cluster.view.reviews import Reviews
from capstan.pipeline.errors import CapstanError
from capstan.pipeline.lease import lease
from capstan.pipeline.pack.verify import verify
from capstan.pipeline.select.review import Verdict, read_review
from capstan.pipeline.storage import Storage

KEY = "0" * 32


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_viewed(tmp_path_factory.mktemp("view"))


@pytest.fixture(scope="module")
def viewing(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Viewing]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAPSTAN_STATE", str(tmp_path_factory.mktemp("state")))
        with Viewing(dataset) as running:
            yield running


def post(viewing: Viewing, path: str, body: Any) -> tuple[int, Any]:
    """The status and the answer of a request that writes."""
    headers = viewing.cookie | {"X-Capstan": "1", "Content-Type": "application/json"}
    request = urllib.request.Request(viewing.origin + path, data=json.dumps(body).encode(), headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def verdicts(dataset: Path, name: str) -> dict[str, str]:
    table = read_review(Storage(str(dataset)), name)
    return dict(zip(table["key"].to_pylist(), table["verdict"].to_pylist(), strict=True))


def test_a_verdict_is_published_and_can_be_undone(viewing: Viewing, dataset: Path) -> None:
    first, second = (row["key"] for row in viewing.json("/api/rows")["rows"][:2])
    given = [{"key": first, "verdict": "reject", "note": "a logo"}, {"key": second, "verdict": "keep"}]
    status, answer = post(viewing, "/api/review/posts", {"verdicts": given})
    assert (status, answer["reject"], answer["keep"]) == (200, 1, 1)
    assert verdicts(dataset, "posts") == {first: "reject", second: "keep"}
    rows = viewing.json("/api/rows?review=posts&verdict=reject")
    assert [(row["key"], row["verdict"], row["note"]) for row in rows["rows"]] == [(first, "reject", "a logo")]
    assert viewing.json("/api/rows?review=posts&verdict=none")["total"] == viewing.json("/api/rows")["total"] - 2
    assert viewing.json(f"/api/row/{first}?review=posts")["card"]["note"] == "a logo"
    assert {"name": "posts", "reject": 1, "keep": 1} in viewing.json("/api/reviews")["reviews"]
    assert verify(Storage(str(dataset))) == []
    status, answer = post(viewing, "/api/review/posts", {"verdicts": answer["before"]})
    assert (status, answer["reject"], answer["keep"]) == (200, 0, 0)
    assert verdicts(dataset, "posts") == {}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/review/mine", {"verdicts": [{"key": KEY, "verdict": "reject"}]}),  # no row of the dataset
        ("/api/review/mine", {"verdicts": [{"key": "x", "verdict": "reject"}]}),
        ("/api/review/mine", {"verdicts": [{"key": KEY, "verdict": "drop"}]}),
        ("/api/review/mine", {"verdicts": "all"}),
        ("/api/review/..%2f..%2fx", {"verdicts": []}),
        ("/api/review/" + "a" * 65, {"verdicts": []}),
        ("/api/review/mine", []),
        ("/api/takedown", {"add": [KEY]}),
        ("/api/takedown", {"add": ["../x\n"]}),
    ],
)
def test_what_is_no_verdict_changes_nothing(viewing: Viewing, dataset: Path, path: str, body: Any) -> None:
    assert post(viewing, path, body)[0] == 400
    assert not (dataset / "review/mine.parquet").exists()


def test_the_takedown_list_is_a_file_and_a_command(viewing: Viewing, dataset: Path) -> None:
    key = viewing.json("/api/rows?outcome=kept")["rows"][0]["key"]
    answer = post(viewing, "/api/takedown", {"add": [key, key]})[1]
    assert shlex.split(answer["command"]) == ["capstan", "remove", str(dataset), "--keys", answer["file"]]
    assert Path(answer["file"]).read_text() == f"{key}\n"
    assert viewing.get(f"/image/{key}/256")[0] == 200  # nothing is removed
    assert post(viewing, "/api/takedown", {"remove": [key]})[1]["keys"] == []


def test_read_only_refuses_what_writes(dataset: Path) -> None:
    with Viewing(dataset, "--read-only") as running:
        key = running.json("/api/rows")["rows"][0]["key"]
        assert post(running, "/api/review/mine", {"verdicts": [{"key": key, "verdict": "keep"}]})[0] == 403
        assert post(running, "/api/takedown", {"add": [key]})[0] == 403
        assert post(running, "/api/duplicates", {"chosen": {}, "verdict": "different"})[0] == 403
        assert post(running, "/api/duplicates/undo", {})[0] == 403
        sides = {"a": "original", "b": "people:short"}
        assert running.json("/api/ballot?a=original&b=people:short")["ballot"] is not None
        assert post(running, "/api/vote", {**sides, "key": key, "choice": "tie"})[0] == 403
        edit = {"key": key, "layer": "people", "slot": "short", "text": "red blocks"}
        assert post(running, "/api/edit", edit)[0] == 403
        assert running.json("/api/dataset")["read_only"] is True
    written = ("review/mine.parquet", "pairs", "captions/votes.parquet", "captions/people-edited")
    assert not any((dataset / name).exists() for name in written)


def test_a_build_and_a_review_exclude_each_other(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    tables = LeasedTables(storage)
    reviews = Reviews(tables)
    with lease(storage, "build"), pytest.raises(CapstanError, match="capstan build"):
        reviews.give("mine", {KEY: Verdict("reject")})
    reviews.give("mine", {KEY: Verdict("reject")})
    with pytest.raises(CapstanError, match="capstan view"), lease(storage, "build"):
        pass
    others = LeasedTables(storage)
    other = Reviews(others)
    with pytest.raises(CapstanError, match="capstan view"):
        other.give("mine", {KEY: Verdict("keep")})
    tables.close()
    before, _ = other.give("mine", {KEY: Verdict("keep")})  # reads what the first one wrote
    others.close()
    assert before == {KEY: Verdict("reject")}
    with lease(storage, "build"):
        pass


@pytest.mark.skipif(browser.find() is None, reason="needs Chromium")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_a_review_by_keyboard(viewing: Viewing, dataset: Path, width: int, dark: bool) -> None:
    binary, name = browser.find(), f"by-{width}"
    assert binary is not None
    rejected = "document.querySelectorAll('#rows .badge.reject').length === {}"
    with browser.start(binary) as chromium:
        answers = chromium.visit(
            f"{viewing.url}#review={name}",
            wait("document.body.dataset.ready === 'yes'"),
            *(Press(key) for key in "jxxy"),
            wait(rejected.format(2) + " && document.querySelectorAll('#rows .badge.keep').length === 1"),
            "document.activeElement.closest('[data-key]') === document.querySelectorAll('#rows [data-key]')[3]",
            Press("k"),
            Press("k"),
            Press("x"),  # the second row: takes its verdict back, and stays there
            wait(rejected.format(1)),
            Press("u"),
            wait(rejected.format(2)),
            "document.querySelector('#review [aria-live]').textContent",
            Press("Enter"),
            wait("document.querySelector('dialog[open] .judge')"),
            "document.querySelector('.judge [value=reject]').getAttribute('aria-pressed')",
            "[...document.querySelectorAll('dialog button')].find(b => b.textContent.startsWith('Add to the')).click()",
            wait("document.querySelector('dialog .command')", "document.querySelector('dialog .command').textContent"),
            "[...document.querySelectorAll('dialog button')].find(b => b.textContent.startsWith('Take off')).click()",
            wait("!document.querySelector('dialog .command')"),
            "document.documentElement.scrollWidth <= innerWidth && window.ran === undefined",
            width=width,
            dark=dark,
        ).answers
    kept = [answer for answer in answers if answer is not None]
    assert kept[:5] == [True, True, True, True, True]
    assert kept[5] == "2 rejected, 1 kept"
    assert kept[6:8] == [True, "true"]
    assert kept[8].startswith("capstan remove ")
    assert kept[9:] == [True, True]
    keys = [row["key"] for row in viewing.json("/api/rows")["rows"][:3]]
    assert verdicts(dataset, name) == dict(zip(keys, ["reject", "reject", "keep"], strict=True))
