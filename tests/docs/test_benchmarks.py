"""The scripts of benchmarks/ are too slow for tests; they import what exists, and read options that they declare."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest
from repo import HELPERS, ROOT
from source_tree import MODULES, imports, module_of

FOLDER = ROOT / "benchmarks"
# Of the extras `bench` and `fuzz`; copies.py does without pdqhash; resvg_py as examples/emoji/README.md says.
EXTRA = {"skimage", "sklearn", "pdqhash", "atheris", "resvg_py"}
SCRIPTS = sorted(FOLDER.rglob("*.py"))

pytestmark = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.relative_to(FOLDER).as_posix())


def test_imports_exist(script: Path) -> None:
    for name in imports(script):
        top = name.split(".")[0]
        if top == "capstan":
            module = module_of(name)
            assert module is not None
            rest = name.removeprefix(module).lstrip(".")
            assert not rest or rest in defined(MODULES[module]), name
        elif top == FOLDER.name:
            found = [ROOT / Path(*name.split(".")[:parts]) for parts in range(2, 5)]
            assert any(path.is_dir() or path.with_suffix(".py").exists() for path in found), name
        elif (HELPERS / f"{top}.py").exists():
            assert '"tests" / "helpers"' in script.read_text(), f"{name} is not on its path"
        elif top in EXTRA or (FOLDER / f"{top}.py").exists():
            continue
        elif (ROOT / "examples/emoji" / f"{top}.py").exists():
            assert '"examples/emoji"' in script.read_text(), f"{name} is not on its path"
        else:
            assert importlib.util.find_spec(top) is not None, name


def defined(path: Path) -> set[str]:
    """Return the names at the top level of a module."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def test_options_are_declared(script: Path) -> None:
    tree = ast.parse(script.read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    declared = set()
    for call in calls:
        if call.func.attr == "add_argument":  # type: ignore[attr-defined]
            dest = next((word.value.value for word in call.keywords if word.arg == "dest"), None)  # type: ignore[attr-defined]
            declared.add(dest or call.args[0].value.lstrip("-").replace("-", "_"))  # type: ignore[attr-defined]
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "arguments"
    }
    assert read <= declared
