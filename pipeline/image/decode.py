"""One source file's bytes → the image to store, or a failure reason.

The pixel contract: the stored image is what a viewer would show. EXIF orientation is applied, colours are converted to
sRGB, transparency is laid on white, an animation is reduced to its first frame, and nothing is ever enlarged. A
truncated or damaged file yields a failure reason instead of half an image. Limits are checked against the headers
before anything is decoded.

JPEGs take a fast path (libjpeg-turbo with scaled decoding); a JPEG that already fits is stored without re-encoding.
Other formats, and unusual JPEGs, go through Pillow.
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Final

import cv2
import numpy as np
import simplejpeg
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from capstan.pipeline import config
from capstan.pipeline.image import jpeg, png, sniff
from capstan.pipeline.image.flatten import flatten, loaded, still_webp
from capstan.pipeline.image.icc import is_srgb, to_srgb
from capstan.pipeline.image.jpeg_pixels import RareSubsamplingError, decode_strictly
from capstan.pipeline.image.limits import check_header, check_tiff
from capstan.pipeline.image.opt_out import opt_out
from capstan.pipeline.image.phash import fingerprints
from capstan.pipeline.image.resize import shrink
from capstan.pipeline.image.sniff import Unreadable

LARGEST_SIDE: Final = 65_500  # pixels; the most that JPEG can hold (libjpeg's JPEG_MAX_DIMENSION)
_HASHED_SIDE: Final = 64  # an image stored unchanged is decoded no larger than this, for its phash
_PLUGINS: Final[dict[str, type[ImageFile.ImageFile]]] = {
    "jpeg": JpegImagePlugin.JpegImageFile,
    "png": PngImagePlugin.PngImageFile,
    "gif": GifImagePlugin.GifImageFile,
    "webp": WebPImagePlugin.WebPImageFile,
    "bmp": BmpImagePlugin.BmpImageFile,
    "tiff": TiffImagePlugin.TiffImageFile,
    "avif": AvifImagePlugin.AvifImageFile,
}


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image ready to be stored. Sizes are in pixels; `original_*` is the source as a viewer shows it.

    `crop_left` and `crop_top` are the pixels of the scaled image that were cut off there (negative: padded).
    `sha256` is the hash of the source bytes.
    """

    jpeg: bytes
    width: int
    height: int
    original_width: int
    original_height: int
    phash: int
    sha256: str
    crop_left: int = 0
    crop_top: int = 0
    colours: str = ""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an image could not be made: `reason` is one of `records.REASONS`, `detail` is for people."""

    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class _Layout:
    """Source size (w, h; upright) → stored size: scale to `scaled`, then crop or pad around the centre to `out`."""

    source: tuple[int, int]
    scaled: tuple[int, int]
    out: tuple[int, int]

    @property
    def offset(self) -> tuple[int, int]:
        """Left and top of `out` within `scaled`; negative if it is padded."""
        return (self.scaled[0] - self.out[0]) // 2, (self.scaled[1] - self.out[1]) // 2

    @property
    def changes_nothing(self) -> bool:
        return self.source == self.scaled == self.out


def decode(data: bytes, image: config.Image, *, noai: bool = False) -> StoredImage | Failure:
    """Decode `data` and return it as the settings in `image` say: an 8-bit sRGB JPEG without metadata.

    With `noai`, an image whose metadata forbids training fails.

    Bad bytes produce a Failure, never an exception. The same bytes and settings produce the same image.
    """
    _one_thread()
    try:
        kind = sniff.sniff(data)
        stored = _decode_jpeg(data, image) if kind == "jpeg" else _decode_other(kind, data, image)
        return Failure("noai", why_not) if noai and (why_not := opt_out(kind, data)) else stored
    except Unreadable as why:
        return Failure(why.reason, why.detail)
    except MemoryError:
        raise  # the machine's fault, not the image's: its size was checked
    except Exception as error:  # noqa: BLE001 - codecs raise anything; one bad file must not end the unit
        return Failure("corrupt", f"{type(error).__name__}: {error}")


def check_hash(data: bytes, expected: str) -> Failure | None:
    """Return a Failure unless `data` has the expected hash: hexadecimal md5, sha1, sha256 or sha512, by length."""
    name = {32: "md5", 40: "sha1", 64: "sha256", 128: "sha512"}.get(len(expected))
    if name is None:
        return Failure("corrupt", f"{expected!r} is not an md5, sha1, sha256 or sha512")
    actual = hashlib.new(name, data, usedforsecurity=False).hexdigest()
    return None if actual == expected.lower() else Failure("corrupt", f"{name} is {actual}, the source says {expected}")


@cache
def _one_thread() -> None:
    """Turn off OpenCV's threads: workers are processes, one per core, and threads would only compete."""
    cv2.setNumThreads(1)


