"""What must not be in a dataset: keys, addresses, domains, SHA-256 sums; given by the recipe, or left by takedowns.

    removed/blocklist.json             the name of the list that holds now
    removed/blocklist-<hash>.parquet   kind, value: one row an entry, sorted

Addresses and domains are kept as digests: a list of what was removed must not tell it. An address is the same with http
and https, in any case of the host's letters, and with any #fragment. A domain stands for all its subdomains.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from capstan.pipeline import config
from capstan.pipeline.config import Recipe, fingerprint
from capstan.pipeline.errors import RecipeError, StorageError
from capstan.pipeline.records import PLAN_SCHEMA, REMOVED
from capstan.pipeline.storage import Storage, find_files, open_file, parquet_bytes

FOLDER: Final = "removed"
_POINTER: Final = f"{FOLDER}/blocklist.json"
_SCHEMA: Final = pa.schema([pa.field("kind", pa.string(), False), pa.field("value", pa.string(), False)])
_ADDRESS: Final = re.compile(r"^\s*https?://(?:[^/?#@]*@)?([^/?#:]*)(?::(\d+))?([^#]*)", re.IGNORECASE)
_DOMAIN: Final = re.compile(r"[^\s/@:?#]+\.[^\s/@:?#]+|localhost")


@dataclass(frozen=True)
class Blocklist:
    """`keys` and `sha256` as they are; `urls` and `domains` as `url_digest` and `domain_digest` make them."""

    keys: frozenset[str] = frozenset()
    urls: frozenset[str] = frozenset()
    domains: frozenset[str] = frozenset()
    sha256: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.keys or self.urls or self.domains or self.sha256)

    def __or__(self, other: Blocklist) -> Blocklist:
        return Blocklist(**{kind: getattr(self, kind) | getattr(other, kind) for kind in KINDS})

    @property
    def digest(self) -> str:
        """Changes with any entry."""
        return fingerprint([sorted(getattr(self, kind)) for kind in KINDS]) if self else ""

    def hits(self, keys: Iterable[str], urls: Iterable[str], sha256: Iterable[str]) -> list[bool]:
        """Which rows it names. Their columns: key, address, and sum or ""."""
        named = [key in self.keys or sum_ in self.sha256 for key, sum_ in zip(keys, sha256, strict=True)]
        if self.urls or self.domains:
            named = [hit or self._names(url) for hit, url in zip(named, urls, strict=True)]
        return named

    def _names(self, url: str) -> bool:
        if url_digest(url) in self.urls:
            return True
        labels = host_of(url).split(".") if self.domains else []
        return any(domain_digest(".".join(labels[at:])) in self.domains for at in range(len(labels)))

    def without(self, planned: pa.Table) -> pa.Table:
        """Planned rows (PLAN_SCHEMA): of those that are named only the key is left."""
        if not self:
            return planned
        columns = (planned[name].to_pylist() for name in ("key", "url", "hash"))
        return scrub_planned(planned, self.hits(*columns))


KINDS: Final = tuple(field.name for field in fields(Blocklist))


def scrub_planned(planned: pa.Table, removed: Sequence[bool]) -> pa.Table:
    """PLAN_SCHEMA: of the rows that are `removed` only the key is left, and `hash` says so."""
    if not any(removed):
        return planned
    mask = pa.array(removed, pa.bool_())
    nothing = {"image": pa.scalar(None, pa.binary()), "extra": "{}", "hash": REMOVED, "offset": 0, "length": 0}
    columns = {
        field.name: planned[field.name]
        if field.name == "key"
        else pc.if_else(mask, pa.scalar(nothing.get(field.name, ""), field.type), planned[field.name])
        for field in PLAN_SCHEMA
    }
    return pa.table(columns, schema=PLAN_SCHEMA)


def is_removed(planned: dict[str, object]) -> bool:
    """Whether a planned row is one that was scrubbed."""
    return planned["hash"] == REMOVED and not planned["url"]


# Addresses -----------------------------------------------------------------------------------------------------------


def host_of(url: str) -> str:
    """The host of an http or https address, "" for anything else.

    >>> host_of("HTTPS://me@Images.Example.org:8080/a.jpg")
    'images.example.org'
    """
    match = _ADDRESS.match(url)
    return _host(match[1]) if match else ""


def url_digest(url: str) -> str:
    """32 hexadecimal digits, the same for addresses that are the same.

    >>> url_digest("http://Example.org/a?b#c") == url_digest("https://example.org:443/a?b")
    True
    """
    if match := _ADDRESS.match(url):
        port = f":{match[2]}" if match[2] and match[2] not in ("80", "443") else ""
        url = f"//{_host(match[1])}{port}{match[3].rstrip() or '/'}"
    return _digest(f"url {url}")


def domain_digest(domain: str) -> str:
    """32 hexadecimal digits for a host's name."""
    return _digest(f"domain {_host(domain)}")


