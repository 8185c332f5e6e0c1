"""The hosts of a worker's rows: how many requests each may get, and when

Alone, a worker may send `per_host` requests to each host at once. Workers of one run share that number through
`HostLimits`: rows wait until the worker has been lent a slot. Rules of robots.txt are shared in the same exchanges, so
that a run reads each once. While the shared object cannot be reached, what was lent last holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final, Protocol

from capstan.pipeline.fetch.errors import FetchError
from capstan.pipeline.fetch.host_limits import Answer, Verdict, Wish

log = logging.getLogger(__name__)

_LONGEST_PAUSE_S: Final = 60.0
_TOGETHER_S: Final = 0.02  # rows that start at about the same time share an exchange
_AGAIN_S: Final = 0.25  # while rows wait
_REPEAT_S: Final = 1.0  # what is used is told so often: slots that are idle go to others


class Shared(Protocol):
    """Calls a method of the object that the workers of a run share; the one that is responsible for `key`."""

    def key_of(self, name: str) -> int:
        """Return which of the objects is responsible for a host."""

    async def call(self, key: int, method: str, *arguments: object) -> Answer:
        """Return what the method returns."""


class Host:
    """The limits for one host: a number of simultaneous requests, and no request before a time that it named."""

    def __init__(self, slots: int, wake: Callable[[], None]) -> None:
        self.slots, self.using, self.waiting = slots, 0, deque[asyncio.Future[None]]()
        self._wake = wake
        self._resume_at = 0.0  # monotonic seconds
        self._reason = ""
        self.told: tuple[float, str] | None = None  # a pause that others do not know of yet

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
            self.told = (seconds, reason)
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
        self._repeated = 0.0

    def of(self, name: str) -> Host:
        """Return the limits of the host with this name."""
        if name not in self._hosts:
            slots = self._per_host if self._shared is None else 0
            self._hosts[name] = Host(slots, self._wake.set)
            self._start()
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
        """Give all slots back. No row may be in flight."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.wait([self._task])
        for host in self._hosts.values():
            host.waiting.clear()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._exchange(everything=True), 5)

    def _start(self) -> None:
        if self._shared is not None and self._task is None:
            self._task = asyncio.create_task(self._repeat())

    async def _repeat(self) -> None:
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
        calls: dict[int, tuple[dict[str, Wish], dict[str, tuple[float, str]], list[str], dict[str, object]]] = {}
        for name, host in self._hosts.items():
            if everything or host.waiting or host.told:
                call = calls.setdefault(self._shared.key_of(name), ({}, {}, [], {}))
                call[0][name] = Wish(host.using, len(host.waiting))
                if host.told:
                    call[1][name], host.told = host.told, None
        for origin in self._wanted:
            calls.setdefault(self._shared.key_of(origin), ({}, {}, [], {}))[2].append(origin)
        for origin in list(self._read):
            calls.setdefault(self._shared.key_of(origin), ({}, {}, [], {}))[3][origin] = self._read.pop(origin)
        await asyncio.gather(*(self._ask(key, call) for key, call in calls.items()))
        if everything:
            self._hosts = {name: host for name, host in self._hosts.items() if not host.is_idle}

    async def _ask(self, key: int, call: tuple[object, ...]) -> None:
        assert self._shared is not None
        try:
            answer = await self._shared.call(key, "exchange", self._me, *call)
        except OSError as error:
            log.warning("the limits of hosts cannot be shared at the moment: %s", error)
            return
        for name, grant in answer.grants.items():
            if host := self._hosts.get(name):
                if grant.pause_s > 0:
                    host.hold(grant.pause_s, grant.reason)
                host.may_use(grant.slots)
        for origin, rules in answer.rules.items():
            if (wanted := self._wanted.get(origin)) and not wanted.done():
                wanted.set_result(rules)
