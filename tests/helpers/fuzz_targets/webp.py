"""The walk over a WebP's chunks, other formats' signatures and boxes, and the decoders behind them."""

from __future__ import annotations

from drawn import file_of, ramp

from capstan.pipeline.image import limits, sniff
from fuzz_targets.images import check_image, typed, without_ends

SUFFIXES = (".webp", ".gif", ".bmp", ".tif", ".avif")
WORDS = [b"RIFF", b"WEBP", b"VP8 ", b"VP8L", b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"EXIF", b"ICCP", b"\x9d\x01\x2a"]
WORDS += [b"ftypavif", b"ispe", b"meta", b"GIF89a", b"\x21\xf9\4", b"II*\0", b"MM\0+", b"BM"]
LONGEST = 1 << 14


def seeds() -> list[bytes]:
    small = ramp(24, 16)
    frames = {"save_all": True, "append_images": [small.transpose(0)]}
    webps = [file_of(small, "webp", **options) for options in ({"quality": 50}, {"lossless": True}, frames)]
    exif = b"II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0"
    webps += [file_of(small.convert("RGBA"), "webp", exif=exif, icc_profile=b"profile")]
    others = [file_of(small, kind) for kind in ("gif", "bmp", "tiff", "avif")]
    return without_ends([*webps, *others])


def check(data: bytes) -> None:
    with typed():
        kind = sniff.sniff(data)
        limits.check_header(kind, data, 1_000_000)
        if kind == "avif":
            assert len(sniff.avif_sizes(data)) <= len(data)
    check_image(data, "webp", _walk)


def _walk(data: bytes) -> None:
    padded = sniff.padded_webp(data)
    assert len(data) <= len(padded) <= len(data) + 1
    sniff.webp_is_animated(data)
    width, height = sniff.webp_size(data)
    assert 0 <= width <= 1 << 24
    assert 0 <= height <= 1 << 24
