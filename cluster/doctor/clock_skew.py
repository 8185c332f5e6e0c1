"""Clocks: buckets refuse requests signed minutes off, without saying why"""

from __future__ import annotations

import email.utils
import time
import urllib.error
import urllib.request
from typing import Final

from capstan.cluster.doctor.finding import Finding

_SKEW_S: Final = 120.0  # S3 refuses 15 minutes; a clock that is two minutes off is not synchronized
_HINT: Final = "synchronize the clock by NTP (timedatectl set-ntp true)"


def clock_against(url: str, name: str = "clock") -> Finding | None:
    """Compare this machine's clock with a server's, by the Date of a response. None if there is no response or Date."""
    request = urllib.request.Request(url, method="HEAD")
    sent = time.time()
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            date = response.headers.get("Date")
    except urllib.error.HTTPError as error:  # a response too: buckets refuse unsigned requests
        date = error.headers.get("Date")
    except (OSError, ValueError):
        return None
    if date is None:
        return None
    theirs = email.utils.parsedate_to_datetime(date).timestamp()
    off = (sent + time.time()) / 2 - theirs
    return Finding(name, abs(off) <= _SKEW_S, f"{abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} {url}", _HINT)
