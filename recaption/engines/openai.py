"""Engine openai: any server with OpenAI's chat completions API

vLLM, SGLang, transformers serve and hosted services. Requests run concurrently, in bounded number and within the rate
limits. Transient failures are retried; other failures become captions with a reason, and the run continues. Mistakes in
the recipe end the run: an unknown key or model, and a server that is unreachable or rejects every request.

Each request carries its own seed. Whether a server returns the same answer to the same request is up to the server.
"""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from PIL import Image

from capstan.pipeline.errors import RecipeError
from capstan.recaption import preprocess, prompts
from capstan.recaption.config import Decoding, RecaptionConfig
from capstan.recaption.engines import MAX_TOKENS, Caption, EngineInput, Request, chat_settings, need, seed_of
from capstan.recaption.engines.answers import Answer, read_answer
from capstan.recaption.engines.rate_limit import RateLimiter, Retries, requested_wait

if TYPE_CHECKING:
    import aiohttp

log = logging.getLogger(__name__)

VERSION: Final = 1  # of the request format; part of a layer's id

_IMAGE_TOKENS: Final = 1000  # estimate for a prompt's image, until the server reports usage
_LETTERS_PER_TOKEN: Final = 4
_SEED_BITS: Final = 31  # all servers accept seeds of this size

# Statuses of mistakes in the recipe: neither a retry nor another image helps.
_MISTAKES: Final = {
    401: ("server.key_env", "the server rejects the key", "set the variable to a valid key"),
    403: ("server.key_env", "the key may not use this model", "use another key, or another model"),
    404: ("model", "the server does not know the model or this URL", "check recaption.model and server.url"),
}
_TRANSIENT: Final = frozenset({408, 409, 425, 429})  # and 5xx

Body = dict[str, Any]


