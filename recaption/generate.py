"""Images → store rows: captions, linted and retried if bad

The best of several attempts is kept, the earlier one on a tie. If even that is not a usable caption, the original
caption replaces it. The attempts of a caption depend on its image alone, so rows do not depend on the batch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from capstan.pipeline.units.by_halves import by_halves, shown
from capstan.recaption.engines import CUT_BEFORE_TEXT, Caption, CaptionEngine, EngineInput, Request
from capstan.recaption.engines.reasoning import without_reasoning
from capstan.recaption.lint import linter
from capstan.recaption.store import Row

log = logging.getLogger(__name__)

ENGINE_ERROR: Final = "engine_error"  # reason: the engine raised on this image alone


@dataclass
class _Attempts:
    """The attempts at one caption."""

    made: list[tuple[Caption, linter.Linted]] = field(default_factory=list)

    def is_open(self) -> bool:
        """Return whether another attempt could be better. An engine that returned no caption has already retried."""
        answered = not self.made or self.made[-1][0].finish != "none"
        return answered and all(linted.severity > 0 for _, linted in self.made)

    def row(self) -> Row:
        """Return the row of the best attempt."""
        made = [(caption, linted) for caption, linted in self.made if caption.finish != "none"]
        if not made:
            last = self.made[-1][0]
            return Row.failed(last.raw, last.tokens, last.reason or "no_reason", last.message)
        best = min(range(len(made)), key=lambda number: made[number][1].severity)
        caption, linted = made.pop(best)
        row = Row.of_caption(caption.raw, caption.tokens, caption.finish, caption.seed, linted)
        flags = row.flags if not caption.reason else tuple(sorted({*row.flags, caption.reason}))
        row = replace(row, flags=flags, discarded=tuple(other.raw for other, _ in made))
        return row.as_original() if linted.action == "original" else row


def write(
    engine: CaptionEngine,
    images: Sequence[EngineInput],
    requests: Sequence[Request],
    settings: linter.Settings,
    prompts: Mapping[str, str],
) -> list[dict[str, Row]]:
    """Return slot → row for each image. `prompts` (slot → prompt) are what captions must not repeat."""
    attempts = [{slot: _Attempts() for slot in request.slots} for request in requests]
    for attempt in range(1 + settings.retries):
        pending = list(_pending(requests, attempts))
        if not pending:
            break
        places, batch = zip(*pending, strict=True)
        made = _caption(engine, [images[place] for place in places], batch, attempt)
        for place, captions in zip(places, made, strict=True):
            for slot, caption in captions.items():
                caption = _answered(caption)
                attempts[place][slot].made.append((caption, _lint(caption, settings, slot, prompts.get(slot, ""))))
    return [{slot: these.row() for slot, these in slots.items()} for slots in attempts]


def _caption(
    engine: CaptionEngine, images: Sequence[EngineInput], requests: Sequence[Request], attempt: int
) -> list[dict[str, Caption]]:
    """Return the engine's captions. If a batch raises, find the images that do, and keep the captions of the others.

    Raises the error if every one of several images raises: then the engine is at fault, not an image.
    """

    def caption(places: Sequence[int]) -> list[dict[str, Caption]]:
        return engine.caption(
            [images[place] for place in places], [requests[place] for place in places], attempt=attempt
        )

    found, errors = by_halves(range(len(requests)), caption)
    captions = {place: _failed(requests[place], error) for place, error in errors.items()}
    for places, made in found:
        captions |= dict(zip(places, made, strict=True))
    return [captions[place] for place in range(len(requests))]


def _failed(request: Request, error: Exception) -> dict[str, Caption]:
    """Return failed captions for an image on which the engine raised."""
    log.warning("image %s: the engine raised %s", request.sha256, shown(error))
    return {slot: Caption("", 0, "none", 0, ENGINE_ERROR, shown(error)) for slot in request.slots}


def _answered(caption: Caption) -> Caption:
    """Return the caption, without a text if the model was cut off before it wrote one."""
    reasoned = caption.raw.strip() and not without_reasoning(caption.raw).strip()
    return (
        replace(caption, finish="none", reason=CUT_BEFORE_TEXT) if reasoned and caption.finish == "length" else caption
    )


def _lint(caption: Caption, settings: linter.Settings, slot: str, prompt: str) -> linter.Linted:
    text = without_reasoning(caption.raw)
    return linter.lint(text, caption.finish, settings, slot=slot, prompt=prompt, parted=caption.parted)


def _pending(requests: Sequence[Request], attempts: Sequence[Mapping[str, _Attempts]]) -> Iterator[tuple[int, Request]]:
    """Yield (place, request) of every image with slots that need another attempt."""
    for place, (request, slots) in enumerate(zip(requests, attempts, strict=True)):
        if wanted := tuple(slot for slot, these in slots.items() if these.is_open()):
            yield place, replace(request, slots=wanted)
