"""Model output → the answer without its reasoning

Reasoning models write their thoughts before the answer, between tags. Servers separate them only if they are told to.
"""

from __future__ import annotations

import re
from typing import Final

_NAMES: Final = "think|thinking|thought|thoughts|reasoning|reflection"
# <think> … </think> and its relatives; Mistral's [THINK] … [/THINK]; Kimi's ◁think▷ … ◁/think▷.
_OPEN: Final = re.compile(rf"<(?:{_NAMES})>|\[THINK\]|◁think▷", re.IGNORECASE)
_CLOSE: Final = re.compile(rf"</(?:{_NAMES})>|\[/THINK\]|◁/think▷", re.IGNORECASE)


def without_reasoning(raw: str) -> str:
    """Return the text without its reasoning; empty if the model was cut off while it reasoned.

    Many chat templates contain the opening tag, so that the output starts within the reasoning.

    >>> without_reasoning("<think>a cat? yes</think> a cat"), without_reasoning("a cat? yes</think>a cat")
    ('a cat', 'a cat')
    >>> without_reasoning("<think>a cat? per"), without_reasoning("a cat")
    ('', 'a cat')
    """
    ends = [closed.end() for closed in _CLOSE.finditer(raw)]
    rest = raw[ends[-1] :] if ends else raw
    opened = _OPEN.search(rest)
    if opened:
        rest = rest[: opened.start()]
    return rest.strip() if ends or opened else raw
