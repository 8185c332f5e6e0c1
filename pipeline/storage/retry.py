"""Retry remote operations after transient failures

There are three layers, each for failures that the one below cannot see. The SDK repeats a single request (storage sets
botocore to three tries); the file system repeats one page or one body; `retry_call` repeats the whole operation. It
alone can detect that a body is shorter than its object, and it is the only layer that every file system has.
"""

from __future__ import annotations

import asyncio
import errno
import http.client
import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from capstan.pipeline.errors import StorageError

log = logging.getLogger(__name__)

ATTEMPTS = 5
FIRST_WAIT_S = 0.5  # doubles with each attempt; the actual wait is between half of it and all of it
DEADLINE_S = 90.0  # no attempt starts later than this after the first

# Error codes that are transient although their HTTP status does not show it.
_TRANSIENT_CODES = {
    "BadDigest",
    "IncompleteBody",
    "InternalError",
    "NoSuchUpload",  # the response to a completed upload was lost, and the upload is completed again
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "XAmzContentSHA256Mismatch",
}
_TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504, 509}
_FINAL = (PermissionError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
_NETWORK = (ConnectionError, TimeoutError, asyncio.IncompleteReadError, http.client.HTTPException, EOFError)
_NETWORK_ERRNO = {errno.EIO, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN, errno.EBUSY}
# aiohttp's and botocore's names, without importing them: network failures and responses that were cut.
_CLIENT_ERRORS = {"ClientConnectionError", "ClientPayloadError"}
_CLIENT_ERRORS |= {"ConnectionError", "HTTPClientError", "ResponseParserError"}

T = TypeVar("T")


class TruncatedRead(ConnectionError):
    """Fewer bytes were received than the object has."""


def retry_call(action: Callable[[], T], what: str, hint: str) -> T:
    """Return `action()`, retried with growing, jittered waits while its errors are transient.

    `what` describes the operation, with the object's full name. Raises FileNotFoundError unchanged, and StorageError
    for every other error once no attempt is left.
    """
    start = time.monotonic()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except FileNotFoundError:
            raise
        except Exception as error:  # every client library has its own errors
            wait = FIRST_WAIT_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)
            late = time.monotonic() + wait - start > DEADLINE_S
            if not is_retryable(error) or attempt == ATTEMPTS or late:
                tries = f", {attempt} tries" if attempt > 1 else ""
                raise StorageError(what, f"{described(error)}{tries}", hint) from error
            log.info("cannot %s (%s); trying again in %.1f s", what, described(error), wait)
        time.sleep(wait)
    raise AssertionError("the last attempt either returns or raises")


def is_retryable(error: BaseException) -> bool:
    """Return whether the same operation may succeed a moment later."""
    if isinstance(error, _FINAL):
        return False
    if isinstance(error, _NETWORK) or not _CLIENT_ERRORS.isdisjoint(kind.__name__ for kind in type(error).__mro__):
        return True
    code, status = _answer(error)
    if code or status:
        return code in _TRANSIENT_CODES or status in _TRANSIENT_STATUS
    return isinstance(error, OSError) and error.errno in _NETWORK_ERRNO


def is_unavailable(error: StorageError) -> bool:
    """Return whether the storage did not answer, so that the file may be readable later.

    A body that stays too short does not count: that file has changed.
    """
    cause = error.__cause__
    return cause is not None and is_retryable(cause) and not isinstance(cause, TruncatedRead)


def described(error: BaseException) -> str:
    """Return an error's message on one line, with the server's status and code if it answered."""
    text = " ".join(str(error).split()) or type(error).__name__
    code, status = _answer(error)
    words = [str(word) for word in (status, code) if word and str(word) not in text]
    return " ".join([*words, text])


def _answer(error: BaseException) -> tuple[str, int]:
    """Return the error code and HTTP status of a server's response, ("", 0) if there was none."""
    for seen in (error, error.__cause__):
        response = getattr(seen, "response", None)
        if isinstance(response, dict):  # botocore's
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return str(response.get("Error", {}).get("Code", "")), int(status)
    for name in ("status", "status_code", "code"):  # aiohttp's, Azure's, Google's
        if isinstance(status := getattr(error, name, None), int):
            return "", status
    return "", 0
