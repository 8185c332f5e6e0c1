"""The pixel contract, line by line, on real files of each kind. files/ holds what Pillow cannot write (cjpeg made them:
-arithmetic, -sample 4x1,1x2,2x1, -rgb and so on, of the `ramp` below)."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageDraw

from pipeline import config, formats, jpeg
from pipeline.decode import Failure, Picture, check_hash, decode
from pipeline.phash import phash
from pipeline.records import is_reason

FILES = Path(__file__).parent / "files"
PLAIN = config.Image(size=4096, min_size=8, resize="keep_ratio")  # stores every test picture at its own size
SEVERAL = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def ramp(width: int = 96, height: int = 72) -> Image.Image:
    """Ramps of red to the right and green downward, with a blue box off centre: no symmetry hides a wrong turn."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 // (width - 1), y * 255 // (height - 1), np.full_like(x, 40)], axis=-1).astype(np.uint8)
    pixels[height * 20 // 72 : height * 40 // 72, width * 30 // 96 : width * 60 // 96] = (20, 40, 220)
    return Image.fromarray(pixels)


def file_of(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def stored(data: bytes, image: config.Image = PLAIN) -> Picture:
    picture = decode(data, image)
    assert isinstance(picture, Picture), picture
    return picture


def pixels_of(picture: Picture) -> np.ndarray:
    with Image.open(io.BytesIO(picture.jpeg)) as shown:
        assert (shown.format, shown.mode, shown.size) == ("JPEG", "RGB", (picture.width, picture.height))
        assert not set(shown.info) & {"exif", "icc_profile", "comment", "photoshop", "xmp"}
        return np.asarray(shown).astype(int)


def assert_shows(picture: Picture, expected: Image.Image, tolerance: float = 4.0) -> None:
    """Mean absolute difference per channel within `tolerance` levels (JPEG's own loss is about 2)."""
    difference = np.abs(pixels_of(picture) - np.asarray(expected.convert("RGB")).astype(int))
    assert difference.mean() < tolerance


def reason(data: bytes, image: config.Image = PLAIN) -> str:
    failure = decode(data, image)
    assert isinstance(failure, Failure), failure
    assert is_reason(failure.reason)
    return failure.reason


# Formats -------------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("name", KINDS)
def test_reads(name: str) -> None:
    assert_shows(stored(sample(name)), ramp(), 8.0 if name == "gif" else 4.0)


@pytest.mark.parametrize("path", sorted(FILES.glob("*.jpg")), ids=lambda path: path.stem)
def test_reads_rare_jpegs(path: Path) -> None:
    assert_shows(stored(path.read_bytes()), ramp())


@pytest.mark.parametrize("sampling", ["411", "420", "422", "440", "444"])
def test_reads_every_chroma_subsampling(sampling: str) -> None:
    flag = getattr(cv2, f"IMWRITE_JPEG_SAMPLING_FACTOR_{sampling}")
    odd = ramp(97, 71)  # sides that no block divides
    bgr = np.asarray(odd)[:, :, ::-1]
    assert_shows(stored(cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, flag])[1].tobytes()), odd)


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (96, 72), "navy"), Image.new("RGB", (96, 72), "red")]
    for kind in ("gif", "png", "webp", "tiff", "avif"):
        data = file_of(ramp(), kind, save_all=True, append_images=frames)
        assert_shows(stored(data), ramp(), 8.0)


def test_a_small_first_gif_frame_lies_on_white() -> None:
    palette = bytes((200, 0, 0)) + bytes(3)
    header = b"GIF89a" + struct.pack("<HHBBB", 40, 30, 0x80, 0, 0) + palette
    frame = file_of(Image.new("P", (10, 10), 0), "gif")
    start = frame.index(b"\x2c")
    body = frame[start + 10 :]
    if frame[start + 9] & 0x80:
        body = body[3 << (frame[start + 9] & 7) + 1 :]
    data = header + b"\x2c" + struct.pack("<HHHHB", 20, 15, 10, 10, 0) + body
    shown = pixels_of(stored(data))
    assert shown[2, 2].min() > 240
    assert abs(shown[20, 25] - (200, 0, 0)).max() < 25


# Orientation ---------------------------------------------------------------------------------------------------------

