"""JPEG files: harmless faults and damage, metadata, and when a file is stored without re-encoding."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from drawn import (
    FILES,
    drawing,
    file_of,
    pixels_of,
    ramp,
    reason,
    sample,
    stored,
    swapped_profile,
)
from PIL import Image, ImageCms

from capstan.pipeline import config
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


# Harmless faults and damage ------------------------------------------------------------------------------------------


def photo(**options: object) -> bytes:
    """A JPEG of a busy drawing, large enough that every scan has some hundred bytes."""
    return file_of(drawing(5, 240), "jpeg", quality=85, **options)


def before(data: bytes, marker: bytes, stray: bytes) -> bytes:
    at = data.index(marker)
    return data[:at] + stray + data[at:]


def pieces(data: bytes) -> list[bytes]:
    """The segments of a JPEG, each scan with its header."""
    found = list(jpeg.segments(data))
    sizes = [(len(segment.payload) + 2).to_bytes(2, "big") for segment in found]
    return [bytes((255, s.marker)) + size + s.payload + s.scan for s, size in zip(found, sizes, strict=True)]


SOI, EOI, DQT, DHT, SOS = (b"\xff" + bytes([marker]) for marker in (0xD8, 0xD9, 0xDB, 0xC4, 0xDA))
HARMLESS = {
    "line break before DQT": lambda data: before(data, DQT, b"\r\n"),
    "line break before DHT": lambda data: before(data, DHT, b"\r\n"),
    "line break before SOS": lambda data: before(data, SOS, b"\r\n"),
    "private segment without its marker": lambda data: before(
        data, DQT, b"\0\xe1\0\x20" + b"a segment of a phone, 30 bytes"
    ),
    "zeros before EOI": lambda data: data[:-2] + bytes(600) + EOI,
    "many zeros before EOI": lambda data: data[:-2] + bytes(70_000) + EOI,
    "spaces before EOI": lambda data: data[:-2] + b" " * 40 + EOI,
    "one byte before EOI": lambda data: data[:-2] + b"\x7f" + EOI,
    "no EOI": lambda data: data[:-2],
    "half an EOI": lambda data: data[:-1],
    "odd JFIF version": lambda data: data.replace(b"JFIF\0\1\1", b"JFIF\0\x63\1"),
    "several at once": lambda data: before(data.replace(b"JFIF\0\1\1", b"JFIF\0\x63\1"), DQT, b"\n\n")[:-2] + bytes(64),
}


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True, "subsampling": 0}], ids=str)
@pytest.mark.parametrize("fault", HARMLESS)
def test_a_fault_that_changes_no_pixel_is_ignored(fault: str, options: dict[str, object]) -> None:
    """The stored file is one that strict readers take."""
    data = photo(**options)
    kept = stored(HARMLESS[fault](data))
    assert (simplejpeg.decode_jpeg(kept.jpeg, strict=True) == simplejpeg.decode_jpeg(data)).all()
    small = config.Image(size=100, min_size=8)
    assert stored(HARMLESS[fault](data), small).jpeg == stored(data, small).jpeg


def test_an_odd_spectral_range_of_a_sequential_scan_is_ignored() -> None:
    data = photo()
    at = data.index(SOS) + 2
    end = at + int.from_bytes(data[at : at + 2], "big")
    assert stored(data[: end - 3] + bytes(3) + data[end:]).jpeg == stored(data).jpeg


@pytest.mark.parametrize("tail", [b"", bytes(600)])
def test_damage_between_the_scans_of_a_progressive_file_is_corrupt(tail: bytes) -> None:
    data = photo(progressive=True)
    for size in (20, 40, 200):
        at = data.index(SOS) + 60
        garbled = data[:at] + np.random.default_rng(size).integers(0, 255, size).astype(np.uint8).tobytes() + data[at:]
        assert reason(garbled[:-2] + tail + EOI) == "corrupt"


def test_lost_or_swapped_scans_are_refused() -> None:
    parts = pieces(photo(progressive=True))
    scans = [number for number, part in enumerate(parts) if part.startswith(SOS)]
    assert len(scans) == 10
    for lost in scans:
        assert reason(SOI + b"".join(part for n, part in enumerate(parts) if n != lost) + EOI) in (
            "truncated",
            "corrupt",
        )
    assert reason(SOI + b"".join(parts[: scans[-1]]) + EOI) == "truncated"
    parts[scans[0]], parts[scans[-4]] = parts[scans[-4]], parts[scans[0]]
    assert reason(SOI + b"".join(parts) + EOI) in ("truncated", "corrupt")


def test_padding_does_not_hide_lost_data() -> None:
    """Zeros in place of the last bytes, and too few bytes before zeros."""
    data = photo()
    assert reason(data[:-900] + bytes(898) + EOI) in ("truncated", "corrupt")
    assert reason(data[:-40] + bytes(600) + EOI) in ("truncated", "corrupt")
    assert reason(data[: len(data) // 2] + data[len(data) // 2 + 300 : -2] + bytes(600) + EOI) in (
        "truncated",
        "corrupt",
    )
    assert reason(data[:-40]) == "truncated"


@pytest.mark.parametrize("progressive", [False, True])
def test_endless_scans_are_refused_before_they_are_decoded(progressive: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few kilobytes of scans over a large image would take minutes of decoding."""
    parts = pieces(photo(progressive=progressive))
    frame = next(n for n, part in enumerate(parts) if part[1] in (0xC0, 0xC2))
    parts[frame] = parts[frame][:5] + struct.pack(">HH", 9_000, 9_000) + parts[frame][9:]
    scan = next(part for part in parts if part.startswith(SOS))
    parts += [scan[: 2 + int.from_bytes(scan[2:4], "big")] + bytes(1000)] * 200
    monkeypatch.setattr("simplejpeg.decode_jpeg", lambda *_, **__: pytest.fail("decoded"))
    assert reason(SOI + b"".join(parts) + EOI) == "unsupported"


def test_a_file_that_is_too_small_for_its_pixels_is_refused_before_memory_is_allocated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of each block of 8 × 8 pixels there is one bit at least."""
    data = photo()
    frame = data.index(b"\xff\xc0") + 5
    large = data[:frame] + struct.pack(">HH", 9_000, 9_000) + data[frame + 4 :]
    monkeypatch.setattr("simplejpeg.decode_jpeg", lambda *_, **__: pytest.fail("decoded"))
    assert reason(large) == "truncated"


def test_a_plain_image_is_not_too_small_for_its_pixels() -> None:
    for options in ({}, {"progressive": True}, {"optimize": True, "quality": 1}):
        stored(file_of(Image.new("RGB", (2_000, 2_000), "white"), "jpeg", **options))
