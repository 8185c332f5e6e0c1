"""PNG files: missing pixels, damaged and unneeded chunks, embedded profiles."""

from __future__ import annotations

import struct
import zlib

import pytest
from drawn import (
    assert_shows,
    file_of,
    png_of,
    ramp,
    reason,
    sample,
    stored,
    swapped_profile,
    with_chunk,
)
from PIL import Image

from capstan.pipeline.image import png


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
def test_a_png_with_missing_pixels_is_truncated(depth: int, colour: int, rows: list[int]) -> None:
    """Its checksums hold and its stream ends well, between two rows: Pillow leaves the rest black without a warning."""
    palette = [(b"PLTE", bytes(3) + bytes(range(90, 135)))] if colour == 3 else []

    def made(length: int, value: int = 0) -> bytes:
        pixels = b"".join(b"\0" + bytes([value]) * (row - 1) for row in rows)[:length]
        return png_of((43, 21), depth, colour, pixels, *palette, interlaced=len(rows) > 21)

    stored(made(sum(rows)))  # all black or transparent, as missing rows would be
    for count in (len(rows) - 1, len(rows) // 2, 1, 0):
        assert reason(made(sum(rows[:count]))) == "truncated"
        assert reason(made(sum(rows[:count]), 0x11)) == "truncated"
    assert reason(made(sum(rows) - 1)) == "truncated"


def test_a_png_may_hold_more_than_its_pixels() -> None:
    assert_shows(stored(png_of((16, 16), 8, 0, bytes(1000))), Image.new("L", (16, 16)))


def test_a_compressed_text_chunk_cannot_bomb() -> None:
    bomb = b"note\0\0" + zlib.compress(bytes(50_000_000), 9)
    assert_shows(stored(with_chunk(sample("png"), b"zTXt", bomb)), ramp())


@pytest.mark.parametrize("name", [b"gAMA", b"pHYs", b"tEXt", b"cHRM", b"acTL", b"fcTL", b"prVt"])
def test_a_fault_in_an_unneeded_chunk_is_ignored(name: bytes) -> None:
    for body in (b"", b"\0\0\0\1", bytes(26)):
        assert_shows(stored(with_chunk(sample("png"), name, body)), ramp())
        damaged = bytearray(with_chunk(sample("png"), name, body))
        damaged[damaged.index(name) + 4 + len(body)] ^= 1  # its checksum
        assert_shows(stored(bytes(damaged)), ramp())


@pytest.mark.parametrize("tail", [b"\n", b"\r\n", bytes(3), bytes(100), b"\0\0\0\1IDAT"])
def test_bytes_after_the_end_of_a_png_are_ignored(tail: bytes) -> None:
    assert_shows(stored(file_of(ramp(), "png") + tail), ramp())


def test_a_profile_of_a_png_that_is_a_bomb_or_damaged_is_ignored() -> None:
    bomb = zlib.compress(swapped_profile() + bytes(50_000_000), 9)
    for body in (b"name\0\0" + bomb, b"name\0\0no zlib", b"name\0\1" + zlib.compress(swapped_profile()), b"name", b""):
        assert_shows(stored(with_chunk(sample("png"), b"iCCP", body)), ramp())


def test_a_png_that_is_too_small_for_its_pixels_is_refused_before_memory_is_allocated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("decoded"))
    assert reason(png_of((9_000, 9_000), 8, 6, bytes(10_000))) == "truncated"


def test_a_plain_png_is_not_too_small_for_its_pixels() -> None:
    stored(file_of(Image.new("RGBA", (2_000, 2_000)), "png", compress_level=9))


def test_chunks_that_repeat_take_no_memory() -> None:
    """Of each ancillary chunk that is read the first one counts; a file of chunks alone is not read to its end."""
    data = sample("png")
    one = with_chunk(data, b"eXIf", b"II*\0" + bytes(10_000))
    many = one
    for _ in range(5):
        many = with_chunk(many, b"eXIf", b"II*\0" + bytes(10_000))
    assert png.bare(many) == png.bare(one)
    profile = b"p\0\0" + zlib.compress(bytes(6_000_000), 9)  # larger than any profile that is used
    bombs = with_chunk(with_chunk(data, b"iCCP", profile), b"iCCP", profile)
    assert png.bare(bombs) == (png.bare(data)[0], b"")
    at = data.index(b"IDAT") - 4
    chunk = struct.pack(">I", 0) + b"tEXt" + struct.pack(">I", zlib.crc32(b"tEXt"))
    assert reason(data[:at] + chunk * 110_000 + data[at:]) == "unsupported"


def test_unknown_critical_chunks_are_ignored_like_ancillary_ones() -> None:
    assert_shows(stored(with_chunk(sample("png"), b"AbCD", bytes(100))), ramp())


def test_what_is_wrong_with_the_last_chunk_is_not_wrong_with_the_pixels() -> None:
    """As viewers show it: IEND holds nothing."""
    rows = b"".join(b"\0" + bytes(range(n, n + 129)) for n in range(60, 80)) + b"\0" + bytes(129)
    data = png_of((43, 21), 8, 2, rows)
    whole = stored(data)
    damaged = [data[:-cut] for cut in range(1, 13)]
    damaged += [data[:-1] + b"\0", data[:-12] + b"\0\0\0\4IENDjunk\0\0\0\0", data + b"junk"]
    assert all(stored(other).jpeg == whole.jpeg for other in damaged)
    for cut in (13, 60, 200):  # a chunk of pixels, or its checksum
        assert reason(data[:-cut]) == "truncated"
    # Without IEND, too, pixels that are missing are noticed, also where the last row would not be blank.
    for count in (20, 10, 0):
        assert reason(png_of((43, 21), 8, 2, rows[: 130 * count])[:-12]) == "truncated"
        assert reason(png_of((43, 21), 8, 2, rows[: 130 * count + 70])[:-12]) == "truncated"
    assert reason(data[:33]) == "truncated"
