"""Text from elsewhere → text that is safe to print on a terminal"""

from __future__ import annotations

import logging
import re

# Control characters (C0 but for tab and line feed, DEL, C1), and those that reorder text.
_UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Return `text` with control characters as escapes such as \x1b, so that it cannot steer a terminal.

    >>> print(printable("a\x1b[31mred\u202e\r\nb"))
    a\x1b[31mred\u202e
    b
    """
    return _UNSAFE.sub(lambda found: ascii(found[0])[1:-1], text.replace("\r\n", "\n"))


class PrintableFormatter(logging.Formatter):
    """A formatter whose lines cannot steer a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
