"""Slot → the words that a caption continues, for models that bring none of their own.

The texts are versioned by their content: they are part of a layer's id, so that a changed prompt makes a new layer.
A captioner that Capstan trained brings its own prefixes (capstan.json in its folder); a recipe's `recaption.prompts`
goes before both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from pipeline.errors import RecipeError

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


def choose(slots: Sequence[str], recipe: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """Slot → prompt: the recipe's, else the model's own, else the opening written here.

    Raises: RecipeError, if a slot has none, or two slots have the same and would get the same captions.
    """
    prompts: dict[str, str] = {}
    for slot in slots:
        found = next((texts[slot] for texts in (recipe, own, {} if own else OPENINGS) if slot in texts), None)
        if found is None:
            known = ", ".join(sorted(own or OPENINGS))
            mend = f"use slots of {known}, or write recaption.prompts.{slot}"
            raise RecipeError("recaption.slots", f"the model has no prompt for {slot!r}", mend)
        twin = next((other for other, text in prompts.items() if text == found), None)
        if twin is not None:
            problem = f"{twin} and {slot} have the same prompt, {found!r}, and would get the same captions"
            raise RecipeError("recaption.prompts", problem, "give them different prompts, or ask for one slot")
        prompts[slot] = found
    return prompts
