"""A caption engine that returns scripted captions by image, slot and attempt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from capstan.recaption.engines import Caption, EngineInput, Request

Say = Callable[[Request, str, int], Caption]  # request, slot, attempt


def said(raw: str, attempt: int = 0) -> Caption:
    """A caption that the model ended; its seed is the attempt's number."""
    return Caption(raw, len(raw.split()), "end", attempt)


@dataclass
class ScriptedEngine:
    """Implements recaption.engines.CaptionEngine; `asked` records all requests in order."""

    say: Say
    uses_original: bool = False
    prompts: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[Request, int]] = field(default_factory=list)

    def describe(self) -> dict[str, Any]:
        return {"engine": "scripted", "prompts": self.prompts}

    def prepare(self, jpeg: bytes) -> EngineInput:
        return jpeg

    def caption(
        self, images: Sequence[EngineInput], requests: Sequence[Request], *, attempt: int = 0
    ) -> list[dict[str, Caption]]:
        assert len(images) == len(requests)
        self.asked += [(request, attempt) for request in requests]
        return [{slot: self.say(request, slot, attempt) for slot in request.slots} for request in requests]
