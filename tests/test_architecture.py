"""The layout stays as designed: floors import only downward, files and folders are acyclic, heavy libraries have one
door each, and docs/architecture.md shows the tree as it is.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from graphlib import CycleError, TopologicalSorter

import pytest
from source_tree import FILES, FLOORS, MODULES, PAGE, ROOT, folder_of, imports, module_of, page_with_tree

# Library → the only files that may import it.
DOORS = {
    "fsspec": {"pipeline/storage/__init__.py"},
    "s3fs": {"pipeline/storage/__init__.py"},
    "ray.data": set(),
    "ray.train": {"training/launch.py"},
    "accelerate": {"training/distributed/engine.py"},
    "deepspeed": {"training/distributed/engine.py"},
    "av": {"pipeline/media/codec.py", "pipeline/media/reader.py"},
}
MOST_FILES = 16  # per folder


def assert_acyclic(graph: dict[str, set[str]], what: str) -> None:
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"import cycle of {what}: {' → '.join(error.args[1])}")


@pytest.mark.parametrize("name", [name for name in MODULES if name.count(".") and name.split(".")[1] in FLOORS])
def test_floors_import_only_downward(name: str) -> None:
    above = FLOORS[FLOORS.index(name.split(".")[1]) + 1 :]
    found = {i for i in imports(MODULES[name]) if i.startswith("capstan") and [*i.split("."), ""][1] in above}
    assert not found, f"{name} imports from a floor above: {found}"


def test_files_import_each_other_by_their_installed_name() -> None:
    bare = {(path.name, i) for path in FILES for i in imports(path) if i.split(".")[0] in FLOORS}
    assert not bare, "these are found only where the working directory is the repository"


def test_files_are_acyclic() -> None:
    graph = {}
    for name, path in MODULES.items():
        used = {module_of(i) for i in imports(path, at_import_time_only=True)} - {None, name}
        # A package's own __init__ may gather what lies inside it.
        graph[name] = {u for u in used if u and not name.startswith(u + ".")}
    assert_acyclic(graph, "files")


def test_folders_are_acyclic() -> None:
    """Imports inside functions count here: a folder is a step, and its data come from the steps before it."""
    graph: dict[str, set[str]] = {}
    for path in MODULES.values():
        used = {module_of(i) for i in imports(path)} - {None}
        folders = {folder_of(MODULES[name]) for name in used if name}
        graph.setdefault(folder_of(path), set()).update(folders - {folder_of(path)})
    for nodes in graph.values():
        nodes -= {"capstan/__init__.py"}  # every import passes through it; it imports nothing itself before it is asked
    assert_acyclic(graph, "folders")


def test_no_folder_is_too_full() -> None:
    counts = Counter(path.parent.relative_to(ROOT).as_posix() for path in FILES)
    full = {folder: count for folder, count in counts.items() if count > MOST_FILES}
    assert not full


@pytest.mark.parametrize("library", DOORS)
def test_each_heavy_library_has_one_door(library: str) -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for path in FILES
        if any(i == library or i.startswith(library + ".") for i in imports(path))
    }
    assert users <= DOORS[library], f"{library} is imported past its door: {users - DOORS[library]}"


@pytest.mark.parametrize("module", ["capstan", "capstan.pipeline.records"])
def test_loads_neither_torch_nor_ray(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'ray'}} & sys.modules.keys()))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


def test_every_file_says_what_it_is_for() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page_with_tree(page) == page, "the tree of docs/architecture.md is out of date; run `make architecture`"
