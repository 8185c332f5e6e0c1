"""Values that shells complete: recipe keys for --set, failure reasons, caption layers"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, MutableMapping
from pathlib import Path

from typer import Context

Find = Callable[[str], Iterable[str]]

_BASH = "complete_bash"
_SHELL = "_CAPSTAN_COMPLETE"  # set by the shell's completion script
_KEY = "_CAPSTAN_COMPLETE_KEY"  # A.B, where the shell completes only VALUE
_find_settings: list[Find] = []


def offer_settings(find: Find) -> None:
    """Let `find` complete A.B=VALUE: it knows all sections of the recipe, also those of the floors above."""
    _find_settings[:] = [find]


def complete_setting(incomplete: str) -> list[str]:
    """Complete the value of --set."""
    key = os.environ.get(_KEY)
    before = f"{key}=" if key else ""
    found = [value for find in _find_settings for value in find(before + incomplete)]
    return [value.removeprefix(before) for value in found]


def complete_reasons(incomplete: str) -> list[str]:
    """Complete a comma-separated list of failure reasons."""
    from capstan.pipeline.records import REASONS

    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{reason}" for reason in ("failed", *sorted(REASONS)) if reason.startswith(last)]


def complete_rows(incomplete: str) -> list[str]:
    """Complete reason=NAME by the failure reasons."""
    from capstan.pipeline.records import REASONS

    return [name for name in (f"reason={reason}" for reason in sorted(REASONS)) if name.startswith(incomplete)]


def complete_layer(ctx: Context, incomplete: str) -> list[str]:
    """Complete a caption layer of the dataset that is named before it."""
    recipes = Path(str(ctx.params.get("dataset"))).glob("captions/*/recipe.json")
    known = sorted(recipe.parent.name for recipe in recipes)
    return [name for name in ("latest", "original", *known) if name.startswith(incomplete)]


def split_setting(environment: MutableMapping[str, str]) -> None:
    """Take `A.B` and `=` out of the words that bash hands over: it splits them, and replaces only what follows."""
    if environment.get(_SHELL) != _BASH:
        return
    words, at = environment.get("COMP_WORDS", "").split(), int(environment.get("COMP_CWORD", "0"))
    for place in (at - 1, at):
        if 1 < place < len(words) and words[place] == "=" and words[place - 2] == "--set":
            environment[_KEY] = words[place - 1]
            rest = words[place + 1 : at + 1]
            environment["COMP_WORDS"] = "\n".join([*words[: place - 1], *rest])
            environment["COMP_CWORD"] = str(place - 1)
            return
