"""The report: what it says of a dataset, whatever state that is in, and that nothing in a caption can run."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import browser
import hostile
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from capstan.cluster.cli import run
from capstan.pipeline.build import select
from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.shards import Dataset, Manifest, read_manifest, write_manifest
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.report import query as report_rows
from capstan.pipeline.report.histograms import histograms, subjects
from capstan.pipeline.report.query import Rows
from capstan.pipeline.report.report import LIMIT, report, write_report
from capstan.pipeline.report.thresholds import thresholds
from capstan.pipeline.report.thumbnails import find_images, thumbnails
from capstan.pipeline.storage import Storage
from capstan.recaption.edits import changed, read_edits, write_edits
from capstan.recaption.store import Place, write_given_layer

pytestmark = pytest.mark.integration

TAGS = """html head meta title style body header h1 h2 h3 p dl dt dd div nav a main section ol li span code svg rect
    line text g figure figcaption bdi i b small img table thead tbody tr th td details summary pre"""
ATTRIBUTES = """lang charset http-equiv content name class href aria-label aria-hidden role tabindex id viewbox scope
    preserveaspectratio x y x1 x2 y1 y2 width height text-anchor rx alt src"""


class Parsed(HTMLParser):
    """A page's tags, attributes, links and text by section."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.links = Counter[str](), set[str](), list[str]()
        self.sections: dict[str, str] = {"": ""}
        self._tag = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes |= {name for name, _ in attrs}
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]
        self._tag = tag

    def handle_data(self, data: str) -> None:
        if self._tag == "h2" and data.strip():
            self.sections[data] = ""
            self._tag = ""
        elif self._tag != "style":
            self.sections[list(self.sections)[-1]] += f" {data}"