def _host(name: str) -> str:
    name = name.lower().strip(".")
    try:
        return name if name.isascii() else name.encode("idna").decode()
    except UnicodeError:
        return name


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).hexdigest()


# Lists that people write ---------------------------------------------------------------------------------------------


def read_lists(lists: config.Blocklist, options: Callable[[str], str]) -> Blocklist:
    """The files that `lists` names: an entry a line; empty lines and those that begin with # are left out.

    Raises RecipeError for one that cannot be read, and for a line that is no such entry; `options` names the field.
    """
    found = {}
    for kind in KINDS:
        path = getattr(lists, kind)
        if path is not None:
            field = options(kind)
            (file,) = find_files(path, {}, field=field)[:1]
            found[kind] = _entries(file.path, kind, field, file.stamp, file.size)
    return Blocklist(**found)


@functools.lru_cache(maxsize=16)
def _entries(path: str, kind: str, field: str, stamp: str, size: int) -> frozenset[str]:
    """`stamp` and `size` are for the cache only: workers ask for every unit."""
    try:
        with open_file(path, {}) as file:
            text = file.read().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError, StorageError) as error:
        raise RecipeError(field, f"cannot read {path} ({error})", "name a UTF-8 text file, an entry a line") from None
    return frozenset(entry for _, entry in _parsed(text, path, kind, field))


def _parsed(text: str, path: str, kind: str, field: str) -> Iterator[tuple[int, str]]:
    parse, wanted = _PARSERS[kind]
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if line and not line.startswith("#"):
            entry = parse(line)
            if entry is None:
                raise RecipeError(field, f"{path}, line {number}: {line[:60]!r} is no {wanted}", "correct the line")
            yield number, entry


def _hex(digits: int) -> Callable[[str], str | None]:
    return lambda line: line.lower() if re.fullmatch(rf"[0-9a-fA-F]{{{digits}}}", line) else None


def _domain(line: str) -> str | None:
    name = host_of(line) or line.removeprefix("*.").strip(".")
    return domain_digest(name) if _DOMAIN.fullmatch(name) else None


_PARSERS: Final[dict[str, tuple[Callable[[str], str | None], str]]] = {
    "keys": (_hex(32), "key of 32 hexadecimal digits"),
    "urls": (url_digest, "address"),
    "domains": (_domain, "domain"),
    "sha256": (_hex(64), "SHA-256 of 64 hexadecimal digits"),
}


# The dataset's own ---------------------------------------------------------------------------------------------------


def blocked(recipe: Recipe, storage: Storage) -> Blocklist:
    """What the recipe names and what was removed from the dataset."""
    return read_lists(recipe.blocklist, lambda kind: f"blocklist.{kind}") | read_removed(storage)


def read_removed(storage: Storage) -> Blocklist:
    """What was removed from the dataset at `storage`."""
    try:
        name = json.loads(storage.read(_POINTER))["list"]
    except FileNotFoundError:
        return Blocklist()
    return _read(storage.url, name, _Hidden(storage))


def add_removed(storage: Storage, more: Blocklist) -> None:
    """From now on `more` is blocked, too."""
    whole = read_removed(storage) | more
    rows = [(kind, value) for kind in KINDS for value in sorted(getattr(whole, kind))]
    table = pa.Table.from_pylist([dict(zip(_SCHEMA.names, row, strict=True)) for row in rows], _SCHEMA)
    name = f"{FOLDER}/blocklist-{whole.digest}.parquet"
    storage.write(name, parquet_bytes(table))
    storage.write(_POINTER, json.dumps({"list": name}).encode())
    old = [other for other in storage.names(FOLDER) if other.startswith(f"{FOLDER}/blocklist-") and other != name]
    storage.delete(*old)


@functools.lru_cache(maxsize=4)
def _read(url: str, name: str, hidden: _Hidden) -> Blocklist:
    """A list by its name, which has its content's hash: workers ask for every unit."""
    table = hidden.storage.read_table(name)
    kinds, values = table["kind"].to_pylist(), table["value"].to_pylist()
    return Blocklist(**{kind: frozenset(v for k, v in zip(kinds, values, strict=True) if k == kind) for kind in KINDS})


@dataclass(frozen=True, eq=False)
class _Hidden:
    """A storage that does not count among what a result is cached by."""

    storage: Storage

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hidden)

    def __hash__(self) -> int:
        return 0
