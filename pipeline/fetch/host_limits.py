"""What all workers of a run know together of the hosts: who may send requests, pauses, and rules of robots.txt

One such object is shared by the workers of a machine; a cluster has a few, by a hash of the host. Each worker tells now
and then what it uses and wants (see `hosts.py`), and is told what it may use. A worker that is not heard of for
`_LOAN_S` has ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from capstan.pipeline.fetch import robots
from capstan.pipeline.fetch.errors import FetchError
from capstan.pipeline.fetch.robots_cache import RobotsCache

_LOAN_S: Final = 10.0
_READING_S: Final = 120.0  # for a robots.txt; then another worker reads it

Verdict = robots.Rules | FetchError


class Wish(NamedTuple):
    """What a worker does with a host: requests in flight, and rows that wait for a slot."""

    using: int
    waiting: int


class Grant(NamedTuple):
    """How many requests a worker may have in flight, and how long the host asked all to wait, for which reason."""

    slots: int
    pause_s: float = 0.0
    reason: str = ""


class Answer(NamedTuple):
    """The answer to a worker: host → grant; origin → its rules and how long they last, None to read them itself.

    An origin that another worker is reading is left out.
    """

    grants: dict[str, Grant]
    rules: dict[str, tuple[Verdict, float] | None]


@dataclass
class _Loan:
    slots: int  # that the worker may use, or still uses
    wanted: int
    until: float


class HostLimits:
    """Lends at most `per_host` slots of each host, whoever asks, and in equal shares where they are scarce."""

    def __init__(self, per_host: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_host, self._clock = per_host, clock
        self._loans: dict[str, dict[str, _Loan]] = {}
        self._pauses: dict[str, tuple[float, str]] = {}  # until, reason
        self._rules = RobotsCache()
        self._reading: dict[str, float] = {}  # origin → until

    def exchange(
        self,
        worker: str,
        wishes: Mapping[str, Wish],
        pauses: Mapping[str, tuple[float, str]],
        origins: Sequence[str],
        read: Mapping[str, tuple[Verdict, float]],
    ) -> Answer:
        """Take a worker's wishes, the pauses (seconds, reason) that hosts asked for, and the rules that it has read.

        `origins` are those whose rules it wants.
        """
        now = self._clock()
        for host, (seconds, reason) in pauses.items():
            self._pauses[host] = max(self._pauses.get(host, (0.0, "")), (now + seconds, reason))
        for origin, (rules, last_s) in read.items():
            self._reading.pop(origin, None)
            self._rules.put(origin, rules, last_s)
        self._pauses = {host: pause for host, pause in self._pauses.items() if pause[0] > now}
        return Answer(
            {host: self._lend(worker, host, wish, now) for host, wish in wishes.items()},
            {origin: answer for origin in origins for answer in self._look_up(origin, now)},
        )

    def lent(self, host: str) -> int:
        """Return how many slots of a host are lent."""
        return sum(loan.slots for loan in self._loans.get(host, {}).values())

    def _lend(self, worker: str, host: str, wish: Wish, now: float) -> Grant:
        loans = {name: loan for name, loan in self._loans.get(host, {}).items() if loan.until > now and name != worker}
        wanted = wish.using + wish.waiting
        askers = 1 + sum(loan.wanted > 0 for loan in loans.values())
        share = max(1, self._per_host // askers)
        free = max(0, self._per_host - sum(loan.slots for loan in loans.values()))
        slots = min(2 * wanted, free)  # twice, so that the next rows need not ask
        if any(loan.slots < min(share, loan.wanted) for loan in loans.values()):
            slots = min(slots, share)
        if wanted:
            loans[worker] = _Loan(max(slots, wish.using), wanted, now + _LOAN_S)
        self._loans[host] = loans
        if not loans:
            del self._loans[host]
        until, reason = self._pauses.get(host, (now, ""))
        return Grant(slots, until - now, reason)

    def _look_up(self, origin: str, now: float) -> list[tuple[Verdict, float] | None]:
        """Return a list of the answer, empty while another worker reads the file."""
        if (known := self._rules.entry(origin)) is not None:
            return [known]
        if self._reading.get(origin, 0.0) > now:
            return []
        self._reading[origin] = now + _READING_S
        return [None]
