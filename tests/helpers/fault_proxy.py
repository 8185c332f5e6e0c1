"""An HTTP proxy that does to requests what bad networks and busy buckets do. Run as a program; prints its port.

    python fault_proxy.py UPSTREAM_PORT --rate 0.05 [--seed 0] [--from-request 0] [--kinds 503,reset,...]
    python fault_proxy.py UPSTREAM_PORT --rate 0.2 --kinds late --delay 30 --most 3

Which requests suffer is drawn from the seed, and each kind of fault comes in turn, `--most` in all. When ended by
SIGTERM it prints, as JSON, how many requests came and how often each fault struck.

    500 503        an error answer, without asking the server
    refused        the connection is reset before the server is asked
    reset          the server has done it; the connection is reset in the middle of its answer
    stall          the server has done it; nothing comes back
    stalled_body   half of the answer comes, and then nothing
    truncated      half of the answer's body, then the end of the connection
    short          half of the answer's body, with a Content-Length that hides it
    late           the whole answer, --delay seconds after the request; never by default
"""

import argparse
import asyncio
import json
import math
import random
import signal
import socket
import struct
from collections import Counter

KINDS = ["500", "503", "refused", "reset", "stall", "stalled_body", "truncated", "short"]
OF_BODIES = {"stalled_body", "truncated", "short"}  # an answer without a body suffers a reset instead
STALL_S = 60.0


class Proxy:
    def __init__(
        self, upstream: int, rate: float, seed: int, first: int, kinds: list[str], delay: float, most: float
    ) -> None:
        self.upstream, self.rate, self.first, self.kinds = upstream, rate, first, kinds
        self.delay, self.most = delay, most
        self.drawn = random.Random(seed)
        self.counts: Counter[str] = Counter(requests=0)

    def fault(self) -> str:
        """What happens to the next request; "" if it goes well."""
        self.counts["requests"] += 1
        struck = self.counts.total() - self.counts["requests"]
        if self.counts["requests"] <= self.first or struck >= self.most or self.drawn.random() >= self.rate:
            return ""
        kind = self.kinds[struck % len(self.kinds)]
        self.counts[kind] += 1
        return kind

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            if header(head, "expect"):
                await send(writer, b"HTTP/1.1 100 Continue\r\n\r\n")
            body = await reader.readexactly(int(header(head, "content-length") or 0))
            await self.answer(self.fault(), head, body, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client has gone, or the proxy goes
        finally:
            writer.close()

    async def answer(self, fault: str, head: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
        if fault in ("500", "503"):
            await send(writer, error(fault, with_body=not head.startswith(b"HEAD")))
            return
        if fault == "refused":
            reset(writer)
            return
        if fault == "late":
            await asyncio.sleep(self.delay)
        answered, content = await self.ask(head, body)
        half = content[: len(content) // 2]
        if fault in OF_BODIES and not content:
            fault = "reset"
        if fault == "stall":
            await asyncio.sleep(STALL_S)
        elif fault == "stalled_body":
            await send(writer, answered + half)
            await asyncio.sleep(STALL_S)
        elif fault == "reset":
            await send(writer, (answered + half)[: len(answered + half) - 1])
            reset(writer)
        elif fault == "truncated":
            await send(writer, answered + half)
        elif fault == "short":
            await send(writer, with_length(answered, len(half)) + half)
        else:
            await send(writer, answered + content)

    async def ask(self, head: bytes, body: bytes) -> tuple[bytes, bytes]:
        """The server's answer: its head, its body."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.upstream)
        dropped = (b"connection:", b"expect:")
        lines = [line for line in head.split(b"\r\n") if line and not line.lower().startswith(dropped)]
        await send(writer, b"\r\n".join([*lines, b"Connection: close", b"", b""]) + body)
        answer = await reader.read()
        writer.close()
        top, _, content = answer.partition(b"\r\n\r\n")
        return top + b"\r\n\r\n", content


def header(head: bytes, name: str) -> str:
    for line in head.decode("latin-1").split("\r\n")[1:]:
        key, _, value = line.partition(":")
        if key.lower() == name:
            return value.strip()
    return ""


def with_length(head: bytes, size: int) -> bytes:
    lines = [line for line in head.strip().split(b"\r\n") if not line.lower().startswith(b"content-length:")]
    return b"\r\n".join([*lines, f"Content-Length: {size}".encode(), b"", b""])


def error(status: str, with_body: bool) -> bytes:
    code = {"500": "InternalError", "503": "SlowDown"}[status]
    body = f"<Error><Code>{code}</Code><Message>Please reduce your request rate.</Message></Error>" if with_body else ""
    head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


async def send(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    await writer.drain()


def reset(writer: asyncio.StreamWriter) -> None:
    """Close so that the other side sees a reset."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("upstream", type=int)
    options.add_argument("--rate", type=float, default=0.05)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--from-request", type=int, default=0)
    options.add_argument("--kinds", default=",".join(KINDS))
    options.add_argument("--delay", type=float, default=30.0)
    options.add_argument("--most", type=float, default=math.inf)
    chosen = options.parse_args()
    kinds = chosen.kinds.split(",")
    proxy = Proxy(chosen.upstream, chosen.rate, chosen.seed, chosen.from_request, kinds, chosen.delay, chosen.most)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0, limit=1 << 20)
    print(server.sockets[0].getsockname()[1], flush=True)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    await ended.wait()
    print(json.dumps(proxy.counts), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