@pytest.fixture(scope="module")
def page(hostile_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the hostile dataset."""
    folder = tmp_path_factory.mktemp("report") / hostile_dataset.name
    shutil.copytree(hostile_dataset, folder)
    write_report(Storage(str(folder)))
    return folder / "report.html"


@pytest.fixture
def copy(hostile_dataset: Path, tmp_path: Path) -> Storage:
    """A dataset to be changed."""
    shutil.copytree(hostile_dataset, tmp_path / "dataset")
    return Storage(str(tmp_path / "dataset"))


@pytest.fixture(scope="module")
def chromium() -> Iterator[browser.Browser]:
    binary = browser.find()
    if binary is None:
        pytest.skip(f"no browser: none of {', '.join(browser.NAMES)} is installed (Debian: apt-get install chromium)")
    with browser.start(binary) as started:
        yield started


# In a browser ---------------------------------------------------------------------------------------------------------

_RAN = "typeof window.ran"
_SCRIPTS = "document.scripts.length + document.querySelectorAll('iframe, object, embed, base, form').length"
_WIDTH = "document.documentElement.scrollWidth"
_SEEN = "getComputedStyle(document.body).display + ' ' + document.querySelectorAll('figure img').length"


def test_the_browser_tells_of_what_runs_and_fails(chromium: browser.Browser, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(
        "<div style='width: 2000px'>wide</div><img src=gone.png><script>window.ran = 1; console.error('told')</script>"
    )
    visit = chromium.visit(path, _RAN, _SCRIPTS, _WIDTH, width=360)
    assert visit.answers == ["number", 1, pytest.approx(2008, abs=10)]
    assert any("told" in problem for problem in visit.problems)
    assert any(request.endswith("gone.png") for request in visit.requests)


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_runs_nothing_is_asked_for_and_it_fits(
    chromium: browser.Browser, page: Path, width: int, dark: bool
) -> None:
    visit = chromium.visit(page, _RAN, _SCRIPTS, _WIDTH, _SEEN, width=width, dark=dark)
    assert visit.problems == []
    assert visit.requests == [page.resolve().as_uri()]
    ran, scripts, wide, seen = visit.answers
    assert (ran, scripts) == ("undefined", 0)
    assert wide <= width
    display, images = seen.split()
    assert display == "block"
    assert int(images) >= 40


# What it says ---------------------------------------------------------------------------------------------------------


def test_foreign_texts_stay_texts(page: Path) -> None:
    source = page.read_text(encoding="utf-8")
    parsed = Parsed(source)
    assert set(parsed.tags) <= set(TAGS.split())
    assert parsed.attributes <= set(ATTRIBUTES.split())
    assert all(link.startswith(("#s", "data:image/jpeg;base64,")) for link in parsed.links)
    assert not set("\x00\x07\x1b\x85\u202e\u2066\u2067\ufffe") & set(source)
    assert f"<script>{hostile.RUNS}" in parsed.sections["What is kept"]
    assert len(source.encode()) < 1_500_000, "captions of a megabyte are cut"


def test_every_step_is_shown_with_counts_and_images_of_what_it_dropped(page: Path) -> None:
    counts = json.loads((page.parent / "dataset.json").read_text())["funnel"]
    parsed = Parsed(page.read_text(encoding="utf-8"))
    for step in counts:
        assert f"{step['step']} " in parsed.sections["Funnel"]
        assert f" {step['left']} " in parsed.sections["Funnel"]
    dropped = parsed.sections["What the conditions dropped"]
    lost = {step["step"]: step["lost"] for step in counts}
    assert f"Dropped {lost['score']} rows" in dropped
    assert f"Dropped {lost['shown']} rows" in dropped
    # The one with a single threshold shows what lies nearest to it: 0.2 is dropped, 0.3 is kept.
    assert "value 0.2" in dropped
    assert "value 0.3" in dropped
    assert f"exact: {lost['exact duplicates']}" in parsed.sections["Duplicates"]
    assert parsed.sections["Duplicates"].count("the same file") == min(lost["exact duplicates"], 9)
    assert "not_an_image" in parsed.sections["Failures"]
    assert "host.example:8080" in parsed.sections["Hosts"]
    assert "secret" not in parsed.sections["Hosts"]
    assert "build" in parsed.sections["Throughput"]


def test_thresholds_are_drawn_where_values_are_counted(hostile_dataset: Path) -> None:
    with Rows(Storage(str(hostile_dataset))) as rows:
        shown = {drawn.title: drawn for drawn in histograms(rows, subjects(rows))[0]}
        total = rows.count - rows.having("failed")
        (score,) = [drawn for title, drawn in shown.items() if "score" in title]
        assert [(mark.label, mark.keeps) for mark in score.marks] == [("score ≥ 0.3", "above")]
        assert sum(score.kept) + sum(score.lost) == total
        assert sum(score.kept) == rows.having("kept")
        assert sum(k for edge, k in zip(score.edges, score.kept, strict=False) if edge < 0.299) == 0
        lengths = next(drawn for title, drawn in shown.items() if title.startswith("Caption"))
        assert max(lengths.edges) < 1_000_000 or lengths.logarithmic
        assert ">score ≥ 0.3</text>" in report(rows)


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ("clip_score >= 0.28", [("clip_score", "≥", 0.28)]),
        ("least(width,height)>=200 AND aspect < 3", [("least(width, height)", "≥", 200), ("aspect", "<", 3)]),
        ("-0.5 < x", [("x", ">", -0.5)]),
        ("length(caption) BETWEEN 3 AND 2 * 40", [("length(caption)", "≥", 3), ("length(caption)", "≤", 80)]),
        ("(extra->>'$.s')::float > 1e3 -- why", [("CAST((extra ->> '$.s') AS FLOAT)", ">", 1000)]),
        ("a > 1 OR b > 2", []),
        ("NOT (a > 1)", []),
        ("a > b", []),
        ("1 > 2", []),
        ("a = 3", []),
        ("a > (SELECT 3)", []),
        ("a > random()", []),
        ("url LIKE '%x%' AND a <= 3", [("a", "≤", 3)]),
        ("a > 1), (b > 2", []),
        ("a > 1) UNION SELECT (a > 2", []),
        ("a > 'x'", []),
        ("a >", []),
        ("", []),
    ],
)
def test_thresholds_are_read_by_the_parser(where: str, found: list[tuple[str, str, float]]) -> None:
    import duckdb

    with duckdb.connect() as db:
        read = thresholds(db, {"x": where})
    assert [(t.subject, t.operator, t.value) for t in read] == found


def test_thumbnails_stay_within_their_budget(draw: Any) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG", quality=95)
    jpegs = {f"key-{number:02}": file.getvalue() for number in range(30)} | {"broken": b"\xff\xd8\xff no jpeg"}
    for budget in (2_000_000, 300_000, 30_000):
        made = thumbnails(jpegs, budget)
        assert 0 < sum(map(len, made.values())) <= budget
        assert "broken" not in made
    assert len(thumbnails(jpegs, 300_000)) == 30, "smaller rather than fewer"
    assert next(iter(made)) == "key-00", "the most wanted first"
    with Image.open(io.BytesIO(thumbnails(jpegs, 9_000_000)["key-00"])) as image:
        assert image.size == (256, 192)


def test_rows_without_captions_are_counted(copy: Storage) -> None:
    plan = json.loads(copy.read("state/plan/source.json"))
    copy.write("state/plan/source.json", json.dumps(plan | {"captions": 3, "unused": {".prompt": 2}}).encode())
    write_report(copy)
    expected = f"3 of {plan['read']} rows have a caption; 2 files or tar members (.prompt) were not used"
    assert expected in copy.read("report.html").decode()


def test_the_same_dataset_gives_the_same_page(copy: Storage) -> None:
    write_report(copy)
    first = copy.read("report.html")
    write_report(copy)
    assert copy.read("report.html") == first
    assert len(first) < LIMIT


# Of large, empty and unfinished datasets ------------------------------------------------------------------------------


def test_long_tables_are_sampled_and_say_so(hostile_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_rows, "SAMPLE", 16)
    with Rows(Storage(str(hostile_dataset))) as rows:
        sampled = rows.query(f"SELECT count(*) FROM rows WHERE {rows.sample}")[0][0]
        assert 4 < sampled < 36
        shown = Parsed(report(rows)).sections
    assert "random sample" in shown["Sizes, captions and scores"]
    counts = json.loads((hostile_dataset / "dataset.json").read_text())["counts"]
    assert f" {counts['kept']} " in shown[""], "what is counted for the funnel is not sampled"
    assert "Dropped" in shown["What the conditions dropped"]


def test_a_dataset_without_rows_has_a_report(storage: Storage) -> None:
    write_manifest(storage, Manifest(counts={"rows": 0, "kept": 0}))
    write_report(storage)
    shown = Parsed(storage.read("report.html").decode()).sections
    assert "Nothing is kept" in shown["What is kept"]
    assert "No row has an image" in shown["Sizes, captions and scores"]


def test_a_dataset_that_is_not_finished_shows_what_is_staged(copy: Storage) -> None:
    planned = json.loads(copy.read("dataset.json"))["counts"]["rows"]
    copy.delete("dataset.json", *copy.names("shards"), *copy.names("ledger"))
    marks = [name for name in copy.names("state") if name.startswith("state/ingest-") and "/done/" in name]
    copy.delete(marks[0])
    write_report(copy)
    shown = Parsed(copy.read("report.html").decode()).sections
    assert f"{planned - 20} of {planned} planned rows have been processed" in shown[""]
    assert "Funnel" not in shown
    assert "not_an_image" in shown["Failures"]
    assert "Caption, characters" in shown["Sizes, captions and scores"]


def test_freed_images_leave_frames_that_say_so(copy: Storage) -> None:
    copy.delete(*copy.names("staged"))
    write_report(copy)
    shown = Parsed(copy.read("report.html").decode()).sections
    assert "no longer staged" in shown["What the conditions dropped"]
    assert "no longer staged" not in shown["What is kept"]


def test_what_is_blocked_is_counted_and_never_shown_and_evaluation_images_are_named(
    hostile_dataset: Path, copy: Storage, tmp_path: Path, draw: Any
) -> None:
    kept = [
        row
        for row in Dataset(copy).ledger().to_pylist()
        if row["outcome"] == "kept" and json.loads(row["extra"])["number"] != 0
    ]
    evaluated, blocked = kept[0], kept[1:4]
    (tmp_path / "evaluation").mkdir()
    name = "<i>evaluated.jpg"
    (tmp_path / "evaluation" / name).write_bytes(draw(json.loads(evaluated["extra"])["number"]))
    (tmp_path / "keys.txt").write_text("\n".join(row["key"] for row in blocked))
    settings = hostile.recipe("", "") | {
        "dataset": copy.url,
        "source": Dataset(copy).manifest.recipe["source"],
        "dedup": {"perceptual": None, "decontaminate": str(tmp_path / "evaluation")},
        "blocklist": {"keys": str(tmp_path / "keys.txt")},
    }
    select(Recipe.model_validate(settings), progress=False)
    with Rows(copy) as rows:
        total, lost = rows.count, rows.having("failed") + len(blocked)
        assert rows.outcomes["rejected", "removed"] == len(blocked)
        assert rows.outcomes["duplicate", "contaminated"] == 1
        found = rows.rows(row["key"] for row in [*blocked, evaluated])
        assert set(find_images(rows, found.values())) == {evaluated["key"]}
        (score,) = [drawn for drawn in histograms(rows, subjects(rows))[0] if "score" in drawn.title]
        assert sum(score.kept) + sum(score.lost) == total - lost
        shown = Parsed(report(rows)).sections
    assert re.search(rf"removed +{total - lost} +\S+ +−{len(blocked)} ", shown["Funnel"])
    assert "contaminated: 1" in shown["Duplicates"]
    assert name in shown["Duplicates"]


def test_where_there_is_nothing_it_is_said_with_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", str(tmp_path)]) == 2
    assert "no dataset at" in capsys.readouterr().err
    with pytest.raises(RecipeError, match="no dataset"):
        Dataset(Storage(str(tmp_path)))


def test_cards_name_key_and_reason_and_how_to_remove_them(page: Path) -> None:
    source = page.read_text(encoding="utf-8")
    parsed = Parsed(source)
    ledger = pq.read_table(page.parent / "ledger").to_pylist()
    keys = {row["key"]: row for row in ledger}
    shown = re.findall(r'<small class="key">([0-9a-f]{32})</small>', source)
    assert len(shown) > 30
    assert set(shown) <= keys.keys()
    dropped = parsed.sections["What the conditions dropped"]
    assert "rejected: score" in dropped
    assert "capstan remove" in parsed.sections["What is kept"]


def test_searches_that_did_not_run_are_not_in_the_funnel(copy: Storage) -> None:
    manifest = read_manifest(copy)
    assert manifest is not None
    for exact, perceptual in ((True, None), (False, 6)):
        recipe = manifest.recipe | {"dedup": {"exact": exact, "perceptual": perceptual}}
        funnel = [step if "duplicates" not in step["step"] else {**step, "lost": 0} for step in manifest.funnel]
        write_manifest(copy, manifest.model_copy(update={"recipe": recipe, "funnel": funnel}))
        write_report(copy)
        text = Parsed(copy.read("report.html").decode()).sections["Funnel"]
        assert ("exact duplicates" in text, "near duplicates" in text) == (exact, perceptual is not None)


def test_every_caption_layer_is_shown(copy: Storage) -> None:
    write_report(copy)
    assert "Caption layers" not in Parsed(copy.read("report.html").decode()).sections
    dataset = Dataset(copy)
    keys = [key for shard in dataset.shard_names for key in dataset.table(shard, ["key"])["key"].to_pylist()]
    write_given_layer(copy, "people", {key: {"short": f"<b>three words</b> {key}"} for key in keys})
    row = copy.read_table(f"shards/{dataset.shard_names[0]}.parquet", ["key", "sha256"]).to_pylist()[0]
    place = Place(row["key"], row["sha256"], "", "short")
    write_edits(copy, "people", changed(read_edits(copy, "people"), place, "corrected by hand"))
    copy.write_table(f"captions/other/{dataset.shard_names[0]}.parquet", pa.table({"key": ["x"]}))
    copy.write("captions/other/recipe.json", b"{}")  # not a layer of ours: left out
    write_report(copy)
    text = Parsed(copy.read("report.html").decode()).sections["Caption layers"]
    assert "people, short" in text
    assert f"<b>three words</b> {min(keys)}" in text
    assert f" {len(keys)} " in text
    assert "people-edited short 1 " in text
