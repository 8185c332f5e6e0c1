"""Short prompt → prompt in the style of a model's training captions

A model trained on descriptive captions does worse on short prompts, which are rare in its training data. The DALL-E 3
paper (appendix C) therefore expands prompts to 15 to 80 words with a language model. Here the word limits and the style
examples come from the layer that the model was trained on. Any engine that writes text can do the expansion.
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
from capstan.recaption.engines.reasoning import without_reasoning
from capstan.recaption.lint.linter import clean

log = logging.getLogger(__name__)

VERSION: Final = 1  # of the instruction below
TRIES: Final = 3
EXAMPLES: Final = 3
_TOKENS_PER_WORD: Final = 2  # a generous estimate
_MOST: Final = 0.9  # share of captions that makes a habit part of the style


@dataclass(frozen=True)
class Style:
    """The style of a set of captions."""

    words: tuple[int, int, int] = (15, 40, 80)  # 10th, 50th and 90th percentile of the length
    lower_case: bool = False  # whether nearly all start with a lower-case letter
    full_stop: bool = True  # whether nearly all end with a full stop
    examples: tuple[str, ...] = field(default=())

    @classmethod
    def of(cls, captions: Iterable[str]) -> Style:
        """Measure the style of captions; without any, return the paper's bounds."""
        texts = [text for caption in captions if (text := " ".join(caption.split()))]
        if not texts:
            return PAPER
        lengths = np.array([len(text.split()) for text in texts])
        low, middle, high = (round(float(share)) for share in np.percentile(lengths, [10, 50, 90]))
        # One short, one medium, one long: the caption whose length is nearest, the first on a tie.
        places = [int(np.abs(lengths - share).argmin()) for share in np.percentile(lengths, [25, 50, 75])]
        return cls(
            words=(max(1, low), max(1, middle), max(1, high)),
            lower_case=float(np.mean([text[0].islower() for text in texts])) >= _MOST,
            full_stop=float(np.mean([text.endswith(".") for text in texts])) >= _MOST,
            examples=tuple(dict.fromkeys(texts[place] for place in places)),
        )

    @classmethod
    def read(cls, facts: dict[str, Any]) -> Style:
        """Return the style that `facts` described."""
        return cls(**{**facts, "words": tuple(facts["words"]), "examples": tuple(facts["examples"])})

    def facts(self) -> dict[str, Any]:
        """Return the style as plain data."""
        return asdict(self)

    def fits(self, text: str) -> bool:
        """Return whether a text has about the length of these captions."""
        low, _, high = self.words
        return low / 2 <= len(text.split()) <= high * 1.5


PAPER: Final = Style()


def instruct(prompt: str, style: Style) -> str:
    """Return the instruction for a text engine."""
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
    """Return the engine of a recipe's section `recaption`, for text. Raises RecipeError if it cannot write text.

    It always samples, whatever `decoding` says, so that a second attempt differs from the first.
    """
    config.check_key()
    config.announce()
    engine = make(config.model_copy(update={"decoding": config.decoding.model_copy(update={"method": "top_p"})}))
    if not isinstance(engine, TextEngine):
        problem = f"engine {config.engine} only continues captions of images and cannot expand prompts"
        raise RecipeError("recaption.engine", problem, "use engine transformers or openai")
    return engine


def expand(engine: TextEngine, prompts: Sequence[str], style: Style, seed: int = 0) -> list[str]:
    """Expand each prompt in the style of captions. The result depends on prompt and seed, not on the other prompts.

    A text of the wrong length is written again, in at most `TRIES` attempts; the last one is then used with a warning.
    Raises CapstanError if the engine writes nothing.
    """
    texts, reasons = [""] * len(prompts), [""] * len(prompts)
    left = list(range(len(prompts)))
    for attempt in range(TRIES):
        instructions = [instruct(prompts[place], style) for place in left]
        seeds = [seed_of(seed, prompts[place], "upsample", attempt) for place in left]
        answers = engine.write(instructions, seeds=seeds, max_tokens=style.words[2] * _TOKENS_PER_WORD)
        for place, answer in zip(left, answers, strict=True):
            texts[place] = clean(without_reasoning(answer.raw)).strip('"“”') or texts[place]
            reasons[place] = answer.reason or "the answer was empty"
        left = [place for place in left if not style.fits(texts[place])]
        if not left:
            break
    for place in left:
        if not texts[place]:
            raise CapstanError(
                f"upsample: no text for {prompts[place]!r} ({reasons[place]}); try again, or omit --upsample"
            )
        words = len(texts[place].split())
        log.warning(
            "upsample: %d words for %r; the training captions have %s to %s", words, prompts[place], *style.words[::2]
        )
    return texts
