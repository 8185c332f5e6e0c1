"""Retry-After headers as servers send them: seconds, dates, and neither."""

import time
from email.utils import formatdate

import pytest

from capstan.pipeline.retry_after import retry_after


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("3", 3.0),
        (" 1.5 ", 1.5),
        ("0", 0.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("", None),
        ("soon", None),
        ("-1", None),
        ("٣", None),
        ("1e9", None),
        ("Wed, 99 Oct 2015 07:28:00 GMT", None),
    ],
)
def test_values(value: str, seconds: float | None) -> None:
    assert retry_after(value) == seconds


def test_a_date_is_counted_from_now() -> None:
    wait = retry_after(formatdate(time.time() + 30, usegmt=True))
    assert wait is not None
    assert 28 <= wait <= 30
