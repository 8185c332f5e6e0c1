"""Refuse credentials in recipes, targets and process arguments

These are stored, shown and sent, so they must not hold secrets. Credentials come from the environment, a profile, an
instance's role or a Kubernetes secret. A value does not always show that it is a secret, so what counts is the name of
its key; in addition, URLs, headers, shell assignments and the formats of well-known tokens are recognized.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Final
from urllib.parse import unquote_plus, urlsplit

from capstan.pipeline.errors import RecipeError

# Names of credentials, word by word: HF_TOKEN, X-Api-Key and githubPat are hf token, x api key and github pat.
_SECRET: Final = re.compile(
    r"\b(secrets?|passwords?|passwd|passphrase|credentials?|authorization|cookies?|apikey|connection string|conn str)\b"
    r"|\baccess ?key"
    r"|\b(key|token|pat|pass|pwd|sas|signature|sig|auth|bearer|jwt)$"
)
_REFERS: Final = re.compile(r"\b(file|path|env|name|arn)$")  # where a secret is, not what it is
_WORDS: Final = re.compile(r"[^A-Za-z0-9]+|(?<=[a-z0-9])(?=[A-Z])")
_HARMLESS: Final = {"", "anon", "cloud", "cache", "google_default", "browser"}  # values of gcsfs' `token`
_HEADERS: Final = {"authorization", "proxy-authorization", "cookie", "x-api-key", "api-key", "x-auth-token"}
_HEADER: Final = re.compile(r"\s*([A-Za-z][A-Za-z-]*)\s*:\s*\S")
_ASSIGNMENT: Final = re.compile(r"(?<![\w$-])-{0,2}([A-Za-z_][\w-]*)=(?!\$|\s|$|[\"'](?:\$|[\"']))")
_TOKEN: Final = re.compile(
    r"(?<![A-Za-z0-9])(sk-[\w-]{20,}|hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{22,}|AIza[\w-]{35}"
    r"|(AKIA|ASIA)[0-9A-Z]{16}|xox[abprs]-[\w-]{10,}|-----BEGIN [A-Z ]*PRIVATE KEY|glpat-[\w-]{20,}|npm_[A-Za-z0-9]{36}"
    r"|ya29\.[\w-]{20,}|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+|[sr]k_live_\w{20,}|SG\.[\w-]{16,}\.[\w-]{16,}"
    r"|(IQoJb3JpZ2lu|FwoGZXIvYXdz)[\w/+=]{20,}"  # session tokens of AWS
    r"|(account|sharedaccess)key=[^;\s]{4,}|password=[^;\s]+)|^\s*(bearer|basic)\s+\S{6,}\s*$",  # connection strings
    re.IGNORECASE,
)
_LOGIN: Final = re.compile(r"[^\s/@:]+:[^\s/@]+@([\w-]+(\.[\w-]+)+|localhost|\[[0-9a-f:]+\])(:\d+)?([/?#]\S*)?", re.I)
_URL: Final = re.compile(
    r"(?P<scheme>\s*(?:[a-z][a-z0-9+.-]*:)?[/\\]{2})(?P<authority>[^/\\?#]*)"
    r"(?P<path>[^?#]*)(?P<query>\?[^#]*)?(?P<fragment>#.*)?",
    re.IGNORECASE | re.DOTALL,
)
_URL_IN_TEXT: Final = re.compile(r"(?:[a-z][a-z0-9+.-]{0,30}:)?//[^\s\"'<>()]+", re.IGNORECASE)
_PARAMETER: Final = re.compile(r"(?<=[?&;#])(?P<name>[^=&;#]*)=(?P<value>[^&;#]*)")
_SIGNATURES: Final = {
    *("auth", "authkey", "hmac", "jwt", "session", "sessionid"),
    *("hdnea", "hdnts", "__gda__", "__token__"),  # of content delivery networks
}
_MOST_NESTED: Final = 8  # URLs within URLs that are looked into; what is deeper is not shown
_REDACTED: Final = "REDACTED"
_KEPT: Final = "and recipes are kept and shown"
_HINT: Final = "remove it here and set it in the environment (AWS_ACCESS_KEY_ID, ...), a profile, or the machine's role"


def public_url(url: str, _depth: int = 0) -> str:
    """Return a row's URL as it may be stored and shown: without userinfo and without the values of credentials.

    Parameters count by their name (`token`, `sig`, `X-Amz-Signature`, ...) or if their value looks like a well-known
    token. Anything that is not a URL is returned as it is.

    >>> public_url("https://me:pw@a.org/x.jpg?w=640&X-Amz-Signature=2f1c#top")
    'https://a.org/x.jpg?w=640&X-Amz-Signature=REDACTED#top'
    """
    found = _URL.fullmatch(url)
    if found is None:
        return url
    without_value = partial(_without_value, depth=_depth)
    host, scheme = found["authority"].rpartition("@")[2], found["scheme"].strip().lower()
    query, fragment = found["query"] or "", found["fragment"] or ""
    if scheme.startswith(("http:", "https:")):  # of others, such as a tar in a bucket, # leads to a member
        fragment = _PARAMETER.sub(without_value, fragment)
    return f"{found['scheme']}{host}{found['path']}{_PARAMETER.sub(without_value, query)}{fragment}"


def public_text(text: str) -> str:
    """Return a message with its URLs as `public_url` returns them."""
    return _URL_IN_TEXT.sub(lambda found: public_url(found[0]), text)


def _without_value(found: re.Match[str], depth: int) -> str:
    name, value = unquote_plus(found["name"]), unquote_plus(found["value"])
    named = is_secret_name(name) or name.lower() in _SIGNATURES
    hidden = named or _TOKEN.search(value) or _is_secret_url(value, depth + 1)
    return f"{found['name']}={_REDACTED}" if hidden and value else found[0]


def _is_secret_url(value: str, depth: int) -> bool:
    """Return whether a parameter is a URL with credentials, or one within too many others."""
    if depth > _MOST_NESTED:
        return _URL.fullmatch(value) is not None
    return public_url(value, depth) != value


def refuse_secrets(value: Any, where: str) -> None:
    """Raise RecipeError naming the field if plain data below `where` holds a credential."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            field = f"{where}.{name}" if where else str(name)
            if is_secret_name(str(name)) and _is_given(inner):
                raise RecipeError(field, f"is a secret, {_KEPT}", _HINT)
            refuse_secrets(inner, field)
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            refuse_secrets(inner, f"{where}.{number}" if where else str(number))
    elif isinstance(value, str) and (found := _secret_in(value)):
        raise RecipeError(where, f"{found}, {_KEPT}", _HINT)


