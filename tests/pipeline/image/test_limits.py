"""Declared sizes are counted before a decoder allocates them."""

from __future__ import annotations

import struct
import time

import pytest
from drawn import file_of, ramp, reason, sample, stored
from PIL import Image

from capstan.pipeline import config
from capstan.pipeline.image import decode, sniff


@pytest.fixture
def undecoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("decoded"))


def animation(side: int) -> bytes:
    """A WebP of two small frames on a canvas of this side."""
    first = Image.new("RGB", (64, 64), "red")
    data = bytearray(file_of(first, "webp", save_all=True, append_images=[Image.new("RGB", (64, 64), "blue")]))
    data[24:30] = (side - 1).to_bytes(3, "little") * 2
    return bytes(data)


def test_an_animations_canvases_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its decoder holds three of them, so a third of max_pixels is allowed."""
    stored(animation(64), config.Image(min_size=8, max_pixels=3 * 64 * 64))
    monkeypatch.setitem(decode._PLUGINS, "webp", lambda *_: pytest.fail("opened"))
    assert reason(animation(64), config.Image(min_size=8, max_pixels=3 * 64 * 64 - 1)) == "too_many_pixels"
    assert reason(animation(9_000)) == "too_many_pixels"


def tiled(side: int) -> bytes:
    """A TIFF of one tile, whose declared size is changed."""
    data = bytearray(file_of(ramp(), "tiff"))
    (at,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, at)
    entries = [bytes(data[at + 2 + 12 * n : at + 14 + 12 * n]) for n in range(count)]
    tags = {struct.unpack_from("<H", entry)[0]: entry for entry in entries}
    del tags[278]  # rows per strip
    for tag, value in ((322, side), (323, side)):
        tags[tag] = struct.pack("<HHII", tag, 4, 1, value)
    for strips, tiles in ((273, 324), (279, 325)):
        tags[tiles] = struct.pack("<H", tiles) + tags.pop(strips)[2:]
    directory = struct.pack("<H", len(tags)) + b"".join(tags[tag] for tag in sorted(tags)) + bytes(4)
    return bytes(data[:4]) + struct.pack("<I", len(data)) + bytes(data[8:]) + directory


def test_a_tiffs_tiles_are_counted(undecoded: None) -> None:
    """Whatever the size of the image that is cut from them."""
    assert reason(tiled(16_384)) == "too_many_pixels"


def box(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", 8 + len(body)) + name + body


def test_all_images_of_an_avif_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that are not shown: tiles of a grid, alpha, thumbnails. Bytes of pixels are not taken for boxes."""
    data = sample("avif")
    assert set(sniff.avif_sizes(data)) == {(96, 72)}
    shown, hidden = (box(b"ispe", bytes(4) + struct.pack(">II", side, side)) for side in (64, 30_000))
    pixels = box(b"mdat", b"ispe" + bytes(4) + struct.pack(">II", 60_000, 60_000))
    start = data[: int.from_bytes(data[:4], "big")]
    made = start + pixels + box(b"meta", bytes(4) + shown + hidden)
    assert sniff.avif_sizes(made) == [(64, 64), (30_000, 30_000)]
    monkeypatch.setitem(decode._PLUGINS, "avif", lambda *_: pytest.fail("opened"))
    assert reason(made) == "too_many_pixels"


MANY = 20_000_000  # bytes: what is read of a file
PARTS = {
    "a WebP that says 4 GB": (lambda: b"RIFF\xf8\xff\xff\xffWEBPVP8L" + bytes(40), "truncated"),
    "WebP chunks": (lambda: b"RIFF" + struct.pack("<I", MANY) + b"WEBP" + b"VP8L\0\0\0\0" * (MANY // 8), "unsupported"),
    "GIF sub-blocks": (lambda: b"GIF89a\x01\0\x01\0\0\0\0!\xfe" + b"\x01a" * (MANY // 2), "unsupported"),
    "GIF extensions": (lambda: b"GIF89a\x01\0\x01\0\0\0\0" + b"!\xfe\0" * (MANY // 3), "unsupported"),
    "AVIF boxes": (lambda: box(b"ftyp", b"avif\0\0\0\0avif") + box(b"free", b"") * (MANY // 8), "unsupported"),
    "AVIF sizes": (lambda: box(b"ftyp", b"avif\0\0\0\0avif") + box(b"meta", b"ispe" * (MANY // 4)), "unsupported"),
    "JPEG segments": (lambda: b"\xff\xd8" + b"\xff\xe1\0\2" * (MANY // 4), "unsupported"),
    "JPEG segments after the frame": (
        lambda: sample("jpeg")[:-2] + b"\xff\xfe\0\2" * (MANY // 4) + b"\xff\xd9",
        "unsupported",
    ),
    "JPEG markers alone": (lambda: b"\xff\xd8" + b"\xff\x01" * (MANY // 2), "unsupported"),
    "JPEG fill bytes": (lambda: b"\xff\xd8" + b"\xff" * MANY, "truncated"),
    "JPEG zeros": (lambda: b"\xff\xd8" + b"\xff\0" * (MANY // 2), "truncated"),
}


@pytest.mark.parametrize("name", PARTS)
def test_files_of_millions_of_parts_end_at_once(name: str) -> None:
    """The clock is against hangs only: some of these took minutes to walk."""
    make, expected = PARTS[name]
    data = make()
    start = time.process_time()
    assert reason(data) == expected
    assert time.process_time() - start < 10
