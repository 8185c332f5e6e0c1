"""Images → rows of the store: captions, held against the lint rules, and drawn again where something is wrong.

Of several attempts the least bad one is kept, the earlier of two that are equal; where even that is no caption, the
original stands in. Which attempts a caption had depends on its image alone, so rows do not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from capstan.recaption.engines import Caption, CaptionEngine, EngineInput, Request
from capstan.recaption.lint import linter
from capstan.recaption.store import Row


@dataclass
class _Tries:
    """The attempts at one caption."""

    made: list[tuple[Caption, linter.Linted]] = field(default_factory=list)

    def is_open(self) -> bool:
        """Whether another attempt could be better. An engine that gives no caption has tried again itself."""
        given = not self.made or self.made[-1][0].finish != "none"
        return given and all(linted.severity > 0 for _, linted in self.made)

    def row(self) -> Row:
        made = [(caption, linted) for caption, linted in self.made if caption.finish != "none"]
        if not made:
            return Row.missing(linter.FAILED, self.made[-1][0].reason or "no_reason")
        best = min(range(len(made)), key=lambda number: made[number][1].severity)
        caption, linted = made.pop(best)
        row = Row.written(caption.raw, caption.tokens, caption.finish, caption.seed, linted)
        row = replace(row, discarded=tuple(other.raw for other, _ in made))
        return row.replaced() if linted.action == "original" else row


def write(
    engine: CaptionEngine,
    images: Sequence[EngineInput],
    requests: Sequence[Request],
    settings: linter.Settings,
    prompts: Mapping[str, str],
) -> list[dict[str, Row]]:
    """Slot → row of each image. `prompts` are what the slots' captions must not repeat."""
    tries = [{slot: _Tries() for slot in request.slots} for request in requests]
    for attempt in range(1 + settings.retries):
        asked = list(_asked(requests, tries))
        if not asked:
            break
        places, again = zip(*asked, strict=True)
        made = engine.caption([images[place] for place in places], again, attempt=attempt)
        for place, captions in zip(places, made, strict=True):
            for slot, caption in captions.items():
                tries[place][slot].made.append((caption, _lint(caption, settings, slot, prompts.get(slot, ""))))
    return [{slot: these.row() for slot, these in slots.items()} for slots in tries]


def _lint(caption: Caption, settings: linter.Settings, slot: str, prompt: str) -> linter.Linted:
    return linter.lint(caption.raw, caption.finish, settings, slot=slot, prompt=prompt, parted=caption.parted)


def _asked(requests: Sequence[Request], tries: Sequence[Mapping[str, _Tries]]) -> Iterator[tuple[int, Request]]:
    """What is to be asked now: place and request, of the slots that are open."""
    for place, (request, slots) in enumerate(zip(requests, tries, strict=True)):
        if wanted := tuple(slot for slot, these in slots.items() if these.is_open()):
            yield place, replace(request, slots=wanted)
