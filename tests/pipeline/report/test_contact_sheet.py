"""Contact sheets: the requested rows, each with its image or the reason why it is missing."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from capstan.cluster.cli import run
from capstan.pipeline.report import contact_sheet
from capstan.pipeline.report.query import Row, Rows
from capstan.pipeline.report.thumbnails import find_images
from capstan.pipeline.storage import Storage

pytestmark = pytest.mark.integration

SIDE, GAP, MARGIN = contact_sheet._SIDE, contact_sheet._GAP, contact_sheet._MARGIN


@pytest.fixture
def sheet(hostile_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Runs `capstan report --samples …`; gives exit code, summary (or the error's line) and the sheet's pixels."""

    def draw(*arguments: str) -> tuple[int, dict[str, object] | str, np.ndarray | None]:
        out = tmp_path / "some" / "sheet.png"
        code = run(["report", str(hostile_dataset), *arguments, "-o", str(out), "--json"])
        captured = capsys.readouterr()
        if code:
            return code, captured.err, None
        with Image.open(out) as image:
            assert image.format == "PNG"
            return code, json.loads(captured.out.splitlines()[-1]), np.asarray(image.convert("RGB")).astype(int)

    return draw


def keys_of(dataset: Path, where: str) -> list[str]:
    with Rows(Storage(str(dataset))) as rows:
        return [key for (key,) in rows.query(f"SELECT key FROM rows WHERE {where} ORDER BY key")]


def cell(pixels: np.ndarray, number: int) -> np.ndarray:
    """The square of the sheet's image `number`."""
    top = MARGIN + contact_sheet._TITLE + 20
    height = SIDE + 6 + contact_sheet._KEY + 6 + contact_sheet._LINES * (contact_sheet._TEXT + 4)
    x, y = MARGIN + number % 8 * (SIDE + GAP), top + number // 8 * (height + GAP)
    return pixels[y : y + SIDE, x : x + SIDE]


def looks_like(square: np.ndarray, jpeg: bytes) -> bool:
    """Whether a square shows the image, which is square, too, and half as large."""
    with Image.open(io.BytesIO(jpeg)) as image:
        wanted = np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST)).astype(int)
    return bool(np.abs(square - wanted).mean() < 6)


def test_what_a_condition_dropped_is_shown_in_key_order(sheet, hostile_dataset: Path) -> None:
    wanted = keys_of(hostile_dataset, "reason = 'score'")
    code, summary, pixels = sheet("--samples", "reason=score", "--count", "10")
    assert code == 0
    assert (summary["shown"], summary["found"], summary["without_picture"]) == (10, len(wanted), 0)
    with Rows(Storage(str(hostile_dataset))) as rows:
        jpegs = find_images(rows, rows.rows(wanted).values())
    assert [looks_like(cell(pixels, n), jpegs[key]) for n, key in enumerate(wanted[:10])] == [True] * 10
    assert not looks_like(cell(pixels, 0), jpegs[wanted[1]])
    assert (cell(pixels, 10) == 255).all(), "no eleventh cell"
    assert sheet("--samples", "score", "--count", "10")[1] == summary, "a condition's name by itself is enough"


def test_several_must_all_hold(sheet, hostile_dataset: Path) -> None:
    both = keys_of(hostile_dataset, "outcome = 'duplicate' AND original_width = 96")
    _, summary, _ = sheet("--samples", "duplicate", "--samples", "original_width=96")
    assert summary["found"] == len(both) > 0


def test_rows_without_a_image_are_frames_with_the_reason(sheet) -> None:
    _, summary, pixels = sheet("--samples", "outcome=failed")
    assert summary["without_picture"] == summary["shown"] > 0
    frame = cell(pixels, 0)
    assert (frame[1:60, 1:-1] == 255).all()
    assert (frame[70:120] < 200).any(), "the reason stands in the middle"


def test_a_list_of_keys_is_shown_in_its_order(sheet, hostile_dataset: Path, tmp_path: Path) -> None:
    kept = keys_of(hostile_dataset, "outcome = 'kept'")
    listed = [kept[5], kept[0], kept[3]]
    (tmp_path / "keys.txt").write_text("\n".join([*listed, "", "f" * 32]) + "\n")
    _, summary, pixels = sheet("--samples", str(tmp_path / "keys.txt"))
    assert (summary["shown"], summary["found"]) == (3, 3)
    with Rows(Storage(str(hostile_dataset))) as rows:
        jpegs = find_images(rows, rows.rows(listed).values())
    assert [looks_like(cell(pixels, number), jpegs[key]) for number, key in enumerate(listed)] == [True] * 3


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ("reason=sizes", "no row matches reason=sizes.*reason is one of .*score \\(\\d+\\)"),
        ("resaon=score", "no column 'resaon'.*did you mean reason"),
        ("scor", "'scor' is not a file.*did you mean score"),
        ("width=wide", "width holds numbers, 'wide' is not a number"),
        ("zzzz", "outcome is one of kept \\(\\d+\\)"),
    ],
)
def test_what_is_not_there_is_exit_code_2_with_what_is(sheet, samples: str, message: str) -> None:
    code, said, _ = sheet("--samples", samples)
    assert code == 2
    import re

    assert re.search(message, said), said


def test_keys_that_are_not_there_and_files_that_are_no_png(sheet, hostile_dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text("0" * 32)
    code, said, _ = sheet("--samples", str(tmp_path / "keys.txt"))
    assert code == 2
    assert "keys look like" in said
    assert run(["report", str(hostile_dataset), "--samples", "kept", "-o", str(tmp_path / "sheet.jpg")]) == 2
    assert run(["report", str(hostile_dataset), "--samples", "kept", "--count", "0"]) == 2


def test_no_link_is_written_through(sheet, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "some").mkdir()
    for name in ("sheet.png", ".partial-sheet.png"):
        (tmp_path / "some" / name).symlink_to(victim)
    assert sheet("--samples", "outcome=kept")[0] == 0
    assert victim.read_text() == "precious"


def test_a_failed_row_names_url_and_detail_without_secrets() -> None:
    texts = dict.fromkeys(("key", "caption", "unit", "shard"), "") | {"outcome": "failed", "reason": "http_404"}
    numbers = dict.fromkeys(("width", "height", "original_width", "original_height", "bytes", "phash"), 0)
    url = "https://me:secret@host.example/a/b.jpg?X-Amz-Signature=secret#secret"
    cell = contact_sheet._cell(Row(**texts, **numbers, url=url, detail="Not Found"), None)
    assert cell.missing == "http_404\nhttps://host.example/a/b.jpg\nNot Found"
