"""The hosts of a worker's rows: how many requests each may get, and when

Alone, a worker may send `per_host` requests to each host at once. Workers of one run share that number through
`HostLimits`: rows wait until the worker has been lent a slot. Rules of robots.txt are shared in the same exchanges, so
that a run reads each once. While the shared object cannot be reached, what was lent last holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
import uuid
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

from capstan.pipeline.fetch.errors import FetchError
from capstan.pipeline.fetch.host_limits import Answer, Verdict, Wish
from capstan.pipeline.units.shared import Shared

log = logging.getLogger(__name__)

_LONGEST_PAUSE_S: Final = 60.0
_TOGETHER_S: Final = 0.02  # rows that start at about the same time share an exchange
_AGAIN_S: Final = 0.25  # while rows wait
_REPEAT_S: Final = 1.0  # what is used is told so often: slots that are idle go to others


@dataclass
class _Call:
    """What one of the shared objects is told: the arguments of `HostLimits.exchange`."""

    wishes: dict[str, Wish] = field(default_factory=dict)
    pauses: dict[str, tuple[float, str]] = field(default_factory=dict)
    origins: list[str] = field(default_factory=list)
    read: dict[str, tuple[Verdict, float]] = field(default_factory=dict)


class Host:
    """The limits for one host: a number of simultaneous requests, and no request before a time that it named."""

    def __init__(self, slots: int, wake: Callable[[], None]) -> None:
        self.slots, self.using, self.waiting = slots, 0, deque[asyncio.Future[None]]()
        self._wake = wake
        self._resume_at = 0.0  # monotonic seconds
        self._reason = ""
        self.unreported: tuple[float, str] | None = None  # a pause that others do not know of yet

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Wait for a free slot and hold it. Raises FetchError if the host asked for a pause that is too long."""
        if self.using < self.slots and not self.waiting:
            self.using += 1
        else:
            turn = asyncio.get_running_loop().create_future()
            self.waiting.append(turn)
            self._wake()
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._leave()
                raise
        try:
            await self._ready()
            yield
        finally:
            self._leave()

    def pause(self, seconds: float, reason: str) -> None:
        """Send no request for so long."""
        if self.hold(seconds, reason):
            self.unreported = (seconds, reason)
            self._wake()

    def hold(self, seconds: float, reason: str) -> bool:
        """Wait at least this long from now on; return whether that is longer than before."""
        until = time.monotonic() + seconds
        longer = until > self._resume_at
        if longer:
            self._resume_at, self._reason = until, reason
        return longer

    def may_use(self, slots: int) -> None:
        """Use this many slots from now on; requests in flight go on."""
        self.slots = slots
        self._let_in()

    @property
    def is_idle(self) -> bool:
        """Whether no row needs it, nor a pause that it asked for."""
        return not self.using and not self.waiting and self._resume_at <= time.monotonic()

    def _leave(self) -> None:
        self.using -= 1
        self._let_in()

    def _let_in(self) -> None:
        while self.waiting and self.using < self.slots:
            turn = self.waiting.popleft()
            if not turn.done():
                self.using += 1
                turn.set_result(None)

    async def _ready(self) -> None:
        """Wait for the end of the pause."""
        while (left := self._resume_at - time.monotonic()) > 0:
            if left > _LONGEST_PAUSE_S:
                raise FetchError(self._reason, f"the host asked for a pause of another {left:.0f} s")
            await asyncio.sleep(left)


