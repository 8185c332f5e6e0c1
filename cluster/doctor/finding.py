"""The result of one check of doctor"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """What was checked, whether it is fine, what was found, and how to fix it."""

    name: str
    ok: bool
    seen: str
    hint: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def size(count: float) -> str:
    """Return a number of bytes for people.

    >>> size(3 * 2**30), size(5e6)
    ('3.0 GiB', '4.8 MiB')
    """
    gib = count / 2**30
    return f"{gib:,.1f} GiB" if gib >= 1 else f"{count / 2**20:,.1f} MiB"
