"""Files that are cut, damaged, too large or no images: each has its reason, and none ends the unit."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from drawn import FILES, KINDS, PLAIN, SEVERAL, assert_shows, file_of, png_of, ramp, reason, sample, stored, with_chunk
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from capstan.pipeline import config
from capstan.pipeline.image import sniff
from capstan.pipeline.image.decode import StoredImage, decode
from capstan.pipeline.records import is_reason

# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_a_cut_file_is_truncated(name: str, share: float) -> None:
    data = sample(name, ramp(200, 150))
    assert reason(data[: max(2, int(len(data) * share))]) == "truncated"


@pytest.mark.parametrize("path", sorted(FILES.glob("*.jpg")), ids=lambda path: path.stem)
def test_a_cut_rare_jpeg_is_refused(path: Path) -> None:
    data = path.read_bytes()
    for share in (0.3, 0.6, 0.9):
        assert reason(data[: int(len(data) * share)]) == "truncated"


def test_a_cut_jpeg_with_an_end_marker_is_truncated() -> None:
    data = sample("jpeg", ramp(200, 150))
    assert reason(data[: len(data) * 2 // 3] + b"\xff\xd9") == "truncated"


# Rows of 43 × 21 pixels, and of Adam7: 3, 3, 3, 6, 5, 11, 10 rows of 6, 5, 11, 11, 22, 21, 43; bytes of each.
@pytest.mark.parametrize(
    ("depth", "colour", "rows"),
    [
        (8, 2, [1 + 129] * 21),
        (1, 0, [1 + 6] * 21),
        (4, 3, [1 + 22] * 21),
        (16, 0, [1 + 86] * 21),
        (16, 6, [1 + 344] * 21),
        (8, 4, [1 + 86] * 21),
        (8, 6, [25] * 3 + [21] * 3 + [45] * 3 + [45] * 6 + [89] * 5 + [85] * 11 + [173] * 10),
        (1, 0, [2] * 3 + [2] * 3 + [3] * 3 + [3] * 6 + [4] * 5 + [4] * 11 + [7] * 10),
    ],
)
def test_a_png_with_fewer_pixels_than_it_states_is_truncated(depth: int, colour: int, rows: list[int]) -> None:
    """Its checksums hold and its stream ends well, between two rows: Pillow leaves the rest black, and says nothing."""
    palette = [(b"PLTE", bytes(3) + bytes(range(90, 135)))] if colour == 3 else []

    def made(length: int, value: int = 0) -> bytes:
        pixels = b"".join(b"\0" + bytes([value]) * (row - 1) for row in rows)[:length]
        return png_of((43, 21), depth, colour, pixels, *palette, interlaced=len(rows) > 21)

    stored(made(sum(rows)))  # all black, or clear: as it is where rows are missing
    for count in (len(rows) - 1, len(rows) // 2, 1, 0):
        assert reason(made(sum(rows[:count]))) == "truncated"
        assert reason(made(sum(rows[:count]), 0x11)) == "truncated"
    assert reason(made(sum(rows) - 1)) == "truncated"


def test_a_png_may_hold_more_than_its_pixels() -> None:
    assert_shows(stored(png_of((16, 16), 8, 0, bytes(1000))), Image.new("L", (16, 16)))


@given(name=st.sampled_from(sorted(KINDS)), share=st.floats(0, 1))
@SEVERAL
def test_cutting_never_changes_a_image(name: str, share: float) -> None:
    data = sample(name)
    cut = data[: int(len(data) * share)]
    assume(len(cut) < len(data))
    result = decode(cut, PLAIN)
    if isinstance(result, StoredImage):  # what was lost is no part of the image
        assert result.jpeg == stored(data).jpeg
    else:
        assert result.reason == ("empty" if not cut else result.reason)
        assert is_reason(result.reason)


@given(data=st.binary(max_size=400), magic=st.sampled_from([b"", b"RIFF\xff\0\0\0WEBP", b"BM", *sniff._READ]))
@SEVERAL
def test_random_bytes_never_raise(data: bytes, magic: bytes) -> None:
    assert is_reason(reason(magic + data))


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
def test_what_is_no_image(data: bytes, expected: str) -> None:
    assert reason(data) == expected


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
    """A file that claims 60,000 × 60,000 pixels is refused for that, before a decoder is asked for a pixel."""
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


def test_a_compressed_text_chunk_cannot_bomb() -> None:
    bomb = b"note\0\0" + zlib.compress(bytes(50_000_000), 9)
    assert_shows(stored(with_chunk(sample("png"), b"zTXt", bomb)), ramp())


@pytest.mark.parametrize("name", [b"gAMA", b"pHYs", b"tEXt", b"cHRM", b"acTL", b"fcTL", b"prVt"])
def test_what_is_wrong_with_a_chunk_that_no_pixel_needs_spoils_no_png(name: bytes) -> None:
    for body in (b"", b"\0\0\0\1", bytes(26)):
        assert_shows(stored(with_chunk(sample("png"), name, body)), ramp())
        damaged = bytearray(with_chunk(sample("png"), name, body))
        damaged[damaged.index(name) + 4 + len(body)] ^= 1  # its checksum
        assert_shows(stored(bytes(damaged)), ramp())


def test_a_side_that_no_jpeg_can_hold_is_refused() -> None:
    data = file_of(Image.new("1", (70_000, 8)), "png")
    assert reason(data, config.Image(resize="none", min_size=8)) == "unsupported"


@pytest.mark.parametrize("tail", [b"\n", b"\r\n", bytes(3), bytes(100), b"\0\0\0\1IDAT"])
def test_what_follows_the_end_of_a_png_is_ignored(tail: bytes) -> None:
    assert_shows(stored(file_of(ramp(), "png") + tail), ramp())
