"""JPEG files: truncation, metadata, and when a file is stored without re-encoding."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from drawn import (
    FILES,
    file_of,
    pixels_of,
    ramp,
    reason,
    sample,
    stored,
    swapped_profile,
)
from PIL import Image, ImageCms

from capstan.pipeline.image import jpeg


@pytest.mark.parametrize("path", sorted(FILES.glob("*.jpg")), ids=lambda path: path.stem)
def test_a_cut_rare_jpeg_is_refused(path: Path) -> None:
    data = path.read_bytes()
    for share in (0.3, 0.6, 0.9):
        assert reason(data[: int(len(data) * share)]) == "truncated"


def test_a_cut_jpeg_with_an_end_marker_is_truncated() -> None:
    data = sample("jpeg", ramp(200, 150))
    assert reason(data[: len(data) * 2 // 3] + b"\xff\xd9") == "truncated"


@pytest.mark.parametrize("exif", [b"", b"II*\0", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff" + bytes(30)])
def test_damaged_exif_means_upright(exif: bytes) -> None:
    assert jpeg.orientation(exif) == 1


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_fits_is_stored_without_re_encoding_or_metadata(progressive: bool) -> None:
    exif = Image.Exif()
    exif[0x010F] = "Camera maker"
    exif.get_ifd(0x8825)[2] = (52.0, 31.0, 12.0)  # GPS latitude
    data = file_of(
        ramp(), "jpeg", quality=80, progressive=progressive, exif=exif.tobytes(), comment=b"a secret",
        xmp=b"<x:xmpmeta>secret</x:xmpmeta>",
        icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    )  # fmt: skip
    picture = stored(data + b"trailing secret")
    bare = file_of(ramp(), "jpeg", quality=80, progressive=progressive)
    assert picture.jpeg == bare
    for word in (b"Camera", b"secret", b"Exif", b"ICC_PROFILE", b"xmp"):
        assert word not in picture.jpeg


def test_a_thumbnail_in_the_jfif_header_is_removed() -> None:
    data = file_of(ramp(), "jpeg", quality=80)
    size = struct.unpack(">H", data[4:6])[0]
    header = data[2:4] + struct.pack(">H", size + 48) + data[6:18] + b"\x04\x04" + b"T" * 48
    picture = stored(data[:2] + header + data[4 + size :])
    assert picture.jpeg == data


def test_a_jpeg_that_does_not_fit_is_re_encoded() -> None:
    """Turned, another colour space, grey, CMYK, arithmetic: common readers would show them wrongly or not at all."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for data in (
        file_of(ramp(), "jpeg", exif=exif.tobytes()),
        file_of(ramp(), "jpeg", icc_profile=swapped_profile()),
        file_of(ramp().convert("L"), "jpeg"),
        file_of(ramp().convert("CMYK"), "jpeg"),
        (FILES / "arithmetic.jpg").read_bytes(),
    ):
        picture = stored(data)
        assert picture.jpeg != jpeg.strip(data)
        pixels_of(picture)
