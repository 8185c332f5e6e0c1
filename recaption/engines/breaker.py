"""Failures of requests → when to stop asking a server

One image's refusal is that image's. What fails for every image must stop the run, before it costs time and money for
each. A request with a plain image shows which of the two it is: it is sent when failures follow each other without a
success between them, at once for failures that are usually uniform (key, model, quota), later for others.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from capstan.pipeline.errors import RecipeError
from capstan.recaption.engines import CUT_BEFORE_TEXT
from capstan.recaption.engines.exchange import CONNECT, QUOTA, TIMEOUT, Outcome, is_transient

USUALLY_UNIFORM: Final = frozenset({QUOTA, "http_401", "http_403", "http_404", "http_405", "http_410"})
MOST_IN_A_ROW: Final = 16  # failures of other kinds


class Breaker:
    """Counts failures in a row, and says when to probe the server."""

    def __init__(self) -> None:
        self.works = False  # whether the server has returned a caption, or accepted a plain image
        self.stopped: Outcome | None = None  # the failure that stopped all requests
        self._streak = 0
        self._probed = Counter[str]()  # reason → probes that the server passed

    def succeeded(self) -> None:
        """Note a caption."""
        self.works, self._streak = True, 0

    def failed(self) -> None:
        """Note a failure after all retries."""
        self._streak += 1

    def wants_probe(self, reason: str) -> bool:
        """Return whether to find out now if the server fails every request for this reason."""
        first = 1 if reason in USUALLY_UNIFORM else MOST_IN_A_ROW
        return self.stopped is None and self._streak >= first << min(self._probed[reason], 10)

    def probed(self, reason: str, outcome: Outcome) -> None:
        """Note the outcome of a plain request after failures for `reason`."""
        if outcome.reason == reason:
            self.stopped = outcome
        else:
            self._probed[reason] += 1
            self._streak = 0
            self.works = self.works or outcome.reason == ""


def is_lasting(reason: str) -> bool:
    """Return whether a reason that all requests of a small first batch have in common is worth a probe."""
    outcome = Outcome(reason=reason)
    return reason != TIMEOUT and not (outcome.status and is_transient(outcome.status))


def recipe_error(outcome: Outcome, *, url: str, key_env: str, max_tokens: int) -> RecipeError:
    """Return the error that tells the user what fails for every request, and how to fix it."""
    field, problem, hint = _explain(outcome, url, key_env, max_tokens)
    words = f"HTTP {outcome.status}: {outcome.message}" if outcome.status else outcome.message
    return RecipeError(f"recaption.{field}", f"{problem} ({words})" if words else problem, hint)


def _explain(outcome: Outcome, url: str, key_env: str, max_tokens: int) -> tuple[str, str, str]:
    """Return (field, problem, hint)."""
    thinking = "server.extra: {chat_template_kwargs: {enable_thinking: false}}"
    known = {
        "http_401": ("server.key_env", "the server rejects the key", f"set the variable to a valid key ({key_env})"),
        "http_403": (
            "server.key_env",
            "the key may not use this model",
            f"use another key ({key_env}), or another model",
        ),
        "http_404": ("model", "the server does not know the model or this URL", "check recaption.model and server.url"),
        QUOTA: ("server.key_env", "the account's quota is used up", "raise the limit, then run the same command again"),
        CONNECT: ("server.url", f"{url} cannot be reached", "start the server, or correct the URL"),
        TIMEOUT: ("server.timeout_s", "the server does not answer in time", "raise timeout_s, or lower concurrency"),
        CUT_BEFORE_TEXT: (
            "max_tokens",
            f"the model spends all {max_tokens} tokens of an answer on reasoning and writes no caption",
            f"raise max_tokens, or switch reasoning off, e.g. {thinking}",
        ),
    }
    if outcome.reason in known:
        return known[outcome.reason]
    if outcome.status and is_transient(outcome.status):
        return "server", "the server fails every request", "check the server, then run the same command again"
    if outcome.status:
        hint = "correct the recipe; server.extra adds request fields and removes those set to null: {max_tokens: null}"
        return "server", "the server rejects every request", hint
    return (
        "server",
        f"the server returns no caption for any image: {outcome.reason}",
        "check the server, model and prompts",
    )
