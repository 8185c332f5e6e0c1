"""A drawn image as files of every kind, and checks of the image that is stored.

files/ holds files that Pillow cannot write (made by cjpeg: -arithmetic,
-sample 4x1,1x2,2x1, -rgb and so on, of `ramp`).
"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, settings
from PIL import Image, ImageCms, ImageDraw

from capstan.pipeline import config
from capstan.pipeline.image.decode import Failure, StoredImage, decode
from capstan.pipeline.records import is_reason

FILES = Path(__file__).parents[1] / "pipeline" / "files"
PLAIN = config.Image(size=4096, min_size=8, resize="keep_ratio")  # stores every test image at its own size
SEVERAL = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def ramp(width: int = 96, height: int = 72) -> Image.Image:
    """Ramps of red to the right and green downward, with a blue box off centre: no symmetry hides a wrong turn."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 // (width - 1), y * 255 // (height - 1), np.full_like(x, 40)], axis=-1).astype(np.uint8)
    pixels[height * 20 // 72 : height * 40 // 72, width * 30 // 96 : width * 60 // 96] = (20, 40, 220)
    return Image.fromarray(pixels)


def drawing(seed: int, size: int = 400) -> Image.Image:
    """Return a drawing of twelve random discs; every seed draws another."""
    rng = np.random.default_rng(seed)
    picture = Image.new("RGB", (size, size), tuple(rng.integers(0, 256, 3)))
    draw = ImageDraw.Draw(picture)
    for _ in range(12):
        x, y, r = rng.random(3) * size
        draw.ellipse((x - r / 4, y - r / 4, x + r / 4, y + r / 4), fill=tuple(rng.integers(0, 256, 3)))
    return picture


def file_of(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def stored(data: bytes, image: config.Image = PLAIN) -> StoredImage:
    picture = decode(data, image)
    assert isinstance(picture, StoredImage), picture
    return picture


def pixels_of(picture: StoredImage) -> np.ndarray:
    with Image.open(io.BytesIO(picture.jpeg)) as shown:
        assert (shown.format, shown.mode, shown.size) == ("JPEG", "RGB", (picture.width, picture.height))
        assert not set(shown.info) & {"exif", "icc_profile", "comment", "photoshop", "xmp"}
        return np.asarray(shown).astype(int)


def assert_shows(picture: StoredImage, expected: Image.Image, tolerance: float = 4.0) -> None:
    """Mean absolute difference per channel within `tolerance` levels (JPEG's own loss is about 2)."""
    difference = np.abs(pixels_of(picture) - np.asarray(expected.convert("RGB")).astype(int))
    assert difference.mean() < tolerance


def reason(data: bytes, image: config.Image = PLAIN) -> str:
    failure = decode(data, image)
    assert isinstance(failure, Failure), failure
    assert is_reason(failure.reason)
    return failure.reason


KINDS = {
    "jpeg": {"quality": 95},
    "progressive": {"quality": 95, "progressive": True},
    "png": {},
    "webp": {"lossless": True},
    "webp lossy": {"quality": 95},
    "gif": {},
    "bmp": {},
    "tiff": {},
    "tiff lzw": {"compression": "tiff_lzw"},
    "tiff jpeg": {"compression": "jpeg", "quality": 95},
    "avif": {"quality": 95, "speed": 10},
}


def sample(name: str, picture: Image.Image | None = None) -> bytes:
    kind = {"progressive": "jpeg"}.get(name, name.split()[0])
    return file_of(picture or ramp(), kind, **KINDS[name])


def swapped_profile() -> bytes:
    """A matrix profile whose red and blue primaries are swapped: what is stored as red must come out blue."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {}
    for index in range(struct.unpack_from(">I", profile, 128)[0]):
        entry = 132 + 12 * index
        tags[bytes(profile[entry : entry + 4])] = entry
    red, blue = profile[tags[b"rXYZ"] + 4 : tags[b"rXYZ"] + 12], profile[tags[b"bXYZ"] + 4 : tags[b"bXYZ"] + 12]
    profile[tags[b"rXYZ"] + 4 : tags[b"rXYZ"] + 12] = blue
    profile[tags[b"bXYZ"] + 4 : tags[b"bXYZ"] + 12] = red
    return bytes(profile)


def with_chunk(png: bytes, name: bytes, body: bytes) -> bytes:
    """`png` with one more chunk before its pixels."""
    at = png.index(b"IDAT") - 4
    chunk = struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return png[:at] + chunk + png[at:]


def png_of(
    size: tuple[int, int], depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes], interlaced: bool = False
) -> bytes:
    """A PNG by hand: IHDR, `chunks`, `rows` (each after its filter byte) in three IDATs, IEND."""
    packed = zlib.compress(rows)
    parts = [packed[: len(packed) // 3], packed[len(packed) // 3 :], b""]
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, interlaced)
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in [(b"IHDR", header), *chunks, *((b"IDAT", part) for part in parts), (b"IEND", b"")]:
        data += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return data
