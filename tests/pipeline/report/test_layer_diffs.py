"""The report's section of caption comparisons: their numbers, a link to each one's page, and nothing that can run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from capstan.pipeline.dataset.shards import Manifest, write_manifest
from capstan.pipeline.report.report import LIMIT, write_report
from capstan.pipeline.storage import Storage


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """A dataset without rows."""
    storage = Storage(str(tmp_path / "ds"))
    write_manifest(storage, Manifest(counts={"rows": 0, "kept": 0}))
    return storage


def comparison(a: str, b: str, clip: str = "ViT-B-32 laion") -> dict[str, Any]:
    def side(name: str, score: float) -> dict[str, Any]:
        words = {"mean": 17.25, "p50": 17}
        return {"name": name, "clip_mean": score, "clip_min": score - 4, "recall": 0.625, "words": words}

    rate = {"rate": 0.75, "low": 0.7, "high": 0.8}
    sides = {"a": side(a, 31.5), "b": side(b, 27.125)}
    return {"pictures": 1000, "clip": clip, **sides, "a_wins_by_mean": rate, "a_wins_by_min": {**rate, "rate": 0.6}}


def put(storage: Storage, name: str, said: Any, page: bool = True) -> None:
    storage.write(f"captions/diff-{name}.json", json.dumps(said).encode())
    if page:
        storage.write(f"captions/diff-{name}.html", b"<p>whole</p>")


def section(storage: Storage) -> str:
    write_report(storage)
    text = storage.read("report.html").decode()
    assert len(text) < LIMIT
    assert "<script" not in text
    return text.partition("<h2>Captions compared</h2>")[2].partition("</section>")[0]


def test_each_comparison_is_shown_with_its_numbers_and_a_link(storage: Storage) -> None:
    assert section(storage) == ""
    put(storage, "mine-original", comparison("mine", "original"))
    put(storage, "a-b", comparison("a", "b"), page=False)
    shown = section(storage)
    assert re.findall('href="(.*?)"', shown) == ["./captions/diff-mine-original.html"]
    cells = [re.sub("<.*?>", "", cell) for cell in re.findall("<td.*?>(.*?)</td>", shown)]
    about = "1,000 images, ViT-B-32 laion"
    wins = ["75.0% (70.0% to 80.0%)", "60.0% (70.0% to 80.0%)"]
    assert cells[:16] == [
        *[about, "a", "31.500", "27.500", "0.625", "17.250", *wins],
        *["", "b", "27.125", "23.125", "0.625", "17.250", "", ""],
    ]
    assert cells[16:18] == [about, "mine"]


def test_names_are_untrusted_and_files_may_be_anything(storage: Storage) -> None:
    evil = "</td><script>window.ran=1</script>"
    put(storage, 'x" onclick="x', comparison(evil, evil * 1000, evil))
    put(storage, "javascript:x", comparison("a", "b"))
    for number, other in enumerate(({}, [], {"pictures": evil}, comparison("a", "b") | {"a": 3})):
        put(storage, f"other{number}", other)
    storage.write("captions/diff-binary.json", b"\xff\x00")
    storage.write("captions/diff-huge.json", b" " * 1_000_001)
    storage.write("captions/layer/diff-rows.json", b"{}")  # a layer's, which has nothing to do with it
    shown = section(storage)
    assert shown.count("cannot be read: run captions diff again") == 6
    assert "diff-rows" not in shown
    assert set(re.findall("<([a-z]+)", shown)) <= {"p", "div", "table", "thead", "tbody", "tr", "th", "td", "bdi", "a"}
    assert re.findall("href=([^>]*)", shown) == [
        '"./captions/diff-javascript%3Ax.html"',
        '"./captions/diff-x%22%20onclick%3D%22x.html"',
    ]


def test_many_comparisons_are_cut(storage: Storage) -> None:
    for number in range(50):
        put(storage, f"a-{number:02}", comparison("a" * 10_000, "b" * 10_000))
    shown = section(storage)
    assert shown.count("<a ") == 40
    assert "And 10 more." in shown
    assert len(shown) < 100_000
