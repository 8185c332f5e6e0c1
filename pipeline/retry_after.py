"""Retry-After header → seconds to wait"""

from __future__ import annotations

import re
import time
from email.utils import parsedate_to_datetime
from typing import Final

_SECONDS: Final = re.compile(r"[0-9]+(\.[0-9]*)?")  # RFC 9110 has whole numbers; some servers send fractions


def retry_after(value: str) -> float | None:
    """Return the seconds that a Retry-After header asks to wait (RFC 9110, 10.2.3), None if there is no valid value.

    The value is a number of seconds or a date; a date in the past means 0. There is no upper limit.

    >>> retry_after("120"), retry_after(""), retry_after("Wed, 21 Oct 2015 07:28:00 GMT")
    (120.0, None, 0.0)
    """
    text = value.strip()
    if _SECONDS.fullmatch(text):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None
