"""The house stays as designed: floors import only downward, files are acyclic, heavy libraries have one door each."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ["pipeline", "recaption", "training", "cluster"]  # lowest first
FILES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))

# Library → the only files that may import it.
DOORS = {
    "fsspec": {"pipeline/storage.py"},
    "s3fs": {"pipeline/storage.py"},
    "ray.data": {"pipeline/units.py"},
    "ray.train": {"training/launch.py"},
    "accelerate": {"training/engine.py"},
    "deepspeed": {"training/engine.py"},
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imports(path: Path, *, at_import_time_only: bool = False) -> set[str]:
    """Full names that `path` imports, at any depth; names under `if TYPE_CHECKING` do not count."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if at_import_time_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def ours(name: str) -> str | None:
    """The module of ours that `name` (a module, or something in one) belongs to."""
    while name:
        if name in MODULES:
            return name
        name = name.rpartition(".")[0]
    return None


@pytest.mark.parametrize("name", MODULES)
def test_floors_import_only_downward(name: str) -> None:
    floor = FLOORS.index(name.split(".")[0])
    above = {i for i in imports(MODULES[name]) if i.split(".")[0] in FLOORS[floor + 1 :]}
    assert not above, f"{name} imports from a floor above: {above}"


def test_files_are_acyclic() -> None:
    graph = {}
    for name, path in MODULES.items():
        used = {ours(i) for i in imports(path, at_import_time_only=True)} - {None, name}
        # A package's own __init__ may gather what lies inside it.
        graph[name] = {u for u in used if u and not name.startswith(u + ".")}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"import cycle: {' → '.join(error.args[1])}")


@pytest.mark.parametrize("library", DOORS)
def test_each_heavy_library_has_one_door(library: str) -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for path in FILES
        if any(i == library or i.startswith(library + ".") for i in imports(path))
    }
    assert users <= DOORS[library], f"{library} is imported past its door: {users - DOORS[library]}"


def test_records_load_neither_torch_nor_ray() -> None:
    code = "import sys, pipeline.records; print(sorted({'torch', 'ray'} & sys.modules.keys()))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert loaded.stdout.strip() == "[]"


def readme_tree() -> set[str]:
    """The paths in the README's tree: a line a file or folder, or a folder's files on its own line."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").partition("## The tree")[2].splitlines()
    paths, folders = set[str](), list[str]()
    for line in lines:
        if found := re.match(r"    ( *)([\w.]+)(/?)\s+(.*)", line):
            depth, name, folder, text = len(found[1]) // 2, found[2], found[3], found[4]
            folders[depth:] = [name]
            paths.add("/".join(folders))
            if folder:
                paths |= {"/".join([*folders, file]) for file in re.findall(r"\w+\.py", text)}
    return paths


def test_readme_tree_names_every_source_file() -> None:
    sources = {path.relative_to(ROOT).as_posix() for path in FILES if path.name != "__init__.py"}
    named = {path for path in readme_tree() if path.endswith(".py") and not path.endswith("__init__.py")}
    assert named == sources, "the README's tree differs from the files that there are"