TURNS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,  # stored so, a viewer turns it back by 270
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff", "avif"])
@pytest.mark.parametrize("orientation", TURNS)
def test_orientation_is_applied(kind: str, orientation: int) -> None:
    turn = TURNS[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    quality = {"quality": 95} if kind != "png" else {}
    data = file_of(ramp() if turn is None else ramp().transpose(turn), kind, exif=exif.tobytes(), **quality)
    picture = stored(data)
    assert (picture.original_width, picture.original_height) == (96, 72)
    assert_shows(picture, ramp())
    small = stored(data, config.Image(size=36, min_size=8))
    assert (small.width, small.height) == (48, 36)
    assert_shows(small, ramp().resize((48, 36), Image.Resampling.BOX), 6.0)


@pytest.mark.parametrize("exif", [b"", b"II*\0", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff" + bytes(30)])
def test_damaged_exif_means_upright(exif: bytes) -> None:
    assert jpeg.orientation(exif) == 1


# Colours -------------------------------------------------------------------------------------------------------------


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
    picture = ramp().quantize(64, dither=Image.Dither.NONE) if mode == "P" else ramp().convert(mode)
    assert_shows(stored(file_of(picture, kind)), picture, 5.0)


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
def test_alpha_lies_on_white(kind: str) -> None:
    quality = {"quality": 95} if kind in ("webp", "avif") else {}
    picture = ramp().convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").resize((96, 72)))
    white = Image.new("RGBA", picture.size, "white")
    assert_shows(stored(file_of(picture, kind, **quality)), Image.alpha_composite(white, picture), 5.0)


def test_other_kinds_of_transparency_lie_on_white() -> None:
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


def with_chunk(png: bytes, name: bytes, body: bytes) -> bytes:
    """`png` with one more chunk before its pixels."""
    at = png.index(b"IDAT") - 4
    chunk = struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return png[:at] + chunk + png[at:]


# Sizes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resize", "size", "stored_size", "crop"),
    [
        ("keep_ratio", 100, (200, 100), (0, 0)),
        ("keep_ratio", 1000, (400, 200), (0, 0)),
        ("center_crop", 100, (100, 100), (50, 0)),
        ("center_crop", 1000, (200, 200), (100, 0)),
        ("border", 100, (100, 100), (0, -25)),
        ("border", 500, (500, 500), (-50, -150)),
        ("none", 100, (400, 200), (0, 0)),
    ],
)
@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_resize_modes(kind: str, resize: str, size: int, stored_size: tuple[int, int], crop: tuple[int, int]) -> None:
    picture = stored(file_of(ramp(400, 200), kind), config.Image(size=size, resize=resize, min_size=8))
    assert (picture.width, picture.height) == stored_size
    assert (picture.crop_left, picture.crop_top) == crop
    assert (picture.original_width, picture.original_height) == (400, 200)
    shown = pixels_of(picture)
    if resize == "border":
        assert shown[0].min() > 235  # the padding is white
        assert abs(shown[size // 2, size // 2] - np.asarray(ramp(400, 200))[100, 200]).max() < 40
    elif resize == "center_crop":
        assert shown[:, 0, 0].mean() == pytest.approx(255 / 4, abs=12)  # the left quarter is cut off


@given(
    width=st.integers(8, 300),
    height=st.integers(8, 300),
    size=st.integers(8, 320),
    resize=st.sampled_from(["keep_ratio", "center_crop", "border", "none"]),
    kind=st.sampled_from(["jpeg", "png"]),
)
@SEVERAL
def test_never_enlarged_and_aspect_kept(width: int, height: int, size: int, resize: str, kind: str) -> None:
    picture = stored(file_of(ramp(width, height), kind), config.Image(size=size, resize=resize, min_size=8))
    content_w = picture.width + 2 * picture.crop_left if resize == "border" else picture.width
    content_h = picture.height + 2 * picture.crop_top if resize == "border" else picture.height
    assert content_w <= width + 1  # odd padding lies to one side
    assert content_h <= height + 1
    if resize == "keep_ratio":
        assert min(picture.width, picture.height) == min(size, width, height)
        scale = min(1.0, size / min(width, height))
        assert abs(picture.width - width * scale) <= 0.5
        assert abs(picture.height - height * scale) <= 0.5
    elif resize == "center_crop":
        assert picture.width == picture.height == min(size, width, height)
    elif resize == "border":
        assert picture.width == picture.height == size
    else:
        assert (picture.width, picture.height) == (width, height)
    assert (picture.original_width, picture.original_height) == (width, height)


def test_scaled_decoding_looks_like_full_decoding() -> None:
    big = ramp(1500, 1100)
    picture = stored(file_of(big, "jpeg", quality=95), config.Image(size=256))
    assert (picture.width, picture.height) == (349, 256)
    assert_shows(picture, big.resize((349, 256), Image.Resampling.BOX), 3.0)


# Stored as it is -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_fits_is_not_encoded_again_and_loses_its_metadata(progressive: bool) -> None:
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


def test_a_thumbnail_in_the_jfif_header_goes() -> None:
    data = file_of(ramp(), "jpeg", quality=80)
    size = struct.unpack(">H", data[4:6])[0]
    header = data[2:4] + struct.pack(">H", size + 48) + data[6:18] + b"\x04\x04" + b"T" * 48
    picture = stored(data[:2] + header + data[4 + size :])
    assert picture.jpeg == data


def test_what_does_not_fit_is_encoded_again() -> None:
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


def test_no_metadata_in_any_stored_picture() -> None:
    exif = Image.Exif()
    exif[0x010F] = "Camera maker"
    for kind in ("jpeg", "png", "webp", "tiff", "avif"):
        for size in (32, 4096):
            picture = stored(file_of(ramp(), kind, exif=exif.tobytes()), config.Image(size=size, min_size=8))
            assert b"Camera" not in picture.jpeg


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


@given(name=st.sampled_from(sorted(KINDS)), share=st.floats(0, 1))
@SEVERAL
def test_cutting_never_changes_a_picture(name: str, share: float) -> None:
    data = sample(name)
    cut = data[: int(len(data) * share)]
    assume(len(cut) < len(data))
    result = decode(cut, PLAIN)
    if isinstance(result, Picture):  # what was lost is no part of the picture
        assert result.jpeg == stored(data).jpeg
    else:
        assert result.reason == ("empty" if not cut else result.reason)
        assert is_reason(result.reason)


@given(data=st.binary(max_size=400), magic=st.sampled_from([b"", b"RIFF\xff\0\0\0WEBP", b"BM", *formats._READ]))
@SEVERAL
def test_random_bytes_never_raise(data: bytes, magic: bytes) -> None:
    assert is_reason(reason(magic + data))


@given(name=st.sampled_from(sorted(KINDS)), where=st.floats(0, 1), value=st.integers(1, 255))
@SEVERAL
def test_a_damaged_byte_never_raises(name: str, where: float, value: int) -> None:
    data = bytearray(sample(name))
    data[min(int(where * len(data)), len(data) - 1)] ^= value
    result = decode(bytes(data), config.Image(size=64, min_size=8, max_pixels=10_000_000))
    assert isinstance(result, Picture) or is_reason(result.reason)


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
def test_what_is_no_picture(data: bytes, expected: str) -> None:
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


def test_a_side_that_no_jpeg_can_hold_is_refused() -> None:
    data = file_of(Image.new("1", (70_000, 8)), "png")
    assert reason(data, config.Image(resize="none", min_size=8)) == "unsupported"


# Hashes --------------------------------------------------------------------------------------------------------------


def drawing(seed: int, size: int = 400) -> Image.Image:
    rng = np.random.default_rng(seed)
    picture = Image.new("RGB", (size, size), tuple(rng.integers(0, 256, 3)))
    draw = ImageDraw.Draw(picture)
    for _ in range(12):
        x, y, r = rng.random(3) * size
        draw.ellipse((x - r / 4, y - r / 4, x + r / 4, y + r / 4), fill=tuple(rng.integers(0, 256, 3)))
    return picture


def test_phash_is_near_for_the_same_picture_and_far_for_another() -> None:
    hashes = []
    for seed in range(8):
        picture = drawing(seed)
        large = stored(file_of(picture, "png")).phash
        small = stored(file_of(picture.resize((200, 200)), "jpeg", quality=60)).phash
        scaled = stored(file_of(picture, "jpeg", quality=80), config.Image(size=128)).phash
        assert (large ^ small).bit_count() <= 6
        assert (large ^ scaled).bit_count() <= 6
        assert 0 <= large < 2**64
        hashes.append(large)
    apart = [(a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(apart) > 10


def test_phash_of_a_flat_picture_is_zero() -> None:
    assert phash(np.full((50, 70, 3), 137, np.uint8)) == 0


def test_the_same_bytes_give_the_same_picture() -> None:
    for name in KINDS:
        data = sample(name)
        image = config.Image(size=40, min_size=8)
        first = stored(data, image)
        assert first == stored(data, image)
        assert first.sha256 == hashlib.sha256(data).hexdigest()


def test_check_hash() -> None:
    data = b"bytes"
    md5 = "4b3a6218bb3e3a7303e8a171a60fcf92"
    assert check_hash(data, md5) is None
    assert check_hash(data, md5.upper()) is None
    for wrong in ("0" * 32, "0" * 64, "0" * 128, "", "xyz"):
        failure = check_hash(data, wrong)
        assert failure is not None
        assert failure.reason == "corrupt"
