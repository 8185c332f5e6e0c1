"""Recipes that are hostile as YAML, and text from elsewhere that would steer a terminal."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from repo import ROOT

from capstan.cluster.cli import run
from capstan.cluster.doctor import show
from capstan.cluster.doctor.finding import Finding
from capstan.cluster.jobs.clusters_file import read_targets
from capstan.pipeline.cli import finish
from capstan.pipeline.errors import CapstanError, RecipeError
from capstan.pipeline.progress import Progress
from capstan.pipeline.text import safe_yaml
from capstan.pipeline.text.printable import PrintableFormatter, printable

ESCAPE = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202e\r"
STEERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")

HOSTILE = {
    "an alias of itself": "dataset: &a [*a]\n",
    "a mapping in itself": "a: &a {b: *a}\n",
    "depth": "dataset: " + "[" * 60 + "]" * 60,
    "great depth": "dataset: " + "[" * 20_000,
    "great depth of blocks": "- " * 20_000,
    "depth of both": "- [{a: " * 5_000,
    "many digits": "image: {size: " + "9" * 5000 + "}",
    "more than 64 bits": "image: {size: 99999999999999999999}",
    "NUL": "dataset: a\0b\n",
    "billion laughs": "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)),
    "an impossible date": "dataset: 2026-99-99\n",
    "a key that is a list": "? [a, b]\n: 1\n",
    "an unknown tag": "dataset: !!python/object/apply:os.system [ls]\n",
    "not UTF-8": b"dataset: \xff\xfe\n",
    "too long": "# " + "x" * (safe_yaml.MAX_CHARACTERS + 1),
    "a bare word": "dataset",
    "nothing": "",
    "keys with escapes": yaml.safe_dump({"dataset": "x", ESCAPE + "\nkey": 1}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_recipe_ends_with_2_and_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, text = tmp_path / "recipe.yaml", HOSTILE[name]
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    started = time.process_time()
    assert run(["build", str(path)]) == 2
    assert time.process_time() - started < 10
    out, err = capsys.readouterr()
    assert re.fullmatch(r"error: [^\n]+ Fix: [^\n]+\n", err), err
    assert len(err) < 1000
    assert not STEERS.search(out + err)


@pytest.mark.parametrize("value", ["&a [*a]", "9" * 5000, "[" * 3000, "a: b: c", "!!python/name:os.system"])
def test_a_hostile_override_ends_with_2(value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text("dataset: x\n")
    assert run(["build", str(tmp_path / "recipe.yaml"), "--set", f"image.size={value}"]) == 2
    assert capsys.readouterr().err.startswith("error: --set: the value of image.size is not valid YAML")


def test_a_hostile_clusters_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "clusters.yaml").write_text("a: &a {kind: *a}\n")
    with pytest.raises(RecipeError, match="contains itself"):
        read_targets(tmp_path / "clusters.yaml")


def test_anchors_that_people_write_are_kept() -> None:
    text = "base: &b {a: 1}\none: {<<: *b, c: 2}\ntwo: [*b, *b]\ndate: 2026-01-02\n"
    assert safe_yaml.parse(text) == yaml.safe_load(text)


# Terminals -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def columns(tmp_path: Path) -> str:
    """A recipe of a table whose columns steer terminals."""
    (tmp_path / "rows.csv").write_text(f"{ESCAPE.strip()}url,caption\nhttp://x/a.jpg,b\n", newline="")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"dataset": str(tmp_path / "ds"), "source": {"path": str(tmp_path / "rows.csv")}}))
    return str(path)


def test_names_of_columns_and_arguments_are_escaped(columns: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["build", columns],
        [ESCAPE],
        ["verify", f"/no/{ESCAPE}"],
        ["build", columns, "--set", f"{ESCAPE}=1"],
    ):
        assert run(arguments) in (1, 2)
        out, err = capsys.readouterr()
        assert err
        assert not STEERS.search(out + err)


def test_summaries_logs_and_findings_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    summary: dict[str, Any] = {
        "captions": [{"key": "k", "text": f"a caption{ESCAPE}"}],
        f"by{ESCAPE}": {"reason": ESCAPE},
        "list": [ESCAPE],
    }
    finish(summary, as_json=False)
    show([Finding(ESCAPE, False, ESCAPE, ESCAPE)])
    record = logging.LogRecord("x", logging.INFO, "", 0, "server says %s", (ESCAPE,), None)
    print(PrintableFormatter("%(message)s").format(record))
    print(Progress(ESCAPE, total=None).line())
    out, err = capsys.readouterr()
    assert "a caption\\x1b[2J" in out
    assert not STEERS.search(out + err)
    finish(summary, as_json=True)
    out = capsys.readouterr().out
    assert json.loads(out) == summary
    assert not STEERS.search(out)


def test_errors_of_servers_are_escaped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise CapstanError(f"the server said {ESCAPE}")

    monkeypatch.setattr("capstan.cluster.doctor.examine", fail)
    assert run(["doctor"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: the server said \\x1b[2J")
    assert not STEERS.search(err)


def test_a_traceback_is_escaped() -> None:
    code = (
        "import capstan.cluster.cli as c, capstan.cluster.doctor as d\n"
        f"def fail(*_): raise ZeroDivisionError({ESCAPE!r})\n"
        "d.examine = fail\n"
        "c.run(['doctor'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "ZeroDivisionError: \\x1b[2J" in done.stderr
    assert not STEERS.search(done.stderr)


def test_plain_text_is_left_alone() -> None:
    for text in ("a\tb\nc", "naïve – ×", "日本語", "👩‍🚀", "می‌خواهم"):
        assert printable(text) == text