class OpenAIEngine:
    """The engine, also for text; pickled without the key."""

    def __init__(self, config: RecaptionConfig, *, workers: int = 1) -> None:
        assert config.server.url is not None, "validated by RecaptionConfig"
        self.config, self.server = config, config.server
        self.endpoint = config.server.url.rstrip("/") + "/chat/completions"
        self.prompts, self.versions = prompts.instruct(config.slots, config.prompts)
        # Each worker has an equal share of the limits.
        self.requests = RateLimiter(None if (limit := self.server.requests_per_minute) is None else limit / workers)
        self.tokens = RateLimiter(None if (limit := self.server.tokens_per_minute) is None else limit / workers)
        self._works = False  # whether the server has returned a caption
        self._messages: dict[str, str] = {}  # reason of a failure → the first message

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
                assert isinstance(image, bytes)
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

    def _body(self, text: str, how: Decoding, seed: int, image: bytes | None, max_tokens: int | None = None) -> Body:
        content: list[Body] = [{"type": "text", "text": text}]
        if image is not None:
            url = f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"
            content.insert(0, {"type": "image_url", "image_url": {"url": url}})
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
        timeout = aiohttp.ClientTimeout(total=self.server.timeout_s)
        connector = aiohttp.TCPConnector(limit=self.server.concurrency)
        async with aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as session:

            async def one(body: Body) -> Caption:
                async with slots:
                    return await self._send_one(session, body)

            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(one(body)) for body in bodies]
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None  # the others were cancelled
            answers = [task.result() for task in tasks]
            if not self._works:
                await self._refuse_mistake(session, {caption.reason for caption in answers})
        return answers

    async def _refuse_mistake(self, session: aiohttp.ClientSession, reasons: set[str]) -> None:
        """Raise RecipeError if all of the first requests failed for one permanent reason.

        A request with a plain image shows whether their images are the cause: a later run may consist of the images
        that the server refuses.
        """
        reason, *others = reasons
        number = reason.removeprefix("http_")
        status = int(number) if number.isdigit() else 0
        lasts = not others and (reason == "connect" or (status and not _is_transient(status)))
        if lasts:
            text = prompts.quote(next(iter(self.prompts.values())), "")
            again, *_ = await self._exchange(session, self._body(text, self.config.decoding, 0, _plain_image()))
            lasts = again == reason
        self._works = not lasts
        if lasts and not status:
            problem = f"{self.server.url} cannot be reached ({self._messages[reason]})"
            raise RecipeError("recaption.server.url", problem, "start the server, or correct the URL")
        if lasts:
            problem = f"the server rejects every request (HTTP {status}: {self._messages[reason]})"
            hint = (
                "correct the recipe; server.extra adds request fields and removes those set to null: {max_tokens: null}"
            )
            raise RecipeError("recaption.server", problem, hint)

    def _note(self, reason: str, text: str) -> None:
        """Log the first failure of a kind."""
        if reason not in self._messages:
            self._messages[reason] = self._quotable(text)
            log.warning("%s: %s: %s (further ones are only counted)", self.endpoint, reason, self._messages[reason])

    def _quotable(self, text: str) -> str:
        """Return the beginning of a server's message, on one line and without the key."""
        key = os.environ.get(self.server.key_env)
        return " ".join((text.replace(key, "…") if key else text).split())[:200]

    async def _send_one(self, session: aiohttp.ClientSession, body: Body) -> Caption:
        """Return the answer to one request, or a caption with the reason why there is none."""
        retries = Retries(self.server.retries)
        while True:
            expected = _expected_tokens(body)
            await self.requests.wait(1)
            await self.tokens.wait(expected)
            reason, answer, wait_s = await self._exchange(session, body)
            if answer is not None:
                self.tokens.correct(answer.tokens - expected if answer.tokens else 0)
                return answer.caption
            if not await retries.again(wait_s, self.requests, self.tokens):
                return Caption("", 0, "none", _seed(body), reason)

    async def _exchange(self, session: aiohttp.ClientSession, body: Body) -> tuple[str, Answer | None, float | None]:
        """Send one request; return (reason, answer, minimum wait in seconds); reason "": success.

        A wait of None means that a retry is pointless.
        """
        import aiohttp

        try:
            async with session.post(self.endpoint, json=body) as response:
                if response.status in _MISTAKES:
                    raise self._mistake(response.status, await response.text())
                if response.status >= 400:
                    self._note(reason := f"http_{response.status}", await response.text(errors="replace"))
                    return reason, None, requested_wait(response.headers) if _is_transient(response.status) else None
                answer = await response.json(content_type=None)
        except TimeoutError:
            return "timeout", None, 0.0
        except (aiohttp.ClientError, OSError) as error:
            self._note("connect", str(error))
            return "connect", None, 0.0
        except ValueError:  # not JSON, or not text
            return "malformed", None, 0.0
        try:
            return "", read_answer(answer, _seed(body)), None
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError):
            return "malformed", None, 0.0

    def _mistake(self, status: int, text: str) -> RecipeError:
        field, problem, hint = _MISTAKES[status]
        if field == "server.key_env":
            hint = f"{hint} ({self.server.key_env})"
        return RecipeError(f"recaption.{field}", f"{problem} (HTTP {status}: {self._quotable(text)})", hint)


def _is_transient(status: int) -> bool:
    return status in _TRANSIENT or status >= 500


def _plain_image() -> bytes:
    """Return a grey square of a size that every server accepts."""
    file = io.BytesIO()
    Image.new("RGB", (224, 224), (128, 128, 128)).save(file, "JPEG")
    return file.getvalue()


def _expected_tokens(body: Body) -> int:
    """Estimate the tokens of prompt and answer, generously, before the server reports them."""
    parts = [part for message in body["messages"] for part in _parts(message["content"])]
    letters = sum(len(part.get("text", "")) for part in parts)
    image = _IMAGE_TOKENS * any("image_url" in part for part in parts)
    return image + letters // _LETTERS_PER_TOKEN + int(body.get("max_tokens") or MAX_TOKENS)


def _parts(content: str | list[Body]) -> list[Body]:
    return [{"text": content}] if isinstance(content, str) else content


def _seed(body: Body) -> int:
    return int(body.get("seed") or 0) if body.get("temperature") else 0
