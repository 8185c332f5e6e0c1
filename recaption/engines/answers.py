"""A chat server's answer → a caption, or the failure that it reports

Servers differ in what they return: the words for finish reasons, errors in answers of status 200 or within a choice,
content in parts. Any text is a caption; only known words for a cut flag it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

from capstan.pipeline.records import storable
from capstan.recaption.engines import CUT_BEFORE_TEXT, Caption
from capstan.recaption.engines.reasoning import without_reasoning
from capstan.recaption.lint.linter import Finish

CONTENT_FILTER: Final = "content_filter"
EMPTY: Final = "empty"

# Words for a cut by the token limit, and for a filter; only letters, lower case. Any other word is a normal end.
_LENGTHS: Final = re.compile(
    r"^length$|max\w*(?:tokens?|length)|(?:length|token|output|context)limit|modellength|contextwindow|contextlength"
    r"|lengthcapped|truncated|incomplete"
)
_FILTERS: Final = re.compile(
    r"filter|safety|recitation|blocklist|blocked|prohibited|spii|refus|guardrail|sensitive|moderat|policy"
)


@dataclass(frozen=True)
class Answer:
    """One answer: a caption, and the tokens that the request used (0: unknown)."""

    caption: Caption
    tokens: int


def read_answer(answer: Any, seed: int) -> Answer:
    """Return the caption in an answer, which may lack a text. Raises KeyError, TypeError and the like if malformed."""
    choice = answer["choices"][0]
    usage = answer.get("usage") or {}
    tokens, total = int(usage.get("completion_tokens") or 0), int(usage.get("total_tokens") or 0)
    message = choice["message"] if "message" in choice else {"content": choice["text"]}
    content = message.get("content")
    text = _text(content)
    finish, reason = _finish(choice.get("finish_reason"))
    refusal = storable(str(message.get("refusal") or ""))
    if not without_reasoning(text).strip():
        cut = CUT_BEFORE_TEXT if finish == "length" else ""
        why = reason or (CONTENT_FILTER if refusal else cut or (EMPTY if content is None else ""))
        if why:
            return Answer(Caption(text, tokens, "none", seed, why, refusal), total)
    return Answer(Caption(text, tokens, finish, seed, reason), total)


def _text(content: Any) -> str:
    """Return the text of a message; some servers return a list of parts."""
    if isinstance(content, list):
        content = "".join(
            part.get("text") or "" for part in content if part.get("type", "text") in ("text", "output_text")
        )
    # JSON may contain half a character (\\ud83d), which tables cannot store.
    return storable(str(content or "")).strip()


def _finish(word: Any) -> tuple[Finish, str]:
    """Return how a finish reason ended a caption, and the flag for it: "" unless a filter cut it."""
    if isinstance(word, dict):  # {"type": "length", "length": 30}
        word = word.get("type") or word.get("reason")
    plain = re.sub(r"[^a-z]", "", str(word or "").lower())
    if _FILTERS.search(plain):
        return "length", CONTENT_FILTER
    return ("length" if _LENGTHS.search(plain) else "end"), ""
