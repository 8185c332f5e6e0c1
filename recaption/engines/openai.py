"""Engine openai: any server with OpenAI's chat completions API

vLLM, SGLang, transformers serve and hosted services. Requests run concurrently, in bounded number and within the rate
limits. Transient failures are retried; other failures become captions with a reason, and the run continues. What fails
for a plain image too stops all requests (breaker.py): at the start with an error, later with what is captioned kept.

Each request carries its own seed. Whether a server returns the same answer to the same request is up to the server.
"""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from PIL import Image

from capstan.pipeline.errors import RecipeError
from capstan.recaption import preprocess, prompts
from capstan.recaption.config import Decoding, RecaptionConfig
from capstan.recaption.engines import MAX_TOKENS, Caption, EngineInput, Request, chat_settings, need, seed_of
from capstan.recaption.engines.breaker import Breaker, is_lasting, recipe_error
from capstan.recaption.engines.exchange import Outcome, exchange
from capstan.recaption.engines.rate_limit import RateLimiter, Retries

if TYPE_CHECKING:
    import aiohttp

log = logging.getLogger(__name__)

VERSION: Final = 1  # of the request format; part of a layer's id

_IMAGE_TOKENS: Final = 1000  # estimate for a prompt's image, until the server reports usage
_LETTERS_PER_TOKEN: Final = 4
_MOST_READ, _MOST_SHOWN = 10_000, 200  # characters of a server's message
_SEED_BITS: Final = 31  # all servers accept seeds of this size

Body = dict[str, Any]
Seen = bytes | tuple[bytes, ...] | None  # an image, the frames of a clip, or nothing


