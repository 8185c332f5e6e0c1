"""The pixel contract, line by line, on real files of each kind: profiles, CMYK, 16 bits, palettes, transparency."""

from __future__ import annotations

import struct

import cv2
import numpy as np
import pytest
from drawn import assert_shows, file_of, pixels_of, png_of, ramp, stored, swapped_profile, with_chunk
from PIL import Image, ImageCms

from capstan.pipeline import config

# Colours -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff", "avif"])
def test_an_icc_profile_is_converted_to_srgb(kind: str) -> None:
    quality = {"quality": 95} if kind != "png" else {}
    data = file_of(ramp(), kind, icc_profile=swapped_profile(), **quality)
    red, green, blue = ramp().split()
    assert_shows(stored(data), Image.merge("RGB", (blue, green, red)), 8.0)


def icc(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC 2 output profile by hand (ICC.1:2001-04, 6): header, tag table, tags. PCS is Lab for ink, else XYZ."""
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78),
        b"cprt": b"text" + bytes(8),
    } | tags
    tags[b"wtpt"] = b"XYZ " + bytes(4) + struct.pack(">iii", 63190, 65536, 54061)
    table, body, at = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, tag in tags.items():
        tag += bytes(-len(tag) % 4)
        table += name + struct.pack(">II", at + len(body), len(tag))
        body += tag
    pcs = b"Lab " if space == b"CMYK" else b"XYZ "
    header = bytearray(128)
    header[8:24] = b"\x02\x20\0\0" + b"prtr" + space + pcs
    header[24:44] = struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(4)
    header[68:80] = struct.pack(">iii", 63190, 65536, 54061)
    header[:4] = struct.pack(">I", 128 + len(table) + len(body))
    return bytes(header) + table + body


def test_grey_and_cmyk_profiles() -> None:
    linear = icc(b"GRAY", {b"kTRC": b"curv" + bytes(8)})  # a curve of no points: light in proportion to the level
    grey = Image.new("L", (64, 64), 64)
    for data in (file_of(grey, "jpeg", icc_profile=linear), file_of(grey, "png", icc_profile=linear)):
        assert abs(pixels_of(stored(data)) - 137).max() <= 3  # sRGB's curve: 12.92 … 1.055 · (64 / 255)^(1/2.4) - 0.055

    # A table of 2⁴ colours: paper white without ink, black (L = 0) with all inks, L = 50 of 100 with any others.
    colours = b"".join(bytes(({0: 255, 15: 0}.get(corner, 128), 128, 128)) for corner in range(16))
    identity = bytes(range(256))
    matrix = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    table = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + matrix + identity * 4 + colours + identity * 3
    ink = Image.new("CMYK", (64, 64), (255, 0, 0, 0))
    for kind in ("jpeg", "tiff"):
        data = file_of(ink, kind, icc_profile=icc(b"CMYK", {b"A2B0": table}))
        assert abs(pixels_of(stored(data)) - 119).max() <= 6  # L = 50 in sRGB; without the profile it would be cyan


def test_a_profile_that_cannot_be_used_is_ignored() -> None:
    for profile in (b"no profile", ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()):
        assert_shows(stored(file_of(ramp(), "jpeg", quality=95, icc_profile=profile)), ramp())


@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_a_large_profile_is_used(kind: str) -> None:
    large = swapped_profile() + np.random.default_rng(0).bytes(1_500_000)
    red, green, blue = ramp().split()
    quality = {"quality": 95} if kind == "jpeg" else {}
    assert_shows(
        stored(file_of(ramp(), kind, icc_profile=large, **quality)), Image.merge("RGB", (blue, green, red)), 8.0
    )


def test_cmyk() -> None:
    ink = ramp().convert("CMYK")
    for data in (file_of(ink, "jpeg", quality=95), file_of(ink, "tiff")):
        assert_shows(stored(data), ink.convert("RGB"))
        assert_shows(stored(data, config.Image(size=36, min_size=8)), ink.convert("RGB").resize((48, 36)), 8.0)


def test_ycck() -> None:
    """A CMYK JPEG whose Adobe flag says YCCK: three components are the YCbCr of the ink, the fourth is inverted K."""
    ink = ramp().convert("CMYK")
    levels = np.asarray(ink)
    ycc = np.asarray(Image.fromarray(levels[:, :, :3]).convert("YCbCr"))
    planes = np.concatenate([255 - ycc, levels[:, :, 3:]], axis=-1)  # Pillow inverts all four on writing
    data = file_of(Image.frombytes("CMYK", ink.size, planes.tobytes()), "jpeg", quality=95, subsampling=0)
    flag = data.index(b"Adobe") + 11
    data = data[:flag] + b"\x02" + data[flag + 1 :]
    assert_shows(stored(data), ink.convert("RGB"))


@pytest.mark.parametrize("mode", ["L", "1", "P"])
@pytest.mark.parametrize("kind", ["png", "bmp", "tiff", "gif"])
def test_grey_one_bit_and_palette(kind: str, mode: str) -> None:
    image = ramp().quantize(64, dither=Image.Dither.NONE) if mode == "P" else ramp().convert(mode)
    assert_shows(stored(file_of(image, kind)), image, 5.0)


def test_grey_jpeg() -> None:
    assert_shows(stored(file_of(ramp().convert("L"), "jpeg", quality=95)), ramp().convert("L"))
    grey_profile = ramp().convert("L")
    data = file_of(grey_profile, "jpeg", quality=95, icc_profile=swapped_profile())  # made for RGB: ignored
    assert_shows(stored(data), grey_profile)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    levels = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    expected = Image.fromarray((levels >> 8).astype(np.uint8))
    for kind in ("png", "tiff"):
        assert_shows(stored(file_of(Image.fromarray(levels), kind)), expected)
    colour = np.stack([levels, levels[::-1], levels.T], axis=-1)
    for suffix in (".png", ".tiff"):
        data = cv2.imencode(suffix, colour[:, :, ::-1])[1].tobytes()
        assert_shows(stored(data), Image.fromarray((colour >> 8).astype(np.uint8)))


def test_sixteen_bit_tiff_where_white_is_zero() -> None:
    levels = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    data = file_of(Image.fromarray(levels), "tiff", tiffinfo={262: 0})
    assert_shows(stored(data), Image.fromarray(255 - (levels >> 8).astype(np.uint8)))


@pytest.mark.parametrize("kind", ["png", "webp", "tiff", "avif"])
def test_alpha_is_laid_on_white(kind: str) -> None:
    quality = {"quality": 95} if kind in ("webp", "avif") else {}
    image = ramp().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((96, 72)))
    white = Image.new("RGBA", image.size, "white")
    assert_shows(stored(file_of(image, kind, **quality)), Image.alpha_composite(white, image), 5.0)


def test_other_kinds_of_transparency_are_laid_on_white() -> None:
    grey = ramp().convert("L")
    alpha = Image.linear_gradient("L").resize((96, 72))
    both = Image.merge("LA", (grey, alpha))
    expected = Image.alpha_composite(Image.new("RGBA", grey.size, "white"), both.convert("RGBA"))
    assert_shows(stored(file_of(both, "png")), expected)

    flat = Image.new("P", (64, 64), 1)
    flat.putpalette([0, 0, 0, 0, 128, 0])
    flat.paste(0, (0, 0, 32, 64))
    for kind in ("png", "gif"):
        shown = pixels_of(stored(file_of(flat, kind, transparency=0)))
        assert shown[30, 5].min() > 240
        assert abs(shown[30, 60] - (0, 128, 0)).max() < 20

    levels = np.full((64, 64), 1000, np.uint16)
    levels[:, 32:] = 30000
    plain = file_of(Image.fromarray(levels), "png")
    shown = pixels_of(stored(with_chunk(plain, b"tRNS", struct.pack(">H", 1000))))
    assert shown[30, 5].min() > 240
    assert abs(shown[30, 60] - 117).max() < 10

    colour = np.zeros((64, 64, 3), np.uint16)
    colour[:, 32:] = 30000
    data = with_chunk(cv2.imencode(".png", colour)[1].tobytes(), b"tRNS", bytes(6))
    shown = pixels_of(stored(data))
    assert shown[30, 5].min() > 240
    assert abs(shown[30, 60] - 117).max() < 10


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_transparent_level_of_few_bits_is_laid_on_white(bits: int) -> None:
    top = (1 << bits) - 1
    for level in (0, 1):
        every = level * (255 // top)  # the level in each pixel of a byte
        rows = (b"\0" + bytes([every] * (4 * bits) + [255 - every] * (4 * bits))) * 64
        shown = pixels_of(stored(png_of((64, 64), bits, 0, rows, (b"tRNS", struct.pack(">H", level)))))
        assert shown[30, 5].min() > 250
        assert abs(shown[30, 60] - (255 - every)).max() <= 3
