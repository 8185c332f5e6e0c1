"""Engine vllm: a server per GPU or group of GPUs, started and watched by Capstan

Each model worker, a Ray actor, starts a server on loopback with the GPUs that Ray gave to it and captions through
engine openai. Servers load the model once, batch requests by themselves, and end with the job.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

from capstan.pipeline.errors import RecipeError
from capstan.recaption.config import RecaptionConfig
from capstan.recaption.engines import Caption, EngineInput, Request, chat_settings
from capstan.recaption.engines.breaker import Breaker
from capstan.recaption.engines.exchange import CONNECT
from capstan.recaption.engines.local_server import LocalServer, ServerDied
from capstan.recaption.engines.openai import OpenAIEngine
from capstan.recaption.engines.transformers import weights_of

VERSION: Final = 1  # of the request format; part of a layer's id
DEATHS: Final = 3  # of a server on the same requests, before they fail

T = TypeVar("T")


class VllmEngine:
    """The engine, also for text; pickled without its server."""

    def __init__(self, config: RecaptionConfig, *, workers: int = 1) -> None:
        self.config = config
        # The server needs no key: no variable of this name is set.
        server = config.server.model_copy(update={"url": "http://127.0.0.1/v1", "key_env": "CAPSTAN_NO_KEY"})
        self.client = OpenAIEngine(config.model_copy(update={"server": server}), workers=workers)
        self._server: LocalServer | None = None
        self._description: dict[str, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_server": None}

    @property
    def uses_original(self) -> bool:
        return self.client.uses_original

    @property
    def stopped(self) -> str:
        return self.client.stopped

    def describe(self) -> dict[str, Any]:
        if self._description is None:
            self._description = {
                "engine": "vllm",
                "version": VERSION,
                "serve": self.config.vllm.serve,
                "weights": weights_of(self.config),
                **chat_settings(self.config, self.client.prompts, self.client.versions),
                "precision": self.config.precision or "auto",
                "max_model_len": self.config.vllm.max_model_len,
                "extra": self.config.server.extra,
            }
        return self._description

    def prepare(self, jpeg: bytes) -> bytes:
        return self.client.prepare(jpeg)

    def caption(
        self, images: Sequence[EngineInput], requests: Sequence[Request], *, attempt: int = 0
    ) -> list[dict[str, Caption]]:
        def send() -> list[dict[str, Caption]]:
            return self.client.caption(images, requests, attempt=attempt)

        return self._served(send, lambda rows: [caption for row in rows for caption in row.values()])

    def write(self, prompts: Sequence[str], *, seeds: Sequence[int], max_tokens: int) -> list[Caption]:
        return self._served(lambda: self.client.write(prompts, seeds=seeds, max_tokens=max_tokens), list)

    def close(self) -> None:
        """End the server."""
        if self._server is not None:
            self._server.close()

    def _served(self, send: Callable[[], list[T]], captions_of: Callable[[list[T]], list[Caption]]) -> list[T]:
        """Return what `send` returns, sent again if the server dies meanwhile.

        Raises RecipeError if it does not start, ServerDied if it dies on the same requests each time.
        """
        server = self._server = self._server or LocalServer(self.config)
        for _ in range(DEATHS):
            self.client.endpoint = f"{server.ensure()}/chat/completions"
            try:
                rows = send()
            except RecipeError:
                if not server.has_died():
                    raise
            else:
                lost = any(caption.reason == CONNECT for caption in captions_of(rows))
                if not lost or not server.has_died():
                    return rows
            self.client.breaker = Breaker()  # its failures are the dead server's
        raise ServerDied(f"the server of {self.config.model} died {DEATHS} times on the same requests")
