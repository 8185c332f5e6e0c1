"""Refuse credentials in recipes, targets and process arguments

These are stored, shown and sent, so they must not hold secrets. Credentials come from the environment, a profile, an
instance's role or a Kubernetes secret. A key's name decides whether it is a secret, since a value does not show it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from capstan.pipeline.errors import RecipeError

# fsspec's and the clouds' names for credentials. A path to a key file is not a credential.
_SECRET: Final = re.compile(
    r"^(key|secret|token|password|passwd|pat|sas_token|account_key|connection_string|credential)$"
    r"|(secret|password|passwd|access_key|api_key|apikey|private_key|auth_token|session_token|account_key|hf_token)",
    re.IGNORECASE,
)
_REFERS: Final = re.compile(r"(_file|_path|_env|_name|_arn)$", re.IGNORECASE)
_HARMLESS: Final = {
    "anon",
    "cloud",
    "cache",
    "google_default",
    "browser",
}  # harmless values of gcsfs' `token`
_IN_URL: Final = re.compile(r"^[a-z][a-z0-9+.-]*://[^/@\s]*:[^/@\s]+@", re.IGNORECASE)
_HINT: Final = "remove it here and set it in the environment (AWS_ACCESS_KEY_ID, ...), a profile, or the machine's role"


def refuse_secrets(value: Any, where: str) -> None:
    """Raise RecipeError naming the field if plain data below `where` holds a credential."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            field = f"{where}.{name}" if where else str(name)
            if isinstance(inner, str | int) and inner not in _HARMLESS and inner != "" and is_secret_name(str(name)):
                raise RecipeError(field, "is a secret, and recipes are kept and shown", _HINT)
            refuse_secrets(inner, field)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            refuse_secrets(inner, f"{where}.{number}")
    elif isinstance(value, str) and _IN_URL.match(value):
        raise RecipeError(where, "has a password in its URL, and recipes are kept and shown", _HINT)


def refuse_secret_names(env: Mapping[str, str], where: str) -> None:
    """Raise ValueError (for pydantic) if a name of environment variables is that of a secret."""
    for name in env:
        if is_secret_name(name) or re.search(r"TOKEN$", name):
            raise ValueError(f"{where}.{name} is a secret; set it on the cluster, or name a Kubernetes secret")


def is_secret_name(name: str) -> bool:
    """Return whether a key or variable of this name holds a credential.

    >>> [is_secret_name(name) for name in ("secret", "AWS_SECRET_ACCESS_KEY", "endpoint_url", "token_file", "url")]
    [True, True, False, False, False]
    """
    return bool(_SECRET.search(name)) and not _REFERS.search(name)
