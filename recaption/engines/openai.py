"""Pictures → captions by any server that speaks OpenAI's chat completions: vLLM, SGLang, transformers serve, hosted.

Requests go out side by side, a bounded number of them, at the pace that the limits allow. What can heal is asked again;
what does not heal is a caption with a reason, and the run goes on. A key or model that the server does not know is the
user's to mend and ends the run.

Whether the same request gets the same answer is the server's affair: each request carries its own seed.
"""

from __future__ import annotations

import asyncio
import base64
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from pipeline.errors import RecipeError
from recaption import pixels, prompts
from recaption.config import Decoding, RecaptionConfig
from recaption.engines import MAX_TOKENS, Caption, Picture, Request, chat_settings, need, seed_of
from recaption.engines.pace import Pace, Retries, retry_after

if TYPE_CHECKING:
    import aiohttp

VERSION: Final = 1  # of what is sent; part of a layer's id

_PICTURE_TOKENS: Final = 1000  # of a prompt, until the server says how many it were
_LETTERS_A_TOKEN: Final = 4
_SEED_BITS: Final = 31  # servers differ in how large a seed they take; all take this

# Answers that name a mistake in the recipe: asking again, or asking for another picture, is of no use.
_MISTAKES: Final = {
    401: ("server.key_env", "the server refuses the key", "set the variable to a valid key"),
    403: ("server.key_env", "the key may not use this model", "use another key, or another model"),
    404: ("model", "the server does not know the model, or this address", "check recaption.model and server.url"),
}

Body = dict[str, Any]


