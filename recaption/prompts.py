"""Slot → prompt: an instruction, or the words that a caption continues

Every text has a version number, raised with each intended change. Text and version are part of a layer's id, so a
changed prompt makes a new layer, never a mixed one. A recipe's `recaption.prompts` overrides the texts here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from capstan.pipeline.errors import RecipeError
from capstan.recaption.config import Frames

ORIGINAL: Final = "{original}"  # placeholder in a prompt for the image's original caption

# Engine coca -----------------------------------------------------------------------------------------------------

# For models trained on web captions: openings that precede short and long captions there. Such a model writes the
# DALL-E 3 paper's descriptive synthetic captions only after fine-tuning on examples of them.
OPENINGS: Final[Mapping[str, str]] = {
    "short": "a photo of",
    "descriptive": "a detailed picture, in which one can see",
}

# For models to be fine-tuned: a prefix that cannot be mistaken for a caption's own words.
PREFIXES: Final[Mapping[str, str]] = {
    "short": "short:",
    "descriptive": "descriptive:",
}

# Chat engines -------------------------------------------------------------------------------------------

VERSION: Final = 1  # of the instructions below

# The first two are the DALL-E 3 paper's two kinds of synthetic caption: main subject only; and surroundings,
# background, text in the image, style and colours. `fused` keeps names and facts found only in the original caption,
# as CapsFusion does (Yu et al. 2023, arXiv:2310.20550).
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


# For frames of a clip: what the image or images are, and what to say of them.
CLIP_VERSION: Final = 1  # of the texts below

CLIP_SHEET: Final = (
    "The picture shows {count} frames of one video clip, in the order of time, from left to right and from top to "
    "bottom. "
)
CLIP_LIST: Final = "The {count} pictures are frames of one video clip, in the order of time. "
CLIP_INSTRUCTIONS: Final[Mapping[str, str]] = {
    "short": (
        "Write one short caption of the clip that names its main subject and what it does, and nothing else. "
        "Answer with the caption only: one phrase of at most twenty words."
    ),
    "descriptive": (
        "Describe the clip for somebody who is to film it without having seen it. Say what is shown, what happens "
        "first and what then, what moves, in which direction, and what stays as it is, whether the camera moves, what "
        "surrounds the subject, and which colours things have. Say only what can be seen, and do not mention frames. "
        "Answer with the description only, in one paragraph of 40 to 100 words, and begin with the subject itself."
    ),
    "fused": (
        "Describe the clip in one paragraph of 30 to 80 words, in the order in which things happen. It was published "
        "with the caption below, which may be wrong or about something else. Take from it names, places and facts "
        "that the frames bear out, and nothing that contradicts what can be seen. Do not mention frames. Answer with "
        "the description only.\n\nCaption: " + ORIGINAL
    ),
}


def choose(slots: Sequence[str], recipe: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """Return slot → prompt: the recipe's, else the one in `own` (the model's, or the defaults for its kind).

    Raises RecipeError if a slot has no prompt, or if two slots share one and would get the same captions.
    """
    prompts: dict[str, str] = {}
    for slot in slots:
        prompt = recipe.get(slot, own.get(slot))
        if prompt is None:
            known = ", ".join(sorted(own))
            hint = f"use slots among {known}, or set recaption.prompts.{slot}"
            raise RecipeError("recaption.slots", f"the model has no prompt for {slot!r}", hint)
        twin = next((other for other, text in prompts.items() if text == prompt), None)
        if twin is not None:
            problem = f"{twin} and {slot} have the same prompt, {prompt!r}, and would get the same captions"
            raise RecipeError("recaption.prompts", problem, "set different prompts, or use one slot")
        prompts[slot] = prompt
    return prompts


def instruct(
    slots: Sequence[str], recipe: Mapping[str, str], frames: Frames | None = None
) -> tuple[dict[str, str], dict[str, int]]:
    """Return slot → instruction for chat engines, and slot → version (0 for the recipe's own prompts).

    With `frames` they are about clips, of which that many are seen.
    """
    own, version = INSTRUCTIONS, VERSION
    if frames is not None:
        head = (CLIP_SHEET if frames.show == "sheet" else CLIP_LIST).format(count=frames.count)
        own, version = {slot: head + text for slot, text in CLIP_INSTRUCTIONS.items()}, CLIP_VERSION
    prompts = choose(slots, recipe, own)
    return prompts, {slot: 0 if slot in recipe else version for slot in slots}


def quote(prompt: str, original: str) -> str:
    """Return the prompt with the original caption inserted, on one line, so that it cannot pose as an instruction."""
    return prompt.replace(ORIGINAL, " ".join(original.split()))


def quote_original(prompts: Mapping[str, str]) -> bool:
    """Return whether any prompt quotes the original caption."""
    return any(ORIGINAL in text for text in prompts.values())


def refuse_original(prompts: Mapping[str, str], why: str) -> None:
    """Raise RecipeError if a prompt quotes the original caption, for engines that do not support it."""
    for slot, text in prompts.items():
        if ORIGINAL in text:
            hint = f"remove {ORIGINAL}, or use engine transformers or openai"
            raise RecipeError(f"recaption.prompts.{slot}", f"quotes the original caption, but {why}", hint)
