"""Host name → IP addresses, refusing private ones

Requests never reach this machine or its network unless that is allowed. The check is made on the very addresses that
the connection then uses, so a name that resolves differently a moment later (DNS rebinding) gains nothing.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from aiohttp.abc import AbstractResolver, ResolveResult

_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052: an IPv4 address in the last 32 bits
_MOST_THREADS: Final = 64  # getaddrinfo blocks, so lookups in flight need a thread each


class PrivateAddress(Exception):
    """A host that is, or resolves to, an address outside the public internet."""


def is_public(address: str) -> bool:
    """Return whether an IPv4 or IPv6 address, and any address embedded in it, is on the public internet.

    Private, loopback, link-local, shared (CGNAT), multicast, reserved, documentation and unspecified ranges are not.

    >>> is_public("8.8.8.8"), is_public("169.254.169.254"), is_public("::ffff:127.0.0.1")
    (True, False, False)
    """
    ip = ipaddress.ip_address(address.partition("%")[0])  # without a zone: fe80::1%eth0
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in _NAT64:
            inner.append(ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF))
        if any(wrapped is not None and not is_public(str(wrapped)) for wrapped in inner):
            return False
        if ip.ipv4_mapped or ip in _NAT64:
            return True
        if ip.is_site_local:  # fec0::/10, deprecated but still routed in places
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def check_literal(host: str) -> None:
    """Raise PrivateAddress if `host` is itself an IP address (and so is never looked up) and not a public one."""
    try:
        public = is_public(host.rstrip("."))
    except ValueError:
        return  # a name
    if not public:
        raise PrivateAddress(host)


class Resolver(AbstractResolver):
    """Looks up each name once, by the system's resolver in threads, and refuses private addresses.

    `fixed` maps host → "ip:port" on this machine (like curl --resolve) and is exempt from the check.
    """

    def __init__(self, fixed: Mapping[str, str], *, allow_private: bool, lookups: int) -> None:
        self._fixed, self._allow_private = fixed, allow_private
        self._threads = ThreadPoolExecutor(min(lookups, _MOST_THREADS), "capstan-dns")
        self._answers: dict[str, asyncio.Task[list[str] | OSError]] = {}

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Return the addresses to connect to.

        Raises PrivateAddress if one of them is private, OSError if there are none.
        """
        if host in self._fixed:
            address, _, fixed_port = self._fixed[host].rpartition(":")
            return [_result(host, address.strip("[]"), int(fixed_port))]
        if host not in self._answers:
            self._answers[host] = asyncio.create_task(self._look_up(host))
        addresses = await asyncio.shield(self._answers[host])  # one waiter's deadline must not cancel the others
        if isinstance(addresses, OSError):
            if addresses.errno == socket.EAI_AGAIN:  # transient: the next attempt looks it up again
                self._answers.pop(host, None)
            raise addresses
        private = [address for address in addresses if not self._allow_private and not is_public(address)]
        if private:
            raise PrivateAddress(f"{host} is {private[0]}")
        return [_result(host, address, port) for address in addresses]

    async def _look_up(self, host: str) -> list[str] | OSError:
        """Return distinct addresses, preferred first; or the error, since nobody may be waiting for it any longer."""
        loop = asyncio.get_running_loop()
        try:
            addresses = await loop.run_in_executor(self._threads, _getaddrinfo, host)
        except UnicodeError as error:  # not a valid DNS name, e.g. a label of 64 letters
            return OSError(socket.EAI_NONAME, str(error))
        except OSError as error:
            return error
        return addresses or OSError(socket.EAI_NONAME, "no address")

    async def close(self) -> None:
        for answer in self._answers.values():
            answer.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)


def _getaddrinfo(host: str) -> list[str]:
    entries = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    return list(dict.fromkeys(str(entry[4][0]) for entry in entries))


def _result(host: str, address: str, port: int) -> ResolveResult:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    return ResolveResult(hostname=host, host=address, port=port, family=family, proto=0, flags=flags)
