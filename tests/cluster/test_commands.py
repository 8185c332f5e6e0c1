"""The command line as a user first meets it: help, examples, groups, completion, version."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from repo import ROOT

from capstan.cluster.cli import app, run
from capstan.cluster.commands import COMMANDS, GROUPS, LONGEST, leaves

ROOT_COMMAND: Any = typer.main.get_command(app)


def find(name: str) -> Any:
    """Return the command of a name such as `captions diff`."""
    command = ROOT_COMMAND
    for part in name.split():
        command = command.commands[part]
    return command


def all_names(command: Any = ROOT_COMMAND, prefix: str = "") -> set[str]:
    found = set[str]()
    for name, inner in command.commands.items():
        found |= {prefix + name} | (all_names(inner, f"{prefix}{name} ") if hasattr(inner, "commands") else set())
    return found


def test_the_index_has_every_command() -> None:
    assert all_names() == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_summary_is_a_short_sentence(name: str) -> None:
    summary = COMMANDS[name].summary
    assert len(summary) <= LONGEST
    assert summary.endswith(".")
    assert find(name).get_short_help_str(LONGEST) == summary


@pytest.mark.parametrize("name", [name for name, _ in leaves()])
def test_help_has_examples_that_parse(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run([*name.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80 or "--set storage.endpoint_url" in text
    assert COMMANDS[name].examples
    assert text.count("Example") == text.count("Examples:\n") == 1, "examples belong into the index alone"
    for example in COMMANDS[name].examples:
        assert f"    {example}\n" in text + "\n"
        words = shlex.split(example.partition(" > ")[0])
        assert words[: 1 + len(name.split())] == ["capstan", *name.split()]
        find(name).make_context(name, words[1 + len(name.split()) :])  # raises for an unknown option or a missing value


def test_help_lists_all_commands_by_group_and_cuts_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    assert "..." not in text.partition("Options:")[2]
    positions = [text.index(f"\n{group}:\n") for group in GROUPS]
    assert positions == sorted(positions)
    for name in all_names():
        if " " not in name:
            assert f"\n  {name} " in text
    for group in ("captions", "experiment", "jobs"):
        assert run([group, "--help"]) == 0
        assert "..." not in capsys.readouterr().out.partition("Options:")[2]


@pytest.mark.parametrize("arguments", [[], ["jobs"], ["captions"]])
def test_without_a_command_the_help_is_shown(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("Usage: ")
    assert "error:" not in err


def test_a_wrong_command_is_corrected(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["buidl"]) == 2
    line = "error: No such command 'buidl'. Fix: did you mean 'build'? see `capstan --help`\n"
    assert capsys.readouterr().err == line


def completed(shell: str, *words: str) -> set[str]:
    """Return what a shell offers for the last of the words."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "_CAPSTAN_COMPLETE": f"complete_{shell}"}
    env |= {
        "COMP_WORDS": "\n".join(words),  # as the script for bash joins them
        "COMP_CWORD": str(len(words) - 1),
        "_TYPER_COMPLETE_ARGS": " ".join(words),
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    code = "import sys; sys.argv[0] = 'capstan'; from capstan.cluster.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    return set(done.stdout.replace('"', " ").replace(":", " ").split())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands(shell: str) -> None:
    assert {"recaption", "report", "remove"} <= completed(shell, "capstan", "re")


BUILD = ("capstan", "build", "r.yaml", "--set")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_keys_of_the_recipe(shell: str) -> None:
    assert {"train.diffusion.", "train.diverged."} <= completed(shell, *BUILD, "train.di")


def test_shells_complete_values_of_a_key() -> None:
    assert completed("zsh", *BUILD, "image.resize=ke") >= {"image.resize=keep_ratio"}
    assert completed("fish", *BUILD, "fetch.robots=") >= {"fetch.robots=true", "fetch.robots=false"}
    assert completed("bash", *BUILD, "image.resize", "=", "ke") == {"keep_ratio"}, "bash splits words at ="
    assert completed("bash", *BUILD, "fetch.robots", "=") == {"true", "false"}


def test_shells_complete_reasons_and_layers(tmp_path: Path) -> None:
    assert "timeout,robots" in completed("zsh", "capstan", "build", "r.yaml", "--retry", "timeout,ro")
    (tmp_path / "captions" / "mine").mkdir(parents=True)
    (tmp_path / "captions" / "mine" / "recipe.json").write_text("{}")
    assert "mine" in completed("bash", "capstan", "captions", "export", str(tmp_path), "mi")
    assert "reason=timeout" in completed("zsh", "capstan", "report", "ds", "--samples", "reason=ti")


def test_the_former_name_of_force_is_hidden_and_works(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["submit", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--force" in text
    assert "--anyway" not in text
    submit = find("submit")
    assert submit.make_context("submit", ["--anyway", "--", "build", "x"]).params["anyway"] is True


def test_help_imports_nothing_heavy() -> None:
    """Help and completion stay quick: they load no recipe, no storage and no model."""
    helps = [["--help"], *([*name.split(), "--help"] for name, _ in leaves())]
    code = f"import sys; from capstan.cluster.cli import run; [run(help) for help in {helps}]; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"numpy", "pyarrow", "fsspec", "torch", "ray", "duckdb", "aiohttp", "PIL", "cv2", "capstan.pipeline.config"}
    assert done.stdout.count("Usage: ") == len(helps)
    assert not heavy & set(done.stdout.splitlines()[-1].split())
