"""A server on loopback that speaks OpenAI's chat completions, and misbehaves on request."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from aiohttp import web
from PIL import Image

from capstan.recaption.config import RecaptionConfig
from capstan.recaption.engines import make
from capstan.recaption.engines.openai import OpenAIEngine

Body = dict[str, Any]
Answer = tuple[int, dict[str, str], Any]  # status, headers, JSON, text or bytes


@dataclass
class ChatServer:
    """`misbehave(body, tries)` returns an answer instead of a caption, or None; `tries` counts identical requests."""

    url: str = ""
    misbehave: Callable[[Body, int], Answer | None] = lambda body, tries: None
    delay_s: float = 0.0
    bodies: list[Body] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # time.monotonic() at which each request came
    running: int = 0
    most_running: int = 0
    tries: dict[str, int] = field(default_factory=dict)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        self.times.append(time.monotonic())
        self.headers.append(dict(request.headers))
        body = await request.json()
        self.bodies.append(body)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(self.delay_s)
            name = json.dumps(body, sort_keys=True)
            self.tries[name] = self.tries.get(name, 0) + 1
            answer = self.misbehave(body, self.tries[name])
            if answer is None:
                return web.json_response(completion(f"caption {hashlib.sha256(name.encode()).hexdigest()[:8]}"))
            status, headers, content = answer
            if status == 0:  # hang up
                assert request.transport is not None
                request.transport.close()
            text = content if isinstance(content, str | bytes) else json.dumps(content)
            data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
            return web.Response(status=status or 200, headers=headers, body=data, content_type="application/json")
        finally:
            self.running -= 1


def completion(text: str | None, finish: str | None = "stop", tokens: int = 3, total: int = 50) -> Body:
    usage = {"prompt_tokens": total - tokens, "completion_tokens": tokens, "total_tokens": total}
    message = {"role": "assistant", "content": text}
    return {"object": "chat.completion", "choices": [{"message": message, "finish_reason": finish}], "usage": usage}


def jpeg(number: int, side: int = 28) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST).save(file, "JPEG", quality=95)
    return file.getvalue()


def engine(server: ChatServer, workers: int = 1, limits: dict[str, Any] | None = None, **recipe: Any) -> OpenAIEngine:
    section = {"engine": "openai", "model": "m", "server": {"url": server.url, **(limits or {})}, **recipe}
    made = make(RecaptionConfig.model_validate(section), workers=workers)
    assert isinstance(made, OpenAIEngine)
    return made


@contextmanager
def serving() -> Iterator[ChatServer]:
    server, loop, ready = ChatServer(), asyncio.new_event_loop(), threading.Event()

    async def start() -> web.AppRunner:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_post("/v1/chat/completions", server.complete)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        return runner

    def run() -> None:
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(start())
        ready.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(120)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(120)
        loop.close()