class OpenAIEngine:
    """A `CaptionEngine` and `TextEngine`; pickles as its settings, without the key."""

    def __init__(self, config: RecaptionConfig, *, workers: int = 1) -> None:
        assert config.server.url is not None, "RecaptionConfig sees to it"
        self.config, self.server = config, config.server
        self.address = config.server.url.rstrip("/") + "/chat/completions"
        self.prompts, self.versions = prompts.instruct(config.slots, config.prompts)
        # Each worker keeps to its share of the limits.
        self.requests = Pace(None if (limit := self.server.requests_per_minute) is None else limit / workers)
        self.tokens = Pace(None if (limit := self.server.tokens_per_minute) is None else limit / workers)

    @property
    def uses_original(self) -> bool:
        return prompts.quote_original(self.prompts)

    def describe(self) -> dict[str, Any]:
        return {
            "engine": "openai",
            "version": VERSION,
            "weights": f"{self.config.model}@{self.config.pretrained or 'unnamed'}",  # a server shows no more of them
            **chat_settings(self.config, self.prompts, self.versions),
            "extra": self.server.extra,
        }

    def prepare(self, jpeg: bytes) -> bytes:
        return pixels.encoded_within(jpeg, self.config.max_side)

    def caption(
        self, pictures: Sequence[Picture], requests: Sequence[Request], *, attempt: int = 0
    ) -> list[dict[str, Caption]]:
        how, places, bodies = self.config.decoding, list[tuple[int, str]](), list[Body]()
        if attempt:
            how = how.model_copy(update={"method": "top_p"})
        for row, (picture, request) in enumerate(zip(pictures, requests, strict=True)):
            for slot in request.slots:
                assert isinstance(picture, bytes)
                seed = seed_of(how.seed, request.sha256, slot, attempt)
                text = prompts.quote(self.prompts[slot], request.original)
                bodies.append(self._body(text, how, seed, picture))
                places.append((row, slot))
        found = [dict[str, Caption]() for _ in requests]
        for (row, slot), caption in zip(places, self._ask(bodies), strict=True):
            found[row][slot] = caption
        return found

    def write(self, prompts: Sequence[str], *, seeds: Sequence[int], max_tokens: int) -> list[Caption]:
        how = self.config.decoding
        asked = zip(prompts, seeds, strict=True)
        return self._ask([self._body(text, how, seed, None, max_tokens) for text, seed in asked])

    def _body(self, text: str, how: Decoding, seed: int, picture: bytes | None, max_tokens: int | None = None) -> Body:
        content: list[Body] = [{"type": "text", "text": text}]
        if picture is not None:
            url = f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"
            content.insert(0, {"type": "image_url", "image_url": {"url": url}})
        messages: list[Body] = [{"role": "user", "content": content}]
        if self.config.system:
            messages.insert(0, {"role": "system", "content": self.config.system})
        drawn = how.method == "top_p"
        body = {
            "model": self.config.model,
            "messages": messages,
            "max_tokens": max_tokens or self.config.max_tokens or MAX_TOKENS,
            "temperature": how.temperature if drawn else 0.0,
            "top_p": how.top_p if drawn else 1.0,
            "seed": seed >> (63 - _SEED_BITS),
        }
        return {name: value for name, value in (body | self.server.extra).items() if value is not None}

    def _ask(self, bodies: Sequence[Body]) -> list[Caption]:
        return asyncio.run(self._ask_all(bodies)) if bodies else []

    async def _ask_all(self, bodies: Sequence[Body]) -> list[Caption]:
        aiohttp = need("aiohttp", "openai")
        key = os.environ.get(self.server.key_env)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        room = asyncio.Semaphore(self.server.concurrency)
        timeout = aiohttp.ClientTimeout(total=self.server.timeout_s)
        connector = aiohttp.TCPConnector(limit=self.server.concurrency)
        async with aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as session:

            async def one(body: Body) -> Caption:
                async with room:
                    return await self._ask_one(session, body)

            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(one(body)) for body in bodies]
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None  # the others were cancelled
        return [task.result() for task in tasks]

    async def _ask_one(self, session: aiohttp.ClientSession, body: Body) -> Caption:
        """The answer to one request, or a caption with the reason why there is none."""
        retries = Retries(self.server.retries)
        while True:
            expected = _expected_tokens(body)
            await self.requests.wait(1)
            await self.tokens.wait(expected)
            reason, answer, wait_s = await self._exchange(session, body)
            if answer is not None:
                self.tokens.correct(answer[1] - expected if answer[1] else 0)
                return answer[0]
            if not await retries.again(wait_s, self.requests, self.tokens):
                return Caption("", 0, "none", _seed(body), reason)

    async def _exchange(
        self, session: aiohttp.ClientSession, body: Body
    ) -> tuple[str, tuple[Caption, int] | None, float | None]:
        """One request: (reason, caption and all tokens that it took, seconds to wait at least); reason "": an answer.

        A wait of None: asking again is of no use.
        """
        import aiohttp

        try:
            async with session.post(self.address, json=body) as response:
                if response.status in _MISTAKES:
                    raise self._mistake(response.status, await response.text())
                if response.status >= 400:
                    heals = response.status in (408, 409, 425, 429) or response.status >= 500
                    return f"http_{response.status}", None, retry_after(response.headers) if heals else None
                answer = await response.json(content_type=None)
        except TimeoutError:
            return "timeout", None, 0.0
        except (aiohttp.ClientError, OSError):
            return "connect", None, 0.0
        except ValueError:  # no JSON, or no text
            return "malformed", None, 0.0
        try:
            return "", _read(answer, _seed(body)), None
        except (KeyError, IndexError, TypeError, AttributeError):
            return "malformed", None, 0.0

    def _mistake(self, status: int, text: str) -> RecipeError:
        field, problem, mend = _MISTAKES[status]
        if field == "server.key_env":
            mend = f"{mend} ({self.server.key_env})"
        key = os.environ.get(self.server.key_env)
        said = " ".join((text.replace(key, "…") if key else text).split())[:200]
        return RecipeError(f"recaption.{field}", f"{problem} (HTTP {status}: {said})", mend)


def _read(answer: Any, seed: int) -> tuple[Caption, int]:
    """(the caption in a server's answer, all tokens that it took; 0: not said). Raises KeyError and the like."""
    choice = answer["choices"][0]
    usage = answer.get("usage") or {}
    text, finish = choice["message"].get("content"), choice.get("finish_reason")
    tokens = int(usage.get("completion_tokens") or 0)
    total = int(usage.get("total_tokens") or 0)
    if isinstance(text, list):  # some servers answer in parts
        text = "".join(part.get("text", "") for part in text)
    ends = {"stop": "end", "length": "length", None: "end"}
    if finish not in ends or text is None:
        return Caption(text or "", tokens, "none", seed, finish if finish not in ends else "empty"), total
    finished: Any = ends[finish]
    return Caption(str(text).strip(), tokens, finished, seed), total


def _expected_tokens(body: Body) -> int:
    """Of prompt and answer, before the server has said; rather too many than too few."""
    parts = [part for message in body["messages"] for part in _parts(message["content"])]
    letters = sum(len(part.get("text", "")) for part in parts)
    seen = _PICTURE_TOKENS * any("image_url" in part for part in parts)
    return seen + letters // _LETTERS_A_TOKEN + int(body.get("max_tokens") or MAX_TOKENS)


def _parts(content: str | list[Body]) -> list[Body]:
    return [{"text": content}] if isinstance(content, str) else content


def _seed(body: Body) -> int:
    return int(body.get("seed") or 0) if body.get("temperature") else 0
