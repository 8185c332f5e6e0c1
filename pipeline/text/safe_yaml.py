"""YAML text → plain data, bounded in size, depth and time"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import yaml

from capstan.pipeline.text.printable import printable
from capstan.pipeline.text.regular_file import regular

MAX_CHARACTERS: Final = 1 << 18
MAX_DEPTH: Final = 50
MAX_NODES: Final = 200_000  # with each alias expanded, as whoever walks the data sees it


class InvalidYaml(Exception):
    """The text is not YAML, or not YAML that a person would write: the message is one line."""


class _Loader(yaml.SafeLoader):
    """SafeLoader without integers that no field can hold, and without the depth at which its scanner takes seconds."""

    def fetch_flow_collection_start(self, token: Any) -> None:
        _check_depth(self.flow_level + 1)
        super().fetch_flow_collection_start(token)

    def add_indent(self, column: int) -> bool:
        _check_depth(len(self.indents))
        return super().add_indent(column)

    def construct_yaml_int(self, node: Any) -> int:
        value = int(super().construct_yaml_int(node))
        if abs(value) >= 1 << 63:
            raise ValueError("an integer of more than 64 bits")
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def parse_file(path: Path) -> Any:
    """Return the data of a YAML file. Raises InvalidYaml, and OSError if it cannot be read."""
    try:
        with Path(regular(path, or_pipe=True)).open(encoding="utf-8") as file:
            return parse(file.read(MAX_CHARACTERS + 1))
    except UnicodeDecodeError as error:
        raise InvalidYaml(f"not UTF-8 ({error.reason} at byte {error.start})") from None


def parse(text: str) -> Any:
    """Return the data of a YAML document. Raises InvalidYaml, also for recursive, deep or exploding documents."""
    if len(text) > MAX_CHARACTERS:
        raise InvalidYaml(f"more than {MAX_CHARACTERS:,} characters")
    try:
        loader = _Loader(text)
    except yaml.YAMLError as error:  # characters that YAML does not allow
        raise InvalidYaml(_one_line(error)) from None
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node)
        return loader.construct_document(node)
    except RecursionError:
        raise InvalidYaml(f"nested deeper than {MAX_DEPTH} levels") from None
    except yaml.YAMLError as error:
        raise InvalidYaml(_one_line(error)) from None
    except (ValueError, OverflowError, TypeError) as error:  # e.g. integers of thousands of digits, impossible dates
        raise InvalidYaml(f"a value cannot be read ({_one_line(error)})") from None
    finally:
        loader.dispose()


def _check_depth(depth: int) -> None:
    if depth > MAX_DEPTH:
        raise InvalidYaml(f"nested deeper than {MAX_DEPTH} levels")


def _one_line(error: Exception) -> str:
    return printable(" ".join(str(error).split()))[:300]


def _measure(root: Any) -> None:
    """Raise InvalidYaml for a graph of nodes that is recursive, too deep, or too large once aliases are expanded."""
    sizes: dict[int, int] = {}  # node → nodes below it, itself included
    above: set[int] = set()
    stack: list[tuple[Any, bool]] = [(root, False)]
    while stack:
        node, is_done = stack.pop()
        children = _children(node)
        if is_done:
            above.discard(id(node))
            sizes[id(node)] = 1 + sum(sizes[id(child)] for child in children)
            if sizes[id(node)] > MAX_NODES:
                raise InvalidYaml(f"more than {MAX_NODES:,} values")
        elif id(node) in above:
            raise InvalidYaml(f"an alias in line {node.start_mark.line + 1} contains itself")
        elif id(node) not in sizes:
            above.add(id(node))
            _check_depth(len(above))
            stack.append((node, True))
            stack += [(child, False) for child in children]


def _children(node: Any) -> list[Any]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []
