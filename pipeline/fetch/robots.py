"""robots.txt and X-Robots-Tag → whether an image may be fetched"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

# Directives that keep an image out of training data (noai, noimageai) or out of any index of images.
_FORBIDDING: Final = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
_WITH_VALUE: Final = frozenset({"max-snippet", "max-image-preview", "max-video-preview", "unavailable_after"})
_TOKEN: Final = re.compile(r"[A-Za-z_*][A-Za-z0-9_.-]*")
_ESCAPE: Final = re.compile(r"%([0-9A-Fa-f]{2})")
_ASCII: Final = "".join(map(chr, range(0x21, 0x7F)))


def product_token(user_agent: str) -> str:
    """Return the name that robots.txt uses for a user agent.

    >>> product_token("capstan/0.1 (image-text dataset builder)")
    'capstan'
    """
    found = _TOKEN.match(user_agent)
    return found.group().lower() if found else user_agent.lower()


@dataclass(frozen=True, slots=True)
class _Patterns:
    """Path patterns, longest first, as lines of two strings: one string per pattern would take five times the memory.

    `prefixes` have no wildcard. `wild` alternates the longest literal part of a pattern, which a matching path must
    contain, and the pattern.
    """

    prefixes: str
    wild: str

    @classmethod
    def of(cls, patterns: Iterable[str]) -> _Patterns:
        prefixes, wild = list[str](), list[str]()
        for pattern in sorted(set(patterns), key=len, reverse=True):
            if "*" in pattern or pattern.endswith("$"):
                wild += [max(pattern.removesuffix("$").split("*"), key=len), pattern]
            else:
                prefixes.append(pattern)
        return cls("\n".join(prefixes), "\n".join(wild))

    def longest(self, path: str) -> int:
        """Return the length of the longest pattern that matches, 0 if none does."""
        best = next((len(prefix) for prefix in self.prefixes.split("\n") if path.startswith(prefix)), 0)
        if self.wild:
            lines = self.wild.split("\n")
            for piece, pattern in zip(lines[::2], lines[1::2], strict=True):
                if piece in path and _matches(pattern, path):
                    return max(best, len(pattern))
        return best


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules of one robots.txt that apply to this user agent."""

    forbidden: _Patterns
    allowed: _Patterns

    @classmethod
    def of(cls, rules: Iterable[tuple[bool, str]]) -> Rules:
        """Return the rules given as (allow?, path pattern)."""
        rules = list(rules)
        return cls(*(_Patterns.of(pattern for allow, pattern in rules if allow == kind) for kind in (False, True)))

    def allows(self, path: str) -> bool:
        """Return whether `path` (with its query) may be fetched.

        The longest match decides; at a tie, Allow wins (RFC 9309, 2.2.2).

        >>> Rules.of([(False, "/private"), (True, "/private/open")]).allows("/private/open/a.jpg")
        True
        """
        if not self.forbidden.prefixes and not self.forbidden.wild:
            return True
        path = _normal(path)
        against = self.forbidden.longest(path)
        return not against or self.allowed.longest(path) >= against

    @property
    def size(self) -> int:
        """The number of characters in memory."""
        return sum(len(part.prefixes) + len(part.wild) for part in (self.forbidden, self.allowed))


ALL_ALLOWED: Final = Rules.of([])


def parse(text: str, token: str) -> Rules:
    """Return the rules of a robots.txt for the robot `token`: of all groups that name it, else of those for `*`.

    Invalid lines are skipped, as RFC 9309 requires (2.2.4).
    """
    groups: dict[str, list[tuple[bool, str]]] = {}  # for `token` and `*` only: a file may name thousands of others
    agents: set[str] = set()
    in_rules = True
    for line in text.removeprefix("\ufeff").splitlines():
        name, colon, value = line.partition("#")[0].partition(":")
        name, value = name.strip().lower(), value.strip()
        if not colon:
            continue
        if name == "user-agent":
            if in_rules:  # rules came before: a new group starts
                agents, in_rules = set(), False
            agent = product_token(value)
            if agent in (token, "*"):
                agents.add(agent)
                groups.setdefault(agent, [])
        elif name in ("allow", "disallow"):
            in_rules = True
            if value and agents:  # an empty Disallow forbids nothing
                rule = name == "allow", _normal(value)
                for agent in agents:
                    groups[agent].append(rule)
    return Rules.of(groups.get(token, groups.get("*", [])))


def _normal(path: str) -> str:
    """Return a path's normal form: non-ASCII escaped, escapes upper-case, needless ones undone (RFC 9309, 2.2.2)."""

    def undo(escape: re.Match[str]) -> str:
        letter = chr(int(escape.group(1), 16))
        return letter if letter.isascii() and (letter.isalnum() or letter in "-._~") else escape.group().upper()

    return _ESCAPE.sub(undo, quote(path, safe=_ASCII))


def _matches(pattern: str, path: str) -> bool:
    """Return whether `pattern` matches: `*` is any run of characters, `$` at the end anchors.

    Takes linear time, since patterns come from strangers.
    """
    anchored = pattern.endswith("$")
    first, *others = pattern.removesuffix("$").split("*")
    if not path.startswith(first):
        return False
    at = len(first)
    if anchored:
        if not others:
            return at == len(path)
        last = others.pop()
        if not path.endswith(last):
            return False
        end = len(path) - len(last)
    else:
        end = len(path)
    for piece in others:
        at = path.find(piece, at, end)
        if at < 0:
            return False
        at += len(piece)
    return at <= end


def forbidden_by(headers: Iterable[str], token: str) -> str:
    """Return the first X-Robots-Tag directive that forbids the robot `token` to use the image, or "".

    A directive may be meant for one robot: `otherbot: noai, noindex` applies only to otherbot.

    >>> forbidden_by(["nofollow, noai"], "capstan"), forbidden_by(["otherbot: noai"], "capstan")
    ('noai', '')
    """
    for header in headers:
        for_us = True
        for part in header.split(","):
            name, colon, value = part.strip().partition(":")
            name = name.strip().lower()
            if colon and name not in _WITH_VALUE and _TOKEN.fullmatch(name):
                for_us = name in ("*", token)
                name = value.strip().lower()
            if for_us and name in _FORBIDDING:
                return name
    return ""
