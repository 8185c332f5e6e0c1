"""More like this, and words: on the page, over a dataset that kept its embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import browser
import hostile
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from in_process import run_here
from small_clip import write_clip
from small_views import Viewing, draw, wait

from capstan.pipeline.build import build
from capstan.pipeline.config import Recipe

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hostile rows, with the embeddings of a CLIP of random weights."""
    folder = tmp_path_factory.mktemp("similar")
    rows = [hostile.row(number, draw) for number in range(hostile.ROWS)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    clip = {"model": str(write_clip(folder / "clip", 0)), "embeddings": True, "batch": 16}
    recipe = hostile.recipe(str(folder), str(folder / "rows.parquet")) | {"score": {"clip": clip}}
    with pytest.MonkeyPatch.context() as patch:  # Ray would take ten seconds to start
        for module in ("build", "pack.job", "score.job"):
            patch.setattr(f"capstan.pipeline.{module}.run", run_here)
        build(Recipe.model_validate(recipe), progress=False)
    return Path(recipe["dataset"])


@pytest.fixture(scope="module")
def viewing(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Viewing]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        with Viewing(folder) as running:
            yield running


def test_the_nearest_come_first_whatever_became_of_them(viewing: Viewing) -> None:
    pair = viewing.json("/api/rows?outcome=duplicate")["rows"][0]
    found = viewing.json(f"/api/similar?key={pair['key']}")
    cosines = [row["cosine"] for row in found["rows"]]
    assert found["exact"] is True
    assert cosines == sorted(cosines, reverse=True)
    assert cosines[0] == pytest.approx(1, abs=1e-2)
    same = {row["key"] for row in found["rows"] if row["cosine"] > 0.9999}
    assert pair["detail"] in same  # the image that was kept in its place
    assert pair["key"] not in {row["key"] for row in found["rows"]}
    assert all(row["image"] for row in found["rows"])
    assert {"kept", "rejected"} <= {row["outcome"] for row in found["rows"]}


def test_words_are_answered_while_the_clip_is_there(viewing: Viewing, folder: Path) -> None:
    weights = folder.parent / "clip" / "open_clip_model.safetensors"
    away = weights.with_suffix(".away")
    weights.rename(away)
    status, _, body = viewing.get("/api/similar?text=two%20dogs")
    assert status == 400
    assert b"open_clip_model.safetensors" in body
    away.rename(weights)
    found = viewing.json("/api/similar?text=two%20dogs")
    assert len(found["rows"]) > 20
    assert found["rows"][0]["cosine"] >= found["rows"][-1]["cosine"]


@pytest.mark.parametrize("query", ["", "key=x", "key=" + "0" * 32, "text=%20", "text=a&key=b", "text=" + "a" * 1001])
def test_other_questions_are_mistakes(viewing: Viewing, query: str) -> None:
    assert viewing.get(f"/api/similar?{query}")[0] == 400


@pytest.mark.skipif(browser.find() is None, reason="needs Chromium")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_on_the_page(viewing: Viewing, width: int, dark: bool) -> None:
    binary = browser.find()
    assert binary is not None
    press = "[...document.querySelectorAll('button')].find(b => b.textContent === '{}').click()"
    title = "document.querySelector('#rows .total').textContent"
    with browser.start(binary) as chromium:
        visit = chromium.visit(
            viewing.url,
            wait("document.body.dataset.ready === 'yes'"),
            "document.querySelector('.card:has(img)').click()",
            wait("document.querySelector('dialog[open] dl')"),
            press.format("More like this"),
            wait(f"{title}.startsWith('Most like image')", title),
            "document.querySelectorAll('.grid li').length",
            "const t = document.getElementById('text'); t.value = '<b>two</b> dogs'; t.form.requestSubmit()",
            wait(f"{title}.startsWith('Most like “<b>two</b> dogs”')", "location.hash"),
            "document.documentElement.scrollWidth <= innerWidth && window.ran === undefined",
            press.format("Back to all rows"),
            wait(f"{title}.endsWith(' rows')", "location.hash"),
            width=width,
            dark=dark,
        )
    answers = visit.answers
    assert "rows compared" in answers[4]
    assert answers[5] > 20
    assert answers[7] == f"#text={quote('<b>two</b>')}+dogs".replace("/", "%2F")
    assert answers[8] is True
    assert answers[10] == ""
    assert visit.problems == []
