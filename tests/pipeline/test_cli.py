"""The ending that all commands share: a summary on stdout, and an exit code that tells of quarantined units."""

import json

import pytest

from capstan.pipeline.cli import finish
from capstan.pipeline.errors import Quarantined

SUMMARY = {
    "dataset": "ds",
    "counts": {"rows": 12345, "kept": 9},
    "funnel": [{"step": "rows", "left": 12345, "lost": 0}, {"step": "size", "left": 9, "lost": 12336}],
    "seconds": {"plan": 1.25},
    "quarantined": {},
}


def test_json_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    finish(SUMMARY, as_json=True)
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == SUMMARY


def test_text_shows_the_funnel(capsys: pytest.CaptureFixture[str]) -> None:
    finish(SUMMARY, as_json=False)
    out = capsys.readouterr().out
    assert "rows: 12,345" in out
    assert "quarantined" not in out
    (row,) = [line for line in out.splitlines() if line.strip().startswith("size")]
    assert row.split() == ["size", "9", "12,336"]


def test_quarantined_units_are_told_after_the_summary(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Quarantined, match="0000-000001: OSError"):
        finish(SUMMARY | {"quarantined": {"0000-000001": "OSError: no"}}, as_json=True)
    assert json.loads(capsys.readouterr().out)["quarantined"]


def test_text_does_not_round_shares_away(capsys: pytest.CaptureFixture[str]) -> None:
    finish({"colours": 0.857, "chance": 0.01, "seconds": 12.34}, as_json=False)
    assert capsys.readouterr().out.splitlines() == ["colours: 0.86", "chance: 0.01", "seconds: 12.3"]
