"""Files that are cut, damaged, too large or not images: each gets a reason, and none ends the unit."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from drawn import KINDS, PLAIN, SEVERAL, file_of, ramp, reason, sample, stored
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from capstan.pipeline import config
from capstan.pipeline.image.decode import StoredImage, decode
from capstan.pipeline.records import is_reason

# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_a_cut_file_is_reported_as_truncated(name: str, share: float) -> None:
    data = sample(name, ramp(200, 150))
    assert reason(data[: max(2, int(len(data) * share))]) == "truncated"


@given(name=st.sampled_from(sorted(KINDS)), share=st.floats(0, 1))
@SEVERAL
def test_truncation_never_changes_an_image(name: str, share: float) -> None:
    data = sample(name)
    cut = data[: int(len(data) * share)]
    assume(len(cut) < len(data))
    result = decode(cut, PLAIN)
    if isinstance(result, StoredImage):  # the lost bytes are not part of the image
        assert result.jpeg == stored(data).jpeg
    else:
        assert result.reason == ("empty" if not cut else result.reason)
        assert is_reason(result.reason)


@given(name=st.sampled_from(sorted(KINDS)), where=st.floats(0, 1), value=st.integers(1, 255))
@SEVERAL
def test_a_damaged_byte_never_raises(name: str, where: float, value: int) -> None:
    data = bytearray(sample(name))
    data[min(int(where * len(data)), len(data) - 1)] ^= value
    result = decode(bytes(data), config.Image(size=64, min_size=8, max_pixels=10_000_000))
    assert isinstance(result, StoredImage) or is_reason(result.reason)


def test_damage_is_corrupt() -> None:
    png = bytearray(sample("png"))
    png[png.index(b"IDAT") + 40] ^= 0xFF
    assert reason(bytes(png)) == "corrupt"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = file_of(Image.fromarray(noise), "jpeg", quality=95)
    assert reason(data[:2] + data[data.index(b"\xff\xc0") :]) == "corrupt"  # no quantisation tables
    assert reason(b"\xff\xd8\xff\xd9") == "corrupt"
    assert reason(b"GIF89a\1\0\1\0\0\0\0\x3b") == "corrupt"


def test_unsupported_within_a_format_that_is_read() -> None:
    lossless = bytearray(sample("jpeg"))
    lossless[lossless.index(b"\xff\xc0") + 1] = 0xC3
    twelve_bits = bytearray(sample("jpeg"))
    twelve_bits[twelve_bits.index(b"\xff\xc0") + 4] = 12
    floats = file_of(Image.new("F", (64, 64)), "tiff")
    raw_thumbnail = file_of(ramp(), "tiff", tiffinfo={254: 1})
    for data in (bytes(lossless), bytes(twelve_bits), floats, raw_thumbnail):
        assert reason(data) == "unsupported"


@pytest.mark.parametrize("name", KINDS)
def test_limits(name: str) -> None:
    data = sample(name)
    assert reason(data, config.Image(max_pixels=96 * 72 - 1)) == "too_many_pixels"
    assert reason(data, config.Image(min_size=73)) == "too_small"
    stored(data, config.Image(min_size=72, max_pixels=96 * 72))


@pytest.mark.parametrize("name", ["jpeg", "png", "gif", "webp", "bmp", "tiff"])
def test_limits_are_read_from_the_header_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that claims 60,000 × 60,000 pixels is refused for that, before anything is decoded."""
    data = bytearray(sample(name))
    side = 16_000 if name == "webp" else 60_000
    at, form = {
        "jpeg": (data.find(b"\xff\xc0") + 5, ">HH"),
        "png": (16, ">II"),
        "gif": (6, "<HH"),
        "bmp": (18, "<ii"),
        "webp": (0, ""),
        "tiff": (0, ""),
    }[name]
    if name == "webp":
        canvas = (side - 1).to_bytes(3, "little") * 2
        chunk = b"VP8X" + struct.pack("<I", 10) + bytes(4) + canvas
        data[12:12] = chunk
        data[4:8] = struct.pack("<I", len(data) - 8)
    elif name == "tiff":
        data = bytearray(file_of(ramp(), "tiff"))
        for entry in range(struct.unpack_from("<H", data, struct.unpack_from("<I", data, 4)[0])[0]):
            start = struct.unpack_from("<I", data, 4)[0] + 2 + 12 * entry
            if struct.unpack_from("<H", data, start)[0] in (256, 257):
                struct.pack_into("<HII", data, start + 2, 4, 1, side)
    else:
        struct.pack_into(form, data, at, side, side)
        if name == "png":
            data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    for target in ("PIL.ImageFile.ImageFile.load", "simplejpeg.decode_jpeg"):
        monkeypatch.setattr(target, lambda *_, **__: pytest.fail("decoded"))
    assert reason(bytes(data)) == "too_many_pixels"


def test_a_side_that_no_jpeg_can_hold_is_refused() -> None:
    data = file_of(Image.new("1", (70_000, 8)), "png")
    assert reason(data, config.Image(resize="none", min_size=8)) == "unsupported"
