"""A short prompt → a prompt in the style of the captions that a text-to-image model was trained on.

A model of descriptive captions draws less well from short prompts, which it has hardly seen: the DALL-E 3 paper
(appendix C) lets a language model expand them to between 15 and 80 words. Here the bounds, and examples of the style,
are those of the layer that the model was trained on; any engine that writes text does the writing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np

from capstan.pipeline.errors import CapstanError, RecipeError
from capstan.recaption.config import RecaptionConfig
from capstan.recaption.engines import TextEngine, make, seed_of
from capstan.recaption.lint.linter import clean

log = logging.getLogger(__name__)

VERSION: Final = 1  # of the instruction below
TRIES: Final = 3
EXAMPLES: Final = 3
_TOKENS_A_WORD: Final = 2  # rather too many than too few
_MOST: Final = 0.9  # share of captions from which on a habit is a habit


@dataclass(frozen=True)
class Style:
    """How captions are written."""

    words: tuple[int, int, int] = (15, 40, 80)  # of the shortest tenth, the middle one, the longest tenth
    lower_case: bool = False  # whether nearly all begin without a capital
    full_stop: bool = True  # whether nearly all end with one
    examples: tuple[str, ...] = field(default=())

    @classmethod
    def of(cls, captions: Iterable[str]) -> Style:
        """Measured on captions; the paper's bounds where there are none."""
        texts = [text for caption in captions if (text := " ".join(caption.split()))]
        if not texts:
            return PAPER
        lengths = np.array([len(text.split()) for text in texts])
        low, middle, high = (round(float(share)) for share in np.percentile(lengths, [10, 50, 90]))
        # One short, one middling, one long: by their length's distance, the first of those alike.
        places = [int(np.abs(lengths - share).argmin()) for share in np.percentile(lengths, [25, 50, 75])]
        return cls(
            words=(max(1, low), max(1, middle), max(1, high)),
            lower_case=float(np.mean([text[0].islower() for text in texts])) >= _MOST,
            full_stop=float(np.mean([text.endswith(".") for text in texts])) >= _MOST,
            examples=tuple(dict.fromkeys(texts[place] for place in places)),
        )

    @classmethod
    def read(cls, facts: dict[str, Any]) -> Style:
        """What `facts` gave."""
        return cls(**{**facts, "words": tuple(facts["words"]), "examples": tuple(facts["examples"])})

    def facts(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def fits(self, text: str) -> bool:
        """Whether a text is about as long as such captions are."""
        low, _, high = self.words
        return low / 2 <= len(text.split()) <= high * 1.5


PAPER: Final = Style()


def instruct(prompt: str, style: Style) -> str:
    """What a text engine is told."""
    low, middle, high = style.words
    lines = [
        "Turn the request below into the description of a picture that shows what it asks for. Write as somebody who "
        "has the picture before them, in one paragraph. Keep all that the request says, and its words where you can; "
        "where it leaves something open, such as surroundings, background, colours, light or style, choose what fits.",
        f"Write between {low} and {high} words, best about {middle}.",
        "Begin without a capital letter." if style.lower_case else "",
        "" if style.full_stop else "End without a full stop.",
        "Descriptions of other pictures, in the style that is wanted:" if style.examples else "",
        *(f"- {example}" for example in style.examples),
        "Answer with the description only.",
        f"Request: {' '.join(prompt.split())}",
    ]
    return "\n".join(line for line in lines if line)


def text_engine(config: RecaptionConfig) -> TextEngine:
    """The engine of a recipe's section `recaption`, for text. Raises RecipeError where it writes none.

    It draws whatever the section says of decoding, so that a second try differs from the first.
    """
    engine = make(config.model_copy(update={"decoding": config.decoding.model_copy(update={"method": "top_p"})}))
    if not isinstance(engine, TextEngine):
        problem = f"engine {config.engine} continues captions of pictures and cannot be told to expand a prompt"
        raise RecipeError("recaption.engine", problem, "name engine transformers or openai")
    return engine


def expand(engine: TextEngine, prompts: Sequence[str], style: Style, seed: int = 0) -> list[str]:
    """Prompts in the style of captions, one each; the same for the same seed, whatever else is expanded beside.

    One that is not about as long as the style's captions is written anew, `TRIES` times at most; then the last stands.
    Raises CapstanError where an engine writes nothing.
    """
    texts, reasons = [""] * len(prompts), [""] * len(prompts)
    left = list(range(len(prompts)))
    for attempt in range(TRIES):
        asked = [instruct(prompts[place], style) for place in left]
        seeds = [seed_of(seed, prompts[place], "upsample", attempt) for place in left]
        answers = engine.write(asked, seeds=seeds, max_tokens=style.words[2] * _TOKENS_A_WORD)
        for place, answer in zip(left, answers, strict=True):
            texts[place] = clean(answer.raw).strip('"“”') or texts[place]
            reasons[place] = answer.reason or "it wrote nothing"
        left = [place for place in left if not style.fits(texts[place])]
        if not left:
            break
    for place in left:
        if not texts[place]:
            raise CapstanError(f"upsample: no text for {prompts[place]!r} ({reasons[place]}); try again, or without it")
        words = len(texts[place].split())
        log.warning("upsample: %d words for %r, where captions have %s to %s", words, prompts[place], *style.words[::2])
    return texts
