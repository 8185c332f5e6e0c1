"""Keys, URLs, domains and SHA-256 sums that must not be in a dataset

    removed/blocklist.json             the name of the current list
    removed/blocklist-<hash>.parquet   kind, value: one row per entry, sorted

Entries come from the recipe and from takedowns. URLs and domains are kept as digests, so that the list does not reveal
what was removed. http and https, upper and lower case in the host name, and any #fragment make no difference to a URL.
A domain includes all its subdomains.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from capstan.pipeline import config
from capstan.pipeline.config import Recipe, fingerprint
from capstan.pipeline.errors import DamagedFile, RecipeError, StorageError
from capstan.pipeline.records import REMOVED
from capstan.pipeline.storage import Storage, find_files, open_file, parquet_bytes

log = logging.getLogger(__name__)

FOLDER: Final = "removed"
_POINTER: Final = f"{FOLDER}/blocklist.json"
_SCHEMA: Final = pa.schema([pa.field("kind", pa.string(), False), pa.field("value", pa.string(), False)])
_URL: Final = re.compile(r"^\s*https?://(?:[^/?#@]*@)?([^/?#:]*)(?::(\d+))?([^#]*)", re.IGNORECASE)
_DOMAIN: Final = re.compile(r"[^\s/@:?#]+\.[^\s/@:?#]+|localhost")


@dataclass(frozen=True)
class Blocklist:
    """`keys` and `sha256` as they are; `urls` and `domains` as returned by `url_digest` and `domain_digest`."""

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
        """A hash that changes with any entry."""
        return fingerprint([sorted(getattr(self, kind)) for kind in KINDS]) if self else ""

    def hits(self, keys: Iterable[str], urls: Iterable[str], sha256: Iterable[str]) -> list[bool]:
        """Return, for each row, whether the list names it. Columns: key, URL, and SHA-256 or ""."""
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
        """Return planned rows (PLAN_SCHEMA) with only the key left in those that the list names."""
        if not self:
            return planned
        columns = (planned[name].to_pylist() for name in ("key", "url", "hash"))
        return scrub_planned(planned, self.hits(*columns))


KINDS: Final = tuple(field.name for field in fields(Blocklist))


def scrub_planned(planned: pa.Table, removed: Sequence[bool]) -> pa.Table:
    """Return planned rows (PLAN_SCHEMA) with only the key left in those that are `removed`; `hash` marks them."""
    if not any(removed):
        return planned
    mask = pa.array(removed, pa.bool_())
    nothing = {"image": pa.scalar(None, pa.binary()), "extra": "{}", "hash": REMOVED, "offset": 0, "length": 0}
    columns = {
        field.name: planned[field.name]
        if field.name == "key"
        else pc.if_else(mask, pa.scalar(nothing.get(field.name, ""), field.type), planned[field.name])
        for field in planned.schema
    }
    return pa.table(columns, schema=planned.schema)


def is_removed(planned: dict[str, object]) -> bool:
    """Return whether a planned row was scrubbed."""
    return planned["hash"] == REMOVED and not planned["url"]


# URLs ----------------------------------------------------------------------------------------------------------------


def host_of(url: str) -> str:
    """Return the host of an http or https URL, "" for anything else.

    >>> host_of("HTTPS://me@Images.Example.org:8080/a.jpg")
    'images.example.org'
    """
    match = _URL.match(url)
    return _host(match[1]) if match else ""


def url_digest(url: str) -> str:
    """Return 32 hexadecimal digits, the same for equivalent URLs.

    >>> url_digest("http://Example.org/a?b#c") == url_digest("https://example.org:443/a?b")
    True
    """
    if match := _URL.match(url):
        port = f":{match[2]}" if match[2] and match[2] not in ("80", "443") else ""
        url = f"//{_host(match[1])}{port}{match[3].rstrip() or '/'}"
    return _digest(f"url {url}")


def domain_digest(domain: str) -> str:
    """Return 32 hexadecimal digits for a host name."""
    return _digest(f"domain {_host(domain)}")


def _host(name: str) -> str:
    name = name.lower().strip(".")
    try:
        return name if name.isascii() else name.encode("idna").decode()
    except UnicodeError:
        return name


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).hexdigest()


# Lists written by users ----------------------------------------------------------------------------------------------


def read_lists(lists: config.Blocklist, options: Callable[[str], str]) -> Blocklist:
    """Read the files that `lists` names: one entry per line; empty lines and those that start with # are skipped.

    Raises RecipeError for a file that cannot be read and for a line that is not an entry of its kind; `options` returns
    the field to name.
    """
    entries = {}
    for kind in KINDS:
        path = getattr(lists, kind)
        if path is not None:
            field = options(kind)
            (file,) = find_files(path, {}, field=field)[:1]
            entries[kind] = _entries(file.path, kind, field, file.stamp, file.size)
    return Blocklist(**entries)


@functools.lru_cache(maxsize=16)
def _entries(path: str, kind: str, field: str, stamp: str, size: int) -> frozenset[str]:
    """Read one list. `stamp` and `size` are for the cache only: workers call this for every unit."""
    try:
        with open_file(path, {}) as file:
            text = file.read().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError, StorageError) as error:
        hint = "name a UTF-8 text file with one entry per line"
        raise RecipeError(field, f"cannot read {path} ({error})", hint) from None
    return frozenset(entry for _, entry in _parsed(text, path, kind, field))


def _parsed(text: str, path: str, kind: str, field: str) -> Iterator[tuple[int, str]]:
    parse, wanted = _PARSERS[kind]
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if line and not line.startswith("#"):
            entry = parse(line)
            if entry is None:
                raise RecipeError(field, f"{path}, line {number}: {line[:60]!r} is not a {wanted}", "correct the line")
            yield number, entry


def _hex(digits: int) -> Callable[[str], str | None]:
    return lambda line: line.lower() if re.fullmatch(rf"[0-9a-fA-F]{{{digits}}}", line) else None


def _domain(line: str) -> str | None:
    name = host_of(line) or line.removeprefix("*.").strip(".")
    return domain_digest(name) if _DOMAIN.fullmatch(name) else None


_PARSERS: Final[dict[str, tuple[Callable[[str], str | None], str]]] = {
    "keys": (_hex(32), "key of 32 hexadecimal digits"),
    "urls": (url_digest, "URL"),
    "domains": (_domain, "domain"),
    "sha256": (_hex(64), "SHA-256 sum of 64 hexadecimal digits"),
}


# The dataset's own list ----------------------------------------------------------------------------------------------


def blocked(recipe: Recipe, storage: Storage) -> Blocklist:
    """Return the entries of the recipe together with those of takedowns."""
    return read_lists(recipe.blocklist, lambda kind: f"blocklist.{kind}") | read_removed(storage)


def read_removed(storage: Storage) -> Blocklist:
    """Return the entries that takedowns left in the dataset at `storage`."""
    try:
        names = [storage.read_json(_POINTER, "")["list"]]
    except FileNotFoundError:
        return Blocklist()
    except (DamagedFile, KeyError):  # every list holds all that the lists before it hold
        names = [name for name in storage.names(FOLDER) if name.startswith(f"{FOLDER}/blocklist-")]
        if not names:
            hint = "run `capstan remove` again with all that was ever removed: the list itself is gone"
            raise DamagedFile(storage.path(_POINTER), "not JSON, and no list is left", hint) from None
        log.warning("%s is damaged: using %s", storage.path(_POINTER), ", ".join(names))
    return functools.reduce(operator.or_, (_read(storage.url, name, _Hidden(storage)) for name in names))


def add_removed(storage: Storage, more: Blocklist) -> None:
    """Add `more` to the dataset's list."""
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
    """Read a list by its name, which holds its content's hash. Cached, since workers call this for every unit."""
    table = hidden.storage.read_table(name)
    kinds, values = table["kind"].to_pylist(), table["value"].to_pylist()
    return Blocklist(**{kind: frozenset(v for k, v in zip(kinds, values, strict=True) if k == kind) for kind in KINDS})


@dataclass(frozen=True, eq=False)
class _Hidden:
    """A storage that is not part of a cache key."""

    storage: Storage

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hidden)

    def __hash__(self) -> int:
        return 0