# Sizes ---------------------------------------------------------------------------------------------------------------


def _plan(width: int, height: int, image: config.Image) -> _Layout:
    """Check the limits for a source of this size (as shown) and lay out the stored image. Nothing is ever enlarged."""
    if width * height > image.max_pixels:
        raise Unreadable("too_many_pixels", f"{width} x {height}")
    if min(width, height) < image.min_size:
        raise Unreadable("too_small", f"{width} x {height}")
    source = scaled = out = (width, height)
    if image.resize != "none":
        measured = max(source) if image.resize == "border" else min(source)
        if measured > image.size:
            scaled = out = _times(width, image.size, measured), _times(height, image.size, measured)
    if image.resize == "center_crop":
        out = (min(scaled), min(scaled))
    elif image.resize == "border":
        out = (image.size, image.size)
    if max(out) > LARGEST_SIDE:
        raise Unreadable("unsupported", f"{out[0]} x {out[1]} is more than a JPEG can hold")
    return _Layout(source, scaled, out)


def _times(length: int, numerator: int, denominator: int) -> int:
    """Return length × numerator / denominator, rounded to whole pixels, at least one."""
    return max(1, (2 * length * numerator + denominator) // (2 * denominator))


def _fit(pixels: np.ndarray, layout: _Layout, orientation: int) -> np.ndarray:
    """Scale pixels from file order and turn them upright; crop first if nothing has to be turned.

    Averaging pixels that are then cropped away would take a third of the time. The crop is made on whole pixels of
    `pixels`, so it may be off by less than one of them.
    """
    if orientation != 1 or layout.source == layout.scaled or min(layout.offset) < 0:
        return _turn(shrink(pixels, _swap(layout.scaled, orientation)), orientation)
    size = pixels.shape[1], pixels.shape[0]
    width, height = (_times(have, *parts) for have, *parts in zip(size, layout.out, layout.scaled, strict=True))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return shrink(pixels[top : top + height, left : left + width], layout.out)


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn pixels from file order to display order (EXIF 2.3, tag 0x0112)."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _swap(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Convert (width, height) between display order and file order."""
    return (size[1], size[0]) if orientation >= 5 else size


# JPEG ----------------------------------------------------------------------------------------------------------------


def layout_of(header: jpeg.Header, image: config.Image) -> _Layout:
    """Return the layout of a JPEG, as it is shown. Raises Unreadable if its size is not allowed."""
    return _plan(*_swap((header.width, header.height), jpeg.orientation(header.exif)), image)


def is_stored_as_it_is(header: jpeg.Header, layout: _Layout) -> bool:
    """Return whether a JPEG is stored as it is but for its metadata, if it is whole."""
    return (
        layout.changes_nothing
        and jpeg.orientation(header.exif) == 1
        and header.components == 3
        and header.process in jpeg.HUFFMAN
        and is_srgb(header.icc)
    )


def _decode_jpeg(data: bytes, image: config.Image) -> StoredImage:
    header = jpeg.read_header(data)
    orientation = jpeg.orientation(header.exif)
    layout = layout_of(header, image)
    colours = {1: "GRAY", 3: "RGB", 4: "CMYK"}[header.components]
    if header.components == 1 and not header.icc:
        colours = "RGB"
    as_it_is = is_stored_as_it_is(header, layout)
    size = _swap(layout.scaled, orientation)
    needed = (min(size[0], _HASHED_SIDE), min(size[1], _HASHED_SIDE)) if as_it_is else size
    try:
        pixels, sound = decode_strictly(data, header, colours, needed)
    except RareSubsamplingError:
        return _decode_other("jpeg", data, image)
    if as_it_is:
        return _image(jpeg.strip(sound), pixels, data, layout)
    shown = _fit(pixels, layout, orientation)
    return _encode(_jpeg_rgb(shown, colours, header.icc), data, layout, image)


def _jpeg_rgb(pixels: np.ndarray, colours: str, icc: bytes) -> np.ndarray:
    """Convert libjpeg's pixels to sRGB, uint8 [H, W, 3]."""
    height, width = pixels.shape[:2]
    if colours == "RGB":
        return pixels if is_srgb(icc) else np.asarray(to_srgb(Image.fromarray(pixels), icc))
    if colours == "GRAY":
        return np.asarray(to_srgb(Image.frombytes("L", (width, height), pixels.tobytes()), icc))
    ink = 255 - pixels  # JPEGs hold CMYK inverted, as Adobe introduced it and all viewers assume
    return np.asarray(to_srgb(Image.frombytes("CMYK", (width, height), ink.tobytes()), icc))


# All other formats ---------------------------------------------------------------------------------------------------


def _decode_other(kind: str, data: bytes, image: config.Image) -> StoredImage:
    """Decode with Pillow at full size, flatten to RGB, then scale."""
    sniff.check_whole(kind, data)
    check_header(kind, data, image.max_pixels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's warnings about unusual files; those that matter become a reason
            shown, layout, orientation = _shown(kind, data, image)
    except (OSError, SyntaxError, ValueError, EOFError, KeyError, TypeError, struct.error) as error:
        raise _explain(kind, data, error) from None
    return _encode(_fit(shown, layout, orientation), data, layout, image)


def _shown(kind: str, data: bytes, image: config.Image) -> tuple[np.ndarray, _Layout, int]:
    """Return the first frame in sRGB at full size, its layout, and the EXIF orientation still to be applied."""
    whole = png.closed(data) if kind == "png" else data
    mended, data = whole is not data, whole
    source, profile = png.bare(data) if kind == "png" else (data, b"")
    if kind == "webp":
        source = sniff.padded_webp(data)
    with _PLUGINS[kind](io.BytesIO(source)) as frame:
        frame.info |= {"icc_profile": profile} if profile else {}
        # Pillow turns a TIFF upright itself, and reports its size after that.
        orientation = 1 if kind == "tiff" else jpeg.orientation(_exif(frame))
        layout = _plan(*_swap(frame.size, orientation), image)
        if isinstance(frame, TiffImagePlugin.TiffImageFile):
            check_tiff(frame, data, image.max_pixels)
        if kind == "png":
            png.check_size(data)
        patch = frame.tile[0].extents if kind == "gif" and frame.tile else None
        still = kind == "webp" and not sniff.webp_is_animated(data)
        cut = still_webp(source) if still else loaded(frame)
        if kind == "png" and (mended or _is_blank(frame, png.last_row(data))):
            png.check_pixels(data)
        shown = flatten(frame, cut, bits=data[24] if kind == "png" else 8)
    if patch is not None:  # a GIF's first frame may be on a larger, transparent canvas
        left, top, right, bottom = patch
        shown[:top], shown[bottom:], shown[:, :left], shown[:, right:] = 255, 255, 255, 255
    return shown, layout, orientation


def _is_blank(frame: Image.Image, row: int) -> bool:
    """Return whether `row` holds only zeros, as it does if its data are missing; the file may then be truncated."""
    return not np.asarray(frame.crop((0, row, frame.width, row + 1))).any()


def _exif(frame: Image.Image) -> bytes:
    """Return the image's EXIF as a TIFF structure, whether or not the file has the Exif header before it."""
    exif = frame.info.get("exif", b"")
    return bytes(exif).removeprefix(b"Exif\0\0") if isinstance(exif, bytes) else b""


def _explain(kind: str, data: bytes, error: Exception) -> Unreadable:
    """Turn an error of Pillow's into a failure reason."""
    cut = "truncat" in str(error).lower()
    if kind == "bmp":
        cut = cut or int.from_bytes(data[2:6], "little") > len(data)
    elif kind == "tiff":  # the directory is often at the end, so a truncated file loses it
        where = data[8:16] if b"+" in data[2:4] else data[4:8]  # BigTIFF, TIFF
        cut = cut or int.from_bytes(where, "little" if data[:2] == b"II" else "big") + 2 > len(data)
    elif kind == "jpeg":
        cut = cut or not jpeg.has_end(data)
    detail = f"{type(error).__name__}: {error}"
    if not cut and re.search("nsupported|unknown (pixel|data|raw)", str(error)):
        return Unreadable("unsupported", detail)
    return Unreadable("truncated" if cut else "corrupt", detail)


# Out -----------------------------------------------------------------------------------------------------------------


def _encode(pixels: np.ndarray, data: bytes, layout: _Layout, image: config.Image) -> StoredImage:
    """Crop or pad the scaled, upright pixels to the layout unless that is done, and encode them as JPEG."""
    (left, top), (width, height) = layout.offset, layout.out
    if (pixels.shape[1], pixels.shape[0]) != layout.out:
        if left < 0 or top < 0:
            canvas = np.full((height, width, 3), 255, np.uint8)
            canvas[-top : -top + pixels.shape[0], -left : -left + pixels.shape[1]] = pixels
            pixels = canvas
        else:
            pixels = pixels[top : top + height, left : left + width]
    pixels = np.ascontiguousarray(pixels)
    encoded = simplejpeg.encode_jpeg(pixels, image.quality, "RGB", "420")
    return _image(encoded, pixels, data, layout)


def _image(encoded: bytes, pixels: np.ndarray, data: bytes, layout: _Layout) -> StoredImage:
    digest, (phash, colours) = hashlib.sha256(data).hexdigest(), fingerprints(pixels)
    return StoredImage(encoded, *layout.out, *layout.source, phash, digest, *layout.offset, colours)