class Hosts:
    """All hosts of one fetch. `close` it."""

    def __init__(self, per_host: int, shared: Shared | None = None) -> None:
        self._per_host, self._shared = per_host, shared
        self._hosts: dict[str, Host] = {}
        self._wanted: dict[str, asyncio.Future[tuple[Verdict, float] | None]] = {}  # origin → its rules
        self._read: dict[str, tuple[Verdict, float]] = {}  # rules that others do not know yet
        self._me, self._wake = uuid.uuid4().hex, asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._repeated, self._is_out = 0.0, False

    def of(self, name: str) -> Host:
        """Return the limits of the host with this name."""
        self._start()
        if name not in self._hosts:
            self._hosts[name] = Host(self._per_host if self._shared is None else 0, self._wake.set)
        return self._hosts[name]

    async def rules(self, origin: str, read: Callable[[], Awaitable[tuple[Verdict, float]]]) -> tuple[Verdict, float]:
        """Return the rules of an origin and how long they last: those that another worker has read, or `read()`."""
        if self._shared is None:
            return await read()
        self._start()
        self._wanted[origin] = asyncio.get_running_loop().create_future()
        self._wake.set()
        try:
            known = await self._wanted[origin]
        finally:
            self._wanted.pop(origin, None)
        if known is None:
            known = self._read[origin] = await read()
            self._wake.set()
        return known

    async def close(self) -> None:
        """Give all slots back; raise the error that ended the exchanges. No row may be in flight."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.wait([self._task])
        if not self._task.cancelled():
            self._task.result()
        for host in self._hosts.values():
            host.waiting.clear()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._exchange(everything=True), 5)

    def _start(self) -> None:
        """Start the exchanges; raise the error that ended them."""
        if self._shared is not None and self._task is None:
            self._task = asyncio.create_task(self._repeat())
        if self._task is not None and self._task.done():
            self._task.result()

    async def _repeat(self) -> None:
        try:
            await self._exchanges()
        except Exception as error:
            turns: list[asyncio.Future[Any]] = [*self._wanted.values()]
            for turn in itertools.chain(turns, *(host.waiting for host in self._hosts.values())):
                if not turn.done():
                    turn.set_exception(error)
            raise

    async def _exchanges(self) -> None:
        while True:
            waits = self._wanted or any(host.waiting for host in self._hosts.values())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_AGAIN_S if waits else _REPEAT_S):
                    await self._wake.wait()
            await asyncio.sleep(_TOGETHER_S)
            self._wake.clear()
            everything = time.monotonic() - self._repeated >= _REPEAT_S
            await self._exchange(everything=everything)

    async def _exchange(self, *, everything: bool) -> None:
        """Tell what is used and wanted, of all hosts or of those where something is; take what is lent."""
        assert self._shared is not None
        if everything:
            self._repeated = time.monotonic()
        calls, key_of = defaultdict[int, _Call](_Call), self._shared.key_of
        for name, host in self._hosts.items():
            if everything or host.waiting or host.unreported:
                call = calls[key_of(name)]
                call.wishes[name] = Wish(host.using, len(host.waiting))
                if host.unreported:
                    call.pauses[name], host.unreported = host.unreported, None
        for origin in self._wanted:
            calls[key_of(origin)].origins.append(origin)
        for origin, rules in self._read.items():
            calls[key_of(origin)].read[origin] = rules
        self._read = {}
        await asyncio.gather(*(self._ask(key, call) for key, call in calls.items()))
        if everything:
            self._hosts = {name: host for name, host in self._hosts.items() if not host.is_idle}

    async def _ask(self, key: int, call: _Call) -> None:
        assert self._shared is not None
        try:
            answer: Answer = await self._shared.call(
                key, "exchange", self._me, call.wishes, call.pauses, call.origins, call.read
            )
        except OSError as error:  # tell it all again
            if not self._is_out:
                log.warning("rows wait: the limits of hosts cannot be shared at the moment (%s)", error)
            self._is_out = True
            self._read = call.read | self._read
            for name, pause in call.pauses.items():
                self._hosts[name].unreported = self._hosts[name].unreported or pause
            return
        self._is_out = False
        for name, grant in answer.grants.items():
            if host := self._hosts.get(name):
                if grant.pause_s > 0:
                    host.hold(grant.pause_s, grant.reason)
                host.may_use(grant.slots)
        for origin, rules in answer.rules.items():
            if (wanted := self._wanted.get(origin)) and not wanted.done():
                wanted.set_result(rules)