class OpenAIEngine:
    """The engine, also for text; pickled without the key."""

    def __init__(self, config: RecaptionConfig, *, workers: int = 1) -> None:
        assert config.server.url is not None, "validated by RecaptionConfig"
        self.config, self.server = config, config.server
        self.endpoint = config.server.url.rstrip("/") + "/chat/completions"
        self.prompts, self.versions = prompts.instruct(config.slots, config.prompts, config.frames)
        # Each worker has an equal share of the limits.
        self.requests = RateLimiter(None if (limit := self.server.requests_per_minute) is None else limit / workers)
        self.tokens = RateLimiter(None if (limit := self.server.tokens_per_minute) is None else limit / workers)
        self.breaker = Breaker()
        self._noted = set[str]()  # reasons of failures that were logged

    @property
    def uses_original(self) -> bool:
        return prompts.quote_original(self.prompts)

    def describe(self) -> dict[str, Any]:
        return {
            "engine": "openai",
            "version": VERSION,
            "weights": f"{self.config.model}@{self.config.pretrained or 'unnamed'}",  # servers do not identify them
            **chat_settings(self.config, self.prompts, self.versions),
            "extra": self.server.extra,
        }

    def prepare(self, jpeg: bytes) -> bytes:
        return preprocess.encoded_within(jpeg, self.config.max_side)

    def caption(
        self, images: Sequence[EngineInput], requests: Sequence[Request], *, attempt: int = 0
    ) -> list[dict[str, Caption]]:
        how, places, bodies = self.config.decoding, list[tuple[int, str]](), list[Body]()
        if attempt:
            how = how.model_copy(update={"method": "top_p"})
        for row, (image, request) in enumerate(zip(images, requests, strict=True)):
            for slot in request.slots:
                assert not isinstance(image, np.ndarray)
                seed = seed_of(how.seed, request.sha256, slot, attempt)
                text = prompts.quote(self.prompts[slot], request.original)
                bodies.append(self._body(text, how, seed, image))
                places.append((row, slot))
        captions = [dict[str, Caption]() for _ in requests]
        for (row, slot), caption in zip(places, self._send(bodies), strict=True):
            captions[row][slot] = caption
        return captions

    def write(self, prompts: Sequence[str], *, seeds: Sequence[int], max_tokens: int) -> list[Caption]:
        how = self.config.decoding
        pairs = zip(prompts, seeds, strict=True)
        return self._send([self._body(text, how, seed, None, max_tokens) for text, seed in pairs])

    def _body(self, text: str, how: Decoding, seed: int, image: Seen, max_tokens: int | None = None) -> Body:
        files = (image,) if isinstance(image, bytes) else image or ()
        content: list[Body] = [{"type": "image_url", "image_url": {"url": _data_url(file)}} for file in files]
        content.append({"type": "text", "text": text})
        messages: list[Body] = [{"role": "user", "content": content}]
        if self.config.system:
            messages.insert(0, {"role": "system", "content": self.config.system})
        sampled = how.method == "top_p"
        body = {
            "model": self.config.model,
            "messages": messages,
            "max_tokens": max_tokens or self.config.max_tokens or MAX_TOKENS,
            "temperature": how.temperature if sampled else 0.0,
            "top_p": how.top_p if sampled else 1.0,
            "seed": seed >> (63 - _SEED_BITS),
        }
        return {name: value for name, value in (body | self.server.extra).items() if value is not None}

    def _send(self, bodies: Sequence[Body]) -> list[Caption]:
        return asyncio.run(self._send_all(bodies)) if bodies else []

    async def _send_all(self, bodies: Sequence[Body]) -> list[Caption]:
        aiohttp = need("aiohttp", "openai")
        key = os.environ.get(self.server.key_env)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        slots = asyncio.Semaphore(self.server.concurrency)
        session = aiohttp.ClientSession(
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=self.server.timeout_s),
            connector=aiohttp.TCPConnector(limit=self.server.concurrency),
            auto_decompress=False,  # exchange bounds what is unpacked
        )
        async with session:
            client = _Client(self, session)

            async def one(body: Body) -> Caption:
                async with slots:
                    return await client.caption(body)

            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(one(body)) for body in bodies]
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None  # the others were cancelled
            captions = [task.result() for task in tasks]
            await client.check_first(bodies, captions)
        return captions

    @property
    def stopped(self) -> str:
        """Why no more requests are sent, in the server's words; "" while they are."""
        return str(self._error(self.breaker.stopped)) if self.breaker.stopped else ""

    def _error(self, outcome: Outcome) -> RecipeError:
        limit = self.config.max_tokens or MAX_TOKENS
        return recipe_error(outcome, url=str(self.server.url), key_env=self.server.key_env, max_tokens=limit)

    def note(self, outcome: Outcome) -> Outcome:
        """Log the first failure of a kind; return it with a message that is fit to be shown and kept."""
        if not outcome.reason:
            return outcome
        key, text = os.environ.get(self.server.key_env), outcome.message
        text = (text.replace(key, "…") if key else text)[:_MOST_READ]
        # Control characters could steer the terminal; str.isprintable is also False for marks that reverse text.
        message = " ".join("".join(c if c.isprintable() else " " for c in text).split())[:_MOST_SHOWN]
        if outcome.reason not in self._noted:
            self._noted.add(outcome.reason)
            log.warning("%s: %s: %s (further ones are only counted)", self.endpoint, outcome.reason, message)
        return replace(outcome, message=message)

    def probe_body(self, body: Body) -> Body:
        """Return a plain request of the kind of `body`, with as many images."""
        if not (count := _images(body)):
            return {**body, "messages": [{"role": "user", "content": "Write one word."}]}
        text = prompts.quote(next(iter(self.prompts.values())), "")
        return self._body(text, self.config.decoding, 0, (_plain_image(),) * count)


