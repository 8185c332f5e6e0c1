"""`image.check: header`: JPEGs that are stored as they are are copied without decoding; all others are decoded."""

from __future__ import annotations

import pytest
from drawn import file_of, ramp, sample, swapped_profile
from PIL import Image

from capstan.pipeline import config
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.image import copied, jpeg
from capstan.pipeline.image.copied import copy_or_decode
from capstan.pipeline.image.decode import Failure, StoredImage, decode

HEADER = config.Image(resize="none", check="header", min_size=8)
FULL = config.Image(resize="none", min_size=8)


def with_gps() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 1
    exif.get_ifd(0x8825)[1] = "N"
    return file_of(ramp(), "jpeg", exif=exif.tobytes(), comment=b"taken at home")


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return file_of(ramp(), "jpeg", exif=exif.tobytes())


COPIED = {"plain": sample("jpeg"), "progressive": sample("progressive"), "gps": with_gps()}


@pytest.mark.parametrize("name", COPIED)
def test_a_jpeg_is_copied_without_its_metadata(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = COPIED[name]
    full = decode(data, FULL)
    monkeypatch.setattr(copied, "decode", lambda *_, **__: pytest.fail("decoded"))
    image = copy_or_decode(data, HEADER)
    assert isinstance(image, StoredImage)
    assert isinstance(full, StoredImage)
    assert (image.jpeg, image.sha256, image.width, image.height) == (full.jpeg, full.sha256, full.width, full.height)
    assert (image.phash, image.colours) == (0, "")
    assert {segment.marker for segment in jpeg.segments(image.jpeg)}.isdisjoint({0xE1, 0xE2, 0xFE})


DECODED = {
    "turned": turned(),
    "profile": file_of(ramp(), "jpeg", icc_profile=swapped_profile()),
    "grey": file_of(ramp().convert("L"), "jpeg"),
    "cmyk": file_of(ramp().convert("CMYK"), "jpeg"),
    "png": sample("png"),
    "webp": sample("webp"),
    "without its end": sample("jpeg")[:-2],
    "half": sample("jpeg")[: len(sample("jpeg")) // 2],
    "too small": file_of(ramp(6, 6), "jpeg"),
    "no image": b"<html>",
}


@pytest.mark.parametrize("name", DECODED)
def test_what_cannot_be_copied_is_decoded(name: str) -> None:
    assert copy_or_decode(DECODED[name], HEADER) == decode(DECODED[name], FULL)
    if name in ("half", "too small", "no image"):
        assert isinstance(decode(DECODED[name], FULL), Failure)


def test_an_image_whose_metadata_forbids_training_is_not_copied() -> None:
    denied = "http://ns.useplus.org/ldf/vocab/DMI-PROHIBITED-AIMLTRAINING"
    text = f'<rdf:Description xmlns:p="http://ns.useplus.org/ldf/xmp/1.0/" p:DataMining="{denied}"/>'
    data = file_of(ramp(), "jpeg", xmp=f'<x:xmpmeta xmlns:x="adobe:ns:meta/">{text}</x:xmpmeta>'.encode())
    failure = copy_or_decode(data, HEADER, noai=True)
    assert isinstance(failure, Failure)
    assert failure.reason == "noai"
    assert isinstance(copy_or_decode(data, HEADER), StoredImage)


def test_it_needs_images_that_are_not_resized() -> None:
    with pytest.raises(RecipeError, match=r"image: check: header copies images, and resize is keep_ratio"):
        config.validate(config.Recipe, {"dataset": "x", "image": {"check": "header"}})
    assert "check" not in FULL.model_dump()
    assert HEADER.model_dump()["check"] == "header"
