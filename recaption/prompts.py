"""Slot → what a model is asked for, or the words that its caption continues.

Every text has a version, which grows with each change that is meant; both are part of a layer's id, so that a changed
prompt makes a new layer and never a mixed one. A recipe's `recaption.prompts` goes before all that is written here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from capstan.pipeline.errors import RecipeError

ORIGINAL: Final = "{original}"  # in a prompt: the caption that came with the image

# Engine coca -----------------------------------------------------------------------------------------------------

# For models trained on web captions: openings after which short and long captions are found there. Such a model writes
# the DALL-E 3 paper's descriptive synthetic captions only after fine-tuning on some.
OPENINGS: Final[Mapping[str, str]] = {
    "short": "a photo of",
    "descriptive": "a detailed picture, in which one can see",
}

# For models that are to be fine-tuned: a name that cannot be mistaken for a caption's own words.
PREFIXES: Final[Mapping[str, str]] = {
    "short": "short:",
    "descriptive": "descriptive:",
}

# Engines that converse -------------------------------------------------------------------------------------------

VERSION: Final = 1  # of the instructions below

# The first two are the DALL-E 3 paper's two kinds of synthetic caption: main subject only; and surroundings,
# background, text in the image, style, colours. `fused` keeps the names and facts that only the original knows, as
# CapsFusion does (Yu et al. 2023, arXiv:2310.20550).
INSTRUCTIONS: Final[Mapping[str, str]] = {
    "short": (
        "Write one short caption of this picture that names its main subject and nothing else. "
        "Answer with the caption only: one phrase of at most fifteen words."
    ),
    "descriptive": (
        "Describe this picture for somebody who is to paint it without having seen it. Say what is shown and what it "
        "does, what surrounds it, what lies in the background, where things stand, which colours they have, what any "
        "text in the picture says, and in which style or medium the picture is made. Say only what can be seen. "
        "Answer with the description only, in one paragraph of 40 to 80 words, and begin with the subject itself."
    ),
    "fused": (
        "Describe this picture in one paragraph of 30 to 70 words. It was published with the caption below, which may "
        "be wrong or about something else. Take from it names, places and facts that the picture bears out, and "
        "nothing that contradicts what can be seen. Answer with the description only.\n\nCaption: " + ORIGINAL
    ),
}


def choose(slots: Sequence[str], recipe: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """Slot → prompt: the recipe's, else that of `own`: the model's, or those written here for its kind.

    Raises: RecipeError, if a slot has none, or two slots have the same and would get the same captions.
    """
    prompts: dict[str, str] = {}
    for slot in slots:
        found = recipe.get(slot, own.get(slot))
        if found is None:
            known = ", ".join(sorted(own))
            hint = f"use slots of {known}, or write recaption.prompts.{slot}"
            raise RecipeError("recaption.slots", f"the model has no prompt for {slot!r}", hint)
        twin = next((other for other, text in prompts.items() if text == found), None)
        if twin is not None:
            problem = f"{twin} and {slot} have the same prompt, {found!r}, and would get the same captions"
            raise RecipeError("recaption.prompts", problem, "give them different prompts, or ask for one slot")
        prompts[slot] = found
    return prompts


def instruct(slots: Sequence[str], recipe: Mapping[str, str]) -> tuple[dict[str, str], dict[str, int]]:
    """Slot → instruction for engines that converse, and slot → version of those written here (0: the recipe's own)."""
    prompts = choose(slots, recipe, INSTRUCTIONS)
    return prompts, {slot: 0 if slot in recipe else VERSION for slot in slots}


def quote(prompt: str, original: str) -> str:
    """A prompt with the original caption in its place; on one line, so that it cannot pose as another part of it."""
    return prompt.replace(ORIGINAL, " ".join(original.split()))


def quote_original(prompts: Mapping[str, str]) -> bool:
    """Whether one of the prompts wants the original caption."""
    return any(ORIGINAL in text for text in prompts.values())


def refuse_original(prompts: Mapping[str, str], why: str) -> None:
    """Raises RecipeError where a prompt wants the original caption of an engine that cannot take it."""
    for slot, text in prompts.items():
        if ORIGINAL in text:
            hint = f"remove {ORIGINAL}, or use engine transformers or openai"
            raise RecipeError(f"recaption.prompts.{slot}", f"quotes the original caption, but {why}", hint)
