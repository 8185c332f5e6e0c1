"""Commands and recipes in README and docs: capstan takes them; dry runs of submit are run on the page's own files."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pages import DOCS, PAGES, blocks, name_of
from repo import ROOT

from capstan.cluster.cli import app, run
from capstan.cluster.recipe import loaded

LINES = [(page, line) for page in PAGES for text in blocks(page, "sh") for line in text.splitlines()]
COMMANDS = [(page, line) for page, line in LINES if line.startswith("capstan ")]
GOALS = [(page, line) for page, line in LINES if line.startswith("make ")]
SNIPPETS = [(page, text) for page in PAGES for text in blocks(page, "yaml")]
OTHER_FILES = ("# clusters.yaml\n", "# prometheus.yml\n")
# What a snippet leaves out, and a whole recipe has.
RECAPTION = {"engine": "coca", "model": "./captioner"}
TRAIN = {"model": "diffusion", "run": "./out/run", "steps": 1}
DIFFUSION = {"autoencoder": "./out/autoencoder"}


def test_the_docs_have_commands_and_recipes() -> None:
    assert len(COMMANDS) > 60
    assert len(SNIPPETS) > 25


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{name_of(page)} {line}" for page, line in COMMANDS])
def test_a_command_is_right(page: Path, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = shlex.split(line, comments=True)[1:]
    if arguments[0] != "submit" or "--dry-run" not in arguments:
        parse(arguments)
        return
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CAPSTAN_CLUSTERS", raising=False)
    monkeypatch.setenv("CAPSTAN_STATE", str(tmp_path / "state"))
    Path("recipe.yaml").write_text("dataset: s3://bucket/ds\nsource: {format: world}\n")
    for text in blocks(page, "yaml"):
        if name := re.match(r"# (\S+)\n", text):
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


def test_every_goal_of_make_exists() -> None:
    known = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    mentioned = {(name_of(page), line.split()[1]) for page, line in GOALS}
    mentioned |= {(name_of(p), goal) for p in PAGES for goal in re.findall(r"`make ([\w-]+)`", p.read_text())}
    assert mentioned
    assert not {(page, goal) for page, goal in mentioned if goal not in known}


@pytest.mark.parametrize(("page", "text"), SNIPPETS, ids=[f"{name_of(p)} {t.splitlines()[0]}" for p, t in SNIPPETS])
def test_a_snippet_is_a_recipe(page: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sections that show some keys only are filled up; every key that is shown must exist, with a value that fits."""
    if page.name == "own-family.md":  # its recipe names the family that it shows
        (tmp_path / "painter.py").write_text(blocks(page, "python")[0])
        monkeypatch.syspath_prepend(str(tmp_path))
    raw = yaml.safe_load(text)
    if text.startswith(OTHER_FILES):
        return
    assert loaded(filled(raw)).dataset


def filled(raw: dict[str, Any]) -> dict[str, Any]:
    recipe = {"dataset": "./out/ds", "source": {"path": "urls.parquet"}} | raw
    if "recaption" in recipe:
        recipe["recaption"] = RECAPTION | recipe["recaption"]
    if "train" in recipe:
        train = recipe["train"] = TRAIN | recipe["train"]
        if train["model"] == "diffusion":
            train["diffusion"] = DIFFUSION | train.get("diffusion", {})
    return recipe


def test_every_page_is_in_the_navigation() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert set(leaves(nav)) == {page.name for page in DOCS.glob("*.md")}


def leaves(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    items = nav.values() if isinstance(nav, dict) else nav
    return [leaf for item in items for leaf in leaves(item)]


def test_the_extras_in_the_docs_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    page = (DOCS / "install.md").read_text()
    listed = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`[^|]*) \|", page, re.MULTILINE))))
    assert listed == set(project["optional-dependencies"]) - {"dev", "docs", "bench", "fuzz"}
    named = {(name_of(p), extra) for p in PAGES for extra in re.findall(r"capstan-t2i\[(\w+)\]", p.read_text())}
    assert not {(page, extra) for page, extra in named if extra not in listed}