class _Client:
    """The requests of one call: limits, retries, and the circuit breaker."""

    def __init__(self, engine: OpenAIEngine, session: aiohttp.ClientSession) -> None:
        self.engine, self.session, self.breaker = engine, session, engine.breaker
        self.probing = asyncio.Lock()  # while it is held, no other request starts

    async def caption(self, body: Body) -> Caption:
        """Return the answer to one request, or a caption with the reason why there is none."""
        retries = Retries(self.engine.server.retries)
        while True:
            async with self.probing:
                pass
            if self.breaker.stopped:
                return _missing(self.breaker.stopped, body)
            expected = _expected_tokens(body)
            await self.engine.requests.wait(1)
            await self.engine.tokens.wait(expected)
            outcome = await self._exchange(body)
            if outcome.answer is not None:
                used = outcome.answer.tokens
                self.engine.tokens.correct(used - expected if used else 0)
                await self._count(outcome, body)
                return outcome.answer.caption
            if not await retries.again(outcome.wait_s, self.engine.requests, self.engine.tokens):
                await self._count(outcome, body)
                return _missing(outcome, body)

    async def check_first(self, bodies: Sequence[Body], captions: Sequence[Caption]) -> None:
        """Raise RecipeError if all of the first requests failed for one lasting reason, and a plain image does too."""
        reason, *others = {caption.reason if caption.finish == "none" else "" for caption in captions}
        if not self.breaker.works and not others and reason and is_lasting(reason):
            await self._probe(reason, bodies[0])

    async def _exchange(self, body: Body) -> Outcome:
        """Send one request; a caption without a text is a failure with an answer."""
        outcome = await exchange(self.session, self.engine.endpoint, body, _seed(body))
        if outcome.answer is not None and outcome.answer.caption.finish == "none":
            caption = outcome.answer.caption
            outcome = replace(outcome, reason=caption.reason, message=caption.message)
        noted = self.engine.note(outcome)
        if noted.answer is not None and noted.reason:
            caption = replace(noted.answer.caption, message=noted.message)
            return replace(noted, answer=replace(noted.answer, caption=caption))
        return noted

    async def _count(self, outcome: Outcome, body: Body) -> None:
        """Tell the breaker how a request ended; probe the server if it wants to. Raises RecipeError."""
        if not outcome.reason:
            self.breaker.succeeded()
            return
        self.breaker.failed()
        if self.breaker.wants_probe(outcome.reason):
            async with self.probing:
                if self.breaker.wants_probe(outcome.reason):  # nobody else has probed in the meantime
                    await self._probe(outcome.reason, body)

    async def _probe(self, reason: str, body: Body) -> None:
        """Send a plain request. Raise RecipeError if it fails in the same way and the server has never worked."""
        self.breaker.probed(reason, await self._exchange(self.engine.probe_body(body)))
        if self.breaker.stopped:
            error = self.engine._error(self.breaker.stopped)
            if not self.breaker.works:
                raise error
            log.warning("%s: no more requests are sent: %s", self.engine.endpoint, error)


def _missing(outcome: Outcome, body: Body) -> Caption:
    return Caption("", 0, "none", _seed(body), outcome.reason, outcome.message)


def _plain_image() -> bytes:
    """Return a grey square of a size that every server accepts."""
    file = io.BytesIO()
    Image.new("RGB", (224, 224), (128, 128, 128)).save(file, "JPEG")
    return file.getvalue()


def _expected_tokens(body: Body) -> int:
    """Estimate the tokens of prompt and answer, generously, before the server reports them."""
    parts = [part for message in body["messages"] for part in _parts(message["content"])]
    letters = sum(len(part.get("text", "")) for part in parts)
    return _IMAGE_TOKENS * _images(body) + letters // _LETTERS_PER_TOKEN + int(body.get("max_tokens") or MAX_TOKENS)


def _images(body: Body) -> int:
    """Return the number of images in a request."""
    return sum("image_url" in part for message in body["messages"] for part in _parts(message["content"]))


def _data_url(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def _parts(content: str | list[Body]) -> list[Body]:
    return [{"text": content}] if isinstance(content, str) else content


def _seed(body: Body) -> int:
    return int(body.get("seed") or 0) if body.get("temperature") else 0
