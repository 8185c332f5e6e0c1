"""The source files, what they import, and the tree of docs/architecture.md.

`python tests/helpers/source_tree.py` writes the tree into docs/architecture.md (`make architecture`).
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "architecture.md"
FLOORS = ["pipeline", "recaption", "training", "cluster"]  # lowest first
FILES = sorted(path for top in (*FLOORS, "capstan") for path in (ROOT / top).rglob("*.py"))
START, END = "<!-- tree: made by `make architecture` -->\n", "<!-- end of the tree -->\n"
_WIDTH = 27  # columns of the tree before the descriptions


def module_name(path: Path) -> str:
    """Return the name by which a file is imported: pipeline/errors.py → capstan.pipeline.errors."""
    parts = [part for part in path.relative_to(ROOT).with_suffix("").parts if part not in ("capstan", "__init__")]
    return ".".join(["capstan", *parts])


MODULES = {module_name(path): path for path in FILES}


@functools.cache
def imports(path: Path, *, at_import_time_only: bool = False) -> frozenset[str]:
    """Return the full names that `path` imports, at any depth; names under `if TYPE_CHECKING` do not count."""
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

    visit(_tree(path))
    return frozenset(found)


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_of(name: str) -> str | None:
    """Return the module of ours that `name` (a module, or something in one) belongs to."""
    while name:
        if name in MODULES:
            return name
        name = name.rpartition(".")[0]
    return None


def folder_of(path: Path) -> str:
    """Return a file's folder, e.g. pipeline/fetch. The files at a floor's root are a node each: they are shared."""
    relative = path.relative_to(ROOT)
    if relative.parent.as_posix() in (*FLOORS, "capstan"):
        return relative.as_posix()
    return relative.parent.as_posix()


def purpose(path: Path) -> str:
    """Return the first line of a module's docstring, without its full stop."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0].removesuffix(".")


def tree() -> str:
    """Return the folders and files of the source with their purposes, as a Markdown code block."""
    lines = [line for top in ("capstan", *FLOORS) for line in _lines(ROOT / top, 0)]
    return "\n".join(["``` text", *lines, "```"]) + "\n"


def _lines(folder: Path, depth: int) -> Iterator[str]:
    indent = "  " * depth
    start = folder / "__init__.py"
    yield f"{indent}{folder.name + '/':<{_WIDTH - len(indent)}} {purpose(start) if start.exists() else ''}".rstrip()
    for path in sorted(folder.glob("*.py")):
        if path.name != "__init__.py":
            yield f"{indent}  {path.name:<{_WIDTH - len(indent) - 2}} {purpose(path)}".rstrip()
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink() and path.name != "__pycache__":
            yield from _lines(path, depth + 1)


def page_with_tree(page: str) -> str:
    """Return the text of docs/architecture.md with the tree as it is now."""
    before, _, rest = page.partition(START)
    return before + START + "\n" + tree() + "\n" + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page_with_tree(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
