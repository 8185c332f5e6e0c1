"""Which environment variables may be sent to a server as its key

A recipe names the variable and the server. Somebody else's recipe must not be able to send any secret of the
environment to any server, so only names meant for this are accepted.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Final

from capstan.pipeline.errors import RecipeError

log = logging.getLogger(__name__)

ALLOWED: Final = "OPENAI_API_KEY"
PREFIX: Final = "CAPSTAN_"
LIST_VARIABLE: Final = "CAPSTAN_ALLOWED_KEYS"  # further names, separated by commas
LIST_FILE: Final = "allowed-keys"  # in the user's config folder: further names, one per line


def check_key_name(name: str) -> None:
    """Raise RecipeError if `name`, a recipe's `server.key_env`, is not a variable that may be sent to a server."""
    if name == ALLOWED or name.startswith(PREFIX) or name in _listed():
        return
    problem = f"{name} is not on the list of variables that may be sent to a server"
    hint = f"rename it to {PREFIX}…, or add {name} to {_file()} or to the variable {LIST_VARIABLE}"
    raise RecipeError("recaption.server.key_env", problem, hint)


def announce_server(url: str, key_env: str) -> None:
    """Log to which server images and prompts go, and with which key."""
    key = f"with the key in {key_env}" if os.environ.get(key_env) else f"without a key ({key_env} is not set)"
    log.info("recaption: requests go to %s, %s", url, key)


def _listed() -> set[str]:
    """Return the names that the user allows."""
    try:
        lines = _file().read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        lines = []
    names = [*lines, *os.environ.get(LIST_VARIABLE, "").split(",")]
    return {name.strip() for name in names if name.strip() and not name.strip().startswith("#")}


def _file() -> Path:
    import platformdirs

    return platformdirs.user_config_path("capstan") / LIST_FILE