def refuse_assignments(value: Any, where: str) -> None:
    """Raise RecipeError if a string below `where`, a line of shell, sets a variable or an option to a credential.

    References such as HF_TOKEN=$HF_TOKEN are accepted.
    """
    if isinstance(value, Mapping):
        for name, inner in value.items():
            refuse_assignments(inner, f"{where}.{name}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            refuse_assignments(inner, f"{where}.{number}")
    elif isinstance(value, str):
        for name in _ASSIGNMENT.findall(value):
            if is_secret_name(name):
                raise RecipeError(where, f"sets the secret {name}, {_KEPT}", _HINT)


def refuse_secret_names(env: Mapping[str, str], where: str) -> None:
    """Raise ValueError (for pydantic) if a name of environment variables is that of a secret."""
    for name in env:
        if is_secret_name(name):
            raise ValueError(f"{where}.{name} is a secret; set it on the cluster, or name a Kubernetes secret")


def is_secret_name(name: str) -> bool:
    """Return whether a key, variable, header or parameter of this name holds a credential.

    >>> [is_secret_name(name) for name in ("secret", "AWS_SECRET_ACCESS_KEY", "X-Api-Key", "githubPat", "DB_PASS")]
    [True, True, True, True, True]
    >>> [is_secret_name(name) for name in ("endpoint_url", "token_file", "key_env", "max_tokens", "keys", "tokenizer")]
    [False, False, False, False, False, False]
    """
    return bool(_SECRET.search(_words(name))) and not _refers(name)


def _refers(name: str) -> bool:
    """Return whether a key says where a secret is."""
    return bool(_REFERS.search(_words(name)))


def _words(name: str) -> str:
    return _WORDS.sub(" ", name).strip().lower()


def _is_given(value: Any) -> bool:
    """Return whether a key of a secret's name holds something: null, false and gcsfs' modes are not secrets."""
    if isinstance(value, list | tuple):
        return any(map(_is_given, value))
    if isinstance(value, Mapping):
        return any(_is_given(inner) for name, inner in value.items() if not _refers(str(name)))
    return isinstance(value, str | int | float) and not isinstance(value, bool) and value not in _HARMLESS


def _secret_in(text: str) -> str:
    """Return what kind of credential a string holds, or ""."""
    if "://" in text and not any(character.isspace() for character in text):
        return _secret_in_url(text)
    if _LOGIN.fullmatch(text.strip()):
        return "has a password before its host"
    header = _HEADER.match(text)
    if header is not None and header[1].lower() in _HEADERS:
        return f"is a header {header[1]}"
    return "holds a token" if _TOKEN.search(text) else ""


def _secret_in_url(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError:
        return ""  # not a URL; whoever uses it says so
    user, at, _ = parts.netloc.rpartition("@")
    if at and (":" in user or (user and parts.scheme.lower() in ("http", "https"))):
        return "has a password in its URL"
    for name in _parameters(parts.query):
        if is_secret_name(name) or name.lower() in ("x-amz-credential", "x-goog-credential"):
            return f"has the credential {name} in its URL"
    return "has a token in its URL" if _TOKEN.search(url) else ""


def _parameters(query: str) -> Iterable[str]:
    return [part.partition("=")[0] for part in re.split("[&;]", query) if part.partition("=")[2]]
