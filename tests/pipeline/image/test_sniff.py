"""Format detection: supported formats, other image formats, and files that are not images."""

from __future__ import annotations

import pytest
from drawn import SEVERAL, file_of, ramp, reason, stored
from hypothesis import given
from hypothesis import strategies as st

from capstan.pipeline.image import sniff
from capstan.pipeline.records import is_reason


@given(data=st.binary(max_size=400), magic=st.sampled_from([b"", b"RIFF\xff\0\0\0WEBP", b"BM", *sniff._READ]))
@SEVERAL
def test_random_bytes_never_raise(data: bytes, magic: bytes) -> None:
    assert is_reason(reason(magic + data))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html><body>not found</body></html>", "not_an_image"),
        (b"just words", "not_an_image"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", "not_an_image"),
        (b"%PDF-1.7", "not_an_image"),
        (b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'></svg>", "unsupported"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "unsupported"),
        (b"\xff\x0a" + bytes(20), "unsupported"),
        (b"8BPS" + bytes(20), "unsupported"),
        (b"II*\0\x10\0\0\0CR\2\0", "unsupported"),
    ],
)
def test_files_that_are_not_images(data: bytes, expected: str) -> None:
    assert reason(data) == expected


@pytest.mark.parametrize("options", [{"lossless": True}, {"quality": 80, "exif": b"II*\0" + bytes(11)}])
def test_a_webp_without_its_last_padding_byte_is_whole(options: dict[str, object]) -> None:
    """RIFF pads chunks of odd size; some writers count that byte without writing it. Cut further, it is truncated."""
    files = (file_of(ramp(width), "webp", **options) for width in range(60, 160))
    odd = next(data for data in files if sniff._webp_length(data) == len(data) - 1)
    assert stored(odd[:-1]).jpeg == stored(odd).jpeg
    assert reason(odd[:-2]) == "truncated"
