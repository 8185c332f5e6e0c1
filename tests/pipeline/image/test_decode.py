"""The pixel contract, line by line, on real files of each kind: formats, orientation, sizes, pass-through."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
from drawn import FILES, KINDS, SEVERAL, assert_shows, drawing, file_of, pixels_of, ramp, sample, stored
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from capstan.pipeline import config
from capstan.pipeline.image.decode import check_hash

# Formats -------------------------------------------------------------------------------------------------------------


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


def test_an_animation_is_reduced_to_its_first_frame() -> None:
    frames = [Image.new("RGB", (96, 72), "navy"), Image.new("RGB", (96, 72), "red")]
    for kind in ("gif", "png", "webp", "tiff", "avif"):
        data = file_of(ramp(), kind, save_all=True, append_images=frames)
        assert_shows(stored(data), ramp(), 8.0)


def test_a_small_first_gif_frame_is_laid_on_white() -> None:
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


@pytest.mark.parametrize("kind", ["jpeg", "png"])
@pytest.mark.parametrize("sides", [(400, 300), (301, 499), (333, 1000), (130, 101)])
def test_the_middle_of_the_scaled_image_is_stored(kind: str, sides: tuple[int, int]) -> None:
    data = file_of(drawing(3).resize(sides), kind)
    whole = stored(data, config.Image(size=100, resize="keep_ratio", quality=100))
    middle = stored(data, config.Image(size=100, resize="center_crop", quality=100))
    left, top = middle.crop_left, middle.crop_top
    expected = pixels_of(whole)[top : top + 100, left : left + 100].astype(float)
    assert (middle.width, middle.height) == (100, 100)
    assert np.abs(pixels_of(middle) - expected).mean() < 6


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


@pytest.mark.parametrize("side", [400, 320, 240])
def test_shrinking_removes_finer_patterns(side: int) -> None:
    """Noise is all patterns at once. Taking every pixel's nearest neighbours alone would differ by 9, 17 and 16."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 480), dtype=np.uint8))
    shown = pixels_of(stored(file_of(noise, "png"), config.Image(size=side, min_size=8, quality=100)))
    smooth = np.asarray(noise.resize((side, side), Image.Resampling.BILINEAR)).astype(float)
    assert np.abs(shown[:, :, 0] - smooth).mean() < 8


# Stored as it is -----------------------------------------------------------------------------------------------------


def test_no_metadata_in_any_stored_image() -> None:
    exif = Image.Exif()
    exif[0x010F] = "Camera maker"
    for kind in ("jpeg", "png", "webp", "tiff", "avif"):
        for size in (32, 4096):
            picture = stored(file_of(ramp(), kind, exif=exif.tobytes()), config.Image(size=size, min_size=8))
            assert b"Camera" not in picture.jpeg


# Hashes --------------------------------------------------------------------------------------------------------------


def test_the_same_bytes_give_the_same_image() -> None:
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
