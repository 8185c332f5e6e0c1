"""One request to a chat server → an answer, or the reason of its failure

An answer is bounded in bytes while it arrives, unpacked or not. A failure may be a status, a broken connection, or an
error in an answer of status 200 or within its choice, whose code is then the status.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from capstan.pipeline.records import storable
from capstan.recaption.engines.answers import Answer, read_answer
from capstan.recaption.engines.rate_limit import requested_wait

if TYPE_CHECKING:
    import aiohttp

MAX_ANSWER_BYTES: Final = 4 << 20
QUOTA: Final = "quota"  # reason: the account has no credit left; unlike a rate limit, waiting does not help
CONNECT, TIMEOUT, MALFORMED = "connect", "timeout", "malformed"

_TRANSIENT: Final = frozenset({408, 409, 425, 429})  # and 5xx
_SERVER_ERROR: Final = 500  # status of an error without a code
_CHUNK: Final = 1 << 16
_NO_CREDIT: Final = re.compile(
    r"insufficient[ _](?:quota|credits?|balance|funds)|exceeded your current quota|billing|credit balance"
    r"|no credits? left|out of credits?",
    re.IGNORECASE,
)


class _TooLarge(Exception):
    """An answer of more than MAX_ANSWER_BYTES."""


@dataclass(frozen=True)
class Outcome:
    """The result of one request: an answer, or the reason why there is none."""

    answer: Answer | None = None
    reason: str = ""
    message: str = ""  # the server's words
    wait_s: float | None = None  # minimum wait before a retry; None: a retry is pointless

    @property
    def status(self) -> int:
        """The HTTP status of the failure; 0 if it is not one."""
        number = self.reason.removeprefix("http_")
        return int(number) if number.isdigit() else 0


async def exchange(session: aiohttp.ClientSession, url: str, body: Mapping[str, Any], seed: int) -> Outcome:
    """Send one request. The session must not decompress answers by itself."""
    import aiohttp

    try:
        # A redirect is not followed: images, prompts and the key go to the server that the recipe names.
        headers = {"Accept-Encoding": "identity"}
        async with session.post(url, json=body, headers=headers, allow_redirects=False) as response:
            data = await _read(response)
            if 300 <= response.status < 400:
                place = storable(response.headers.get("Location", ""))
                return Outcome(reason=f"http_{response.status}", message=f"redirected to {place}")
            if response.status >= 400:
                return _failure(response.status, data.decode(errors="replace"), requested_wait(response.headers))
    except _TooLarge:
        return Outcome(reason="too_large", message=f"the answer has more than {MAX_ANSWER_BYTES:,} bytes")
    except TimeoutError:
        return Outcome(reason=TIMEOUT, message="no answer in time", wait_s=0.0)
    except (aiohttp.ClientError, OSError) as error:
        return Outcome(reason=CONNECT, message=str(error) or type(error).__name__, wait_s=0.0)
    except (ValueError, zlib.error) as error:
        return Outcome(reason=MALFORMED, message=str(error), wait_s=0.0)
    try:
        answer = json.loads(data)
        if isinstance(answer, dict) and (reported := _error_in(answer)):
            return _failure(_status_of(reported), json.dumps({"error": reported}, ensure_ascii=False), 0.0)
        return Outcome(read_answer(answer, seed))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError, RecursionError):
        return Outcome(reason=MALFORMED, message=data[:200].decode(errors="replace"), wait_s=0.0)


def is_transient(status: int) -> bool:
    """Return whether a request with this status may succeed later."""
    return status in _TRANSIENT or status >= 500


def _failure(status: int, text: str, wait_s: float) -> Outcome:
    """Return the outcome of an error status with its body."""
    message, codes = _message_in(text)
    if status == 402 or (status in (403, 429) and _NO_CREDIT.search(f"{codes} {message}")):
        return Outcome(reason=QUOTA, message=f"HTTP {status}: {message}")
    return Outcome(reason=f"http_{status}", message=message, wait_s=wait_s if is_transient(status) else None)


def _message_in(text: str) -> tuple[str, str]:
    """Return the message in the body of an error, and its code and type."""
    try:
        content = json.loads(text)
        error = content.get("error") or content.get("errors") or content.get("detail") or content
        while isinstance(error, list) and error:
            error = error[0]
        if isinstance(error, dict):
            words = next((error[name] for name in ("message", "msg", "detail", "title") if error.get(name)), text)
            return storable(str(words)), f"{error.get('code', '')} {error.get('type', '')}"
        return storable(str(error)), ""
    except (ValueError, AttributeError, RecursionError):
        return storable(text), ""


def _error_in(answer: Mapping[str, Any]) -> Any:
    """Return the error in an answer of status 200 or in its first choice; None if there is none.

    Servers name it `error`, `errors` or `detail`, or the whole answer is one ({"object": "error", "message": …}).
    """
    choices = answer.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    if isinstance(first, dict):
        return answer.get("error") or first.get("error")
    named = next((answer[name] for name in ("error", "errors", "detail") if answer.get(name)), None)
    whole = answer.get("object") == "error" or ("message" in answer and "choices" not in answer)
    return named or (dict(answer) if whole else None)


def _status_of(error: Any) -> int:
    """Return the status that an error names as its code."""
    if isinstance(error, list) and error:
        error = error[0]
    names = ("code", "status", "status_code", "statusCode", "http_status")
    codes = [error.get(name) for name in names] if isinstance(error, dict) else []
    code = next((code for code in codes if str(code).isdigit()), None)
    if isinstance(code, str) and code.isdigit():
        code = int(code)
    if isinstance(code, int) and 400 <= code < 600:
        return code
    return 429 if _NO_CREDIT.search(str(error)) else _SERVER_ERROR


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """Return the body, unpacked. Raises _TooLarge as soon as it is, ValueError for an encoding that was not offered."""
    data = b""
    async for chunk in response.content.iter_chunked(_CHUNK):
        data += chunk
        if len(data) > MAX_ANSWER_BYTES:
            raise _TooLarge
    encodings = response.headers.get("Content-Encoding", "").lower().replace(",", " ").split()
    if len(encodings) > 1 or not set(encodings) <= {"identity", "gzip", "x-gzip", "deflate"}:
        raise ValueError(f"Content-Encoding: {', '.join(encodings)}")
    if not encodings or encodings == ["identity"]:
        return data
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip or zlib, by the header
    unpacked = unpacker.decompress(data, MAX_ANSWER_BYTES + 1)
    if len(unpacked) > MAX_ANSWER_BYTES:
        raise _TooLarge
    return unpacked
