"""Every command in the docs is one that capstan takes; dry runs of submit are run, on the page's own files."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from repo import ROOT

from capstan.cluster.cli import app, run

DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMANDS = [
    (page.name, line)
    for page in sorted(DOCS.glob("*.md"))
    for language, text in BLOCK.findall(page.read_text())
    if language == "sh"
    for line in text.splitlines()
    if line.startswith("capstan ")
]


def test_the_docs_have_commands() -> None:
    assert len(COMMANDS) > 20


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{page} {line}" for page, line in COMMANDS])
def test_a_command_in_the_docs_is_right(page: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = shlex.split(line, comments=True)[1:]
    if arguments[0] != "submit" or "--dry-run" not in arguments:
        parse(arguments)
        return
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CAPSTAN_CLUSTERS", raising=False)
    monkeypatch.setenv("CAPSTAN_STATE", str(tmp_path / "state"))
    files = ["# recipe.yaml\ndataset: s3://bucket/ds\nsource: {format: world}\n"]
    files += [text for language, text in BLOCK.findall((DOCS / page).read_text()) if language == "yaml"]
    for text in files:
        name = re.match(r"# (\S+)\n", text)
        assert name, f"{page}: a block of YAML begins with the file's name"
        Path(name[1]).write_text(text)
    assert run(arguments) == 0


def parse(arguments: list[str]) -> None:
    """Raise for an unknown command, option or argument; run nothing."""
    command = typer.main.get_command(app)
    name = "capstan"
    while hasattr(command, "resolve_command"):
        context = command.make_context(
            name, list(arguments), ignore_unknown_options=True, allow_interspersed_args=False
        )
        name, command, arguments = command.resolve_command(context, list(arguments))
    command.make_context(name, list(arguments))


def test_every_page_is_in_the_navigation_and_every_link_leads_somewhere() -> None:
    nav = yaml.safe_load((DOCS.parent / "mkdocs.yml").read_text())["nav"]
    pages = {page.name for page in DOCS.glob("*.md")}
    assert set(leaves(nav)) == pages
    for page in DOCS.glob("*.md"):
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            assert "://" in link or (page.parent / link).exists(), f"{page.name}: {link}"


def leaves(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    items = nav.values() if isinstance(nav, dict) else nav
    return [leaf for item in items for leaf in leaves(item)]
