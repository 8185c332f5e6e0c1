"""Clocks: a bucket refuses requests that are signed some minutes off, and says only that they are forbidden."""

from __future__ import annotations

import email.utils
import time
import urllib.error
import urllib.request
from typing import Final

from capstan.cluster.doctor.finding import Finding

_SKEW_S: Final = 120.0  # S3 refuses 15 minutes; a clock that is two off is not kept
_MEND: Final = "set the clock by NTP (timedatectl set-ntp true)"


def clock_against(url: str, name: str = "clock") -> Finding | None:
    """This machine's clock against that of a server, by the Date of an answer; None where it sends none."""
    request = urllib.request.Request(url, method="HEAD")
    asked = time.time()
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            date = answer.headers.get("Date")
    except urllib.error.HTTPError as error:  # an answer too: buckets refuse what is not signed
        date = error.headers.get("Date")
    except (OSError, ValueError):
        return None
    if date is None:
        return None
    theirs = email.utils.parsedate_to_datetime(date).timestamp()
    off = (asked + time.time()) / 2 - theirs
    return Finding(name, abs(off) <= _SKEW_S, f"{abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} {url}", _MEND)
