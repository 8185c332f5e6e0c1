"""The walk over a JPEG's segments, the copy without metadata, and the decoder behind them."""

from __future__ import annotations

from drawn import FILES, file_of, ramp
from PIL import Image

from capstan.pipeline.image import jpeg
from fuzz_targets.images import check_image, typed, without_ends

SUFFIXES = (".jpg",)
WORDS = [b"\xff\xd8", b"\xff\xd9", b"\xff\xda", b"\xff\xc0", b"\xff\xc2", b"\xff\xc9", b"\xff\xc4", b"\xff\xdb"]
WORDS += [
    b"\xff\xe1\0\x08Exif\0\0",
    b"\xff\xe2ICC_PROFILE\0\1\1",
    b"\xff\xee\0\x0eAdobe",
    b"\xff\xdd\0\4\0\1",
    b"\xff\0",
]
LONGEST = 1 << 14


def seeds() -> list[bytes]:
    small = ramp(40, 24)
    exif = Image.Exif()
    exif[0x0112] = 6
    ways: list[dict[str, object]] = [
        {"quality": 60},
        {"progressive": True},
        {"subsampling": 0, "restart_marker_rows": 1},
        {"exif": exif.tobytes(), "icc_profile": b"profile", "comment": b"made by hand"},
    ]
    drawn = [file_of(small, "jpeg", **options) for options in ways]
    others = [file_of(small.convert(mode), "jpeg") for mode in ("L", "CMYK")]
    return without_ends([*drawn, *others, *(path.read_bytes() for path in sorted(FILES.glob("*.jpg")))])


def check(data: bytes) -> None:
    check_image(data, "jpeg", _walk)


def _walk(data: bytes) -> None:
    header = jpeg.read_header(data)
    assert 1 <= jpeg.orientation(header.exif) <= 8
    jpeg.has_end(data)
    for needs_end in (False, True):
        with typed():
            list(jpeg.segments(data, needs_end=needs_end))
    with typed():
        jpeg.check_scans(data, header)
    with typed():
        tidied = jpeg.tidy(data, header)
        assert jpeg.strip(tidied) == tidied
        jpeg.without_padding(tidied)
    bare = jpeg.strip(data)
    assert jpeg.strip(bare) == bare
    after = jpeg.read_header(bare)
    assert (after.width, after.height, after.exif, after.icc) == (header.width, header.height, b"", b"")
