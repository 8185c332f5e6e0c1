"""Why a fetch failed"""

from __future__ import annotations


class FetchError(Exception):
    """Why an attempt failed, whether another one may succeed, and how long the host asked us to wait first."""

    def __init__(
        self,
        reason: str,
        detail: str = "",
        *,
        is_retryable: bool = False,
        pause_s: float | None = None,
        body: bytes = b"",
    ) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail, self.is_retryable, self.pause_s = reason, detail, is_retryable, pause_s
        self.body = body  # what came before the failure, if it may be whole
