"""One source file's bytes → the image to be stored, or the reason why there is none.

The pixel contract: what is stored is what a viewer would show. Orientation is applied, colours become sRGB,
transparency lies on white, of an animation the first frame is taken, nothing is ever enlarged, and a file that is cut
or damaged gives a reason instead of half an image. Limits are read from headers before anything is decoded.

JPEGs take a fast path (libjpeg-turbo, scaled decoding); one that already fits is stored without re-encoding. All else,
and odd JPEGs, go through Pillow.
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

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
from capstan.pipeline.image.icc import is_srgb, to_srgb
from capstan.pipeline.image.phash import colours, phash
from capstan.pipeline.image.resize import shrink
from capstan.pipeline.image.sniff import Unreadable

_LARGEST_SIDE: Final = 65_500  # pixels; what JPEG can hold (libjpeg's JPEG_MAX_DIMENSION)
_HASHED_SIDE: Final = 64  # an image stored as it is need not be decoded larger than this for its phash
# libjpeg warnings about files that every viewer shows whole; Pillow reads them. Anything else means damage.
_HARMLESS: Final = re.compile(
    r"subsampling level|Invalid SOS parameters|JFIF revision|Adobe color transform"
    r"|extraneous bytes before marker 0x(?!d)"  # in a scan (before RSTn or EOI) they are lost pixels
)
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
    """What is stored. Sizes are in pixels; `original_*` is the source as a viewer shows it.

    `crop_left` and `crop_top` say how many pixels of the scaled image were cut off there (negative: padded).
    `sha256` is of the source bytes.
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
    """Why there is no image: `reason` is one of `records.REASONS`, `detail` is for people."""

    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class _Layout:
    """From the source (w, h; upright) to what is stored: scale to `scaled`, crop or pad about the centre to `out`."""

    source: tuple[int, int]
    scaled: tuple[int, int]
    out: tuple[int, int]

    @property
    def offset(self) -> tuple[int, int]:
        """Left and top of `out` in `scaled`; negative where it is padded."""
        return (self.scaled[0] - self.out[0]) // 2, (self.scaled[1] - self.out[1]) // 2

    @property
    def changes_nothing(self) -> bool:
        return self.source == self.scaled == self.out


def decode(data: bytes, image: config.Image) -> StoredImage | Failure:
    """The image in `data` as `image` wants it stored: an 8-bit sRGB JPEG without metadata.

    Bad bytes give a Failure, never an exception. The same bytes and settings give the same image.
    """
    _one_thread()
    try:
        kind = sniff.sniff(data)
        return _decode_jpeg(data, image) if kind == "jpeg" else _decode_other(kind, data, image)
    except Unreadable as why:
        return Failure(why.reason, why.detail)
    except MemoryError:
        raise  # the machine's trouble, not the image's: its size was checked
    except Exception as error:  # noqa: BLE001 - codecs raise anything; one bad file must not end the unit
        return Failure("corrupt", f"{type(error).__name__}: {error}")


def check_hash(data: bytes, expected: str) -> Failure | None:
    """A Failure unless `data` has the hash its source states: hexadecimal md5, sha1, sha256 or sha512, by length."""
    name = {32: "md5", 40: "sha1", 64: "sha256", 128: "sha512"}.get(len(expected))
    if name is None:
        return Failure("corrupt", f"{expected!r} is no md5, sha1, sha256 or sha512")
    found = hashlib.new(name, data, usedforsecurity=False).hexdigest()
    return None if found == expected.lower() else Failure("corrupt", f"{name} is {found}, the source says {expected}")


@cache
def _one_thread() -> None:
    """Workers are processes, one a core: OpenCV's own threads would only fight over them."""
    cv2.setNumThreads(1)


# Sizes ---------------------------------------------------------------------------------------------------------------


def _plan(width: int, height: int, image: config.Image) -> _Layout:
    """Check the limits for a source of this size (as shown) and lay out what is stored. Nothing is ever enlarged."""
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
    if max(out) > _LARGEST_SIDE:
        raise Unreadable("unsupported", f"{out[0]} x {out[1]} is more than a JPEG can hold")
    return _Layout(source, scaled, out)


def _times(length: int, numerator: int, denominator: int) -> int:
    """length × numerator / denominator, rounded to whole pixels, at least one."""
    return max(1, (2 * length * numerator + denominator) // (2 * denominator))


def _fit(pixels: np.ndarray, layout: _Layout, orientation: int) -> np.ndarray:
    """Pixels as stored → scaled, upright; cut to what is stored already where nothing must be turned.

    To average what is then cut off would take a third of the time. The cut is made on whole pixels of `pixels`, so it
    may be off by less than one of them.
    """
    if orientation != 1 or layout.source == layout.scaled or min(layout.offset) < 0:
        return _turn(shrink(pixels, _swap(layout.scaled, orientation)), orientation)
    size = pixels.shape[1], pixels.shape[0]
    width, height = (_times(have, *parts) for have, *parts in zip(size, layout.out, layout.scaled, strict=True))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return shrink(pixels[top : top + height, left : left + width], layout.out)


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels as stored → as shown (EXIF 2.3, tag 0x0112)."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _swap(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Width and height as shown ↔ as stored."""
    return (size[1], size[0]) if orientation >= 5 else size


# JPEG ----------------------------------------------------------------------------------------------------------------


def _decode_jpeg(data: bytes, image: config.Image) -> StoredImage:
    header = jpeg.read_header(data)
    orientation = jpeg.orientation(header.exif)
    layout = _plan(*_swap((header.width, header.height), orientation), image)
    colours = {1: "GRAY", 3: "RGB", 4: "CMYK"}[header.components]
    if header.components == 1 and not header.icc:
        colours = "RGB"
    as_it_is = (
        layout.changes_nothing
        and orientation == 1
        and header.components == 3
        and header.process in jpeg.HUFFMAN
        and is_srgb(header.icc)
    )
    size = _swap(layout.scaled, orientation)
    needed = (min(size[0], _HASHED_SIDE), min(size[1], _HASHED_SIDE)) if as_it_is else size
    try:
        pixels = simplejpeg.decode_jpeg(
            data, colours, min_width=needed[0], min_height=needed[1], min_factor=_least_factor(header, needed)
        )
    except ValueError as error:
        if _HARMLESS.search(str(error)):
            return _decode_other("jpeg", data, image)
        cut = "premature end" in str(error).lower() or not jpeg.has_end(data)
        raise Unreadable("truncated" if cut else "corrupt", str(error)) from None
    if as_it_is:
        return _image(jpeg.strip(data), pixels, data, layout)
    shown = _fit(pixels, layout, orientation)
    return _encode(_jpeg_rgb(shown, colours, header.icc), data, layout, image)


def _least_factor(header: jpeg.Header, needed: tuple[int, int]) -> int:
    """By how much libjpeg shall shrink at least: 2, or 1 where 5/8 will do. At 6/8 and 7/8, for which it has no
    vector code, decoding takes longer than is won by having fewer pixels to average."""
    width, height = needed
    return 1 if 8 * width <= 5 * header.width and 8 * height <= 5 * header.height else 2


def _jpeg_rgb(pixels: np.ndarray, colours: str, icc: bytes) -> np.ndarray:
    """libjpeg's pixels → sRGB uint8 [H, W, 3]."""
    height, width = pixels.shape[:2]
    if colours == "RGB":
        return pixels if is_srgb(icc) else np.asarray(to_srgb(Image.fromarray(pixels), icc))
    if colours == "GRAY":
        return np.asarray(to_srgb(Image.frombytes("L", (width, height), pixels.tobytes()), icc))
    ink = 255 - pixels  # JPEGs hold CMYK inverted, as Adobe began it and all viewers assume
    return np.asarray(to_srgb(Image.frombytes("CMYK", (width, height), ink.tobytes()), icc))


# All other formats ---------------------------------------------------------------------------------------------------


def _decode_other(kind: str, data: bytes, image: config.Image) -> StoredImage:
    """Decode with Pillow at full size, flatten to RGB, then scale."""
    sniff.check_whole(kind, data)
    if kind == "webp":
        _plan(*sniff.webp_size(data), image)  # its decoder allocates the canvas on opening
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks about odd files; what matters becomes a reason
            shown, layout, orientation = _shown(kind, data, image)
    except (OSError, SyntaxError, ValueError, EOFError, KeyError, TypeError, struct.error) as error:
        raise _explain(kind, data, error) from None
    return _encode(_fit(np.asarray(shown), layout, orientation), data, layout, image)


def _shown(kind: str, data: bytes, image: config.Image) -> tuple[Image.Image, _Layout, int]:
    """The first frame in sRGB at full size, how to lay it out, and how it must still be turned (EXIF orientation)."""
    source, profile = png.bare(data) if kind == "png" else (data, b"")
    with _PLUGINS[kind](io.BytesIO(source)) as picture:
        picture.info |= {"icc_profile": profile} if profile else {}
        # Pillow turns a TIFF upright itself, and says its size as it will then be.
        orientation = 1 if kind == "tiff" else jpeg.orientation(_exif(picture))
        layout = _plan(*_swap(picture.size, orientation), image)
        if isinstance(picture, TiffImagePlugin.TiffImageFile):
            _check_tiff(picture, data)
        patch = picture.tile[0].extents if kind == "gif" and picture.tile else None
        picture.load()
        if kind == "png" and _is_blank(picture, png.last_row(data)):
            png.check_pixels(data)
        shown = _flatten(picture, kind, data)
    if patch is not None and patch != (0, 0, *shown.size):  # a GIF's first frame on a larger, transparent canvas
        canvas = Image.new("RGB", shown.size, "white")
        canvas.paste(shown.crop(patch), patch)
        shown = canvas
    return shown, layout, orientation


def _is_blank(picture: Image.Image, row: int) -> bool:
    """Whether Pillow has only zeros there, as where no data came; then the image may not be whole."""
    return not np.asarray(picture.crop((0, row, picture.width, row + 1))).any()


def _exif(picture: Image.Image) -> bytes:
    """The image's EXIF as a TIFF structure, with or without its header in the file."""
    exif = picture.info.get("exif", b"")
    return bytes(exif).removeprefix(b"Exif\0\0") if isinstance(exif, bytes) else b""


def _check_tiff(picture: TiffImagePlugin.TiffImageFile, data: bytes) -> None:
    """The strips or tiles must lie within the file, and the first page must be the image."""
    tags: Any = picture.tag_v2
    if int(tags.get(254, 0)) & 1:
        raise Unreadable("unsupported", "the first page is a thumbnail, as in camera raw files")
    for offsets, counts in ((273, 279), (324, 325)):
        ends = [at + size for at, size in zip(tags.get(offsets, ()), tags.get(counts, ()), strict=False)]
        if ends and max(ends) > len(data):
            raise Unreadable("truncated", f"{len(data)} of {max(ends)} bytes")


def _explain(kind: str, data: bytes, error: Exception) -> Unreadable:
    """Pillow's complaint as a reason."""
    cut = "truncat" in str(error).lower()
    if kind == "bmp":
        cut = cut or int.from_bytes(data[2:6], "little") > len(data)
    elif kind == "tiff":  # the directory often stands last, so it is what a cut file loses
        where = data[8:16] if b"+" in data[2:4] else data[4:8]  # BigTIFF, TIFF
        cut = cut or int.from_bytes(where, "little" if data[:2] == b"II" else "big") + 2 > len(data)
    elif kind == "jpeg":
        cut = cut or not jpeg.has_end(data)
    detail = f"{type(error).__name__}: {error}"
    if not cut and re.search("nsupported|unknown (pixel|data|raw)", str(error)):
        return Unreadable("unsupported", detail)
    return Unreadable("truncated" if cut else "corrupt", detail)


def _flatten(picture: Image.Image, kind: str, data: bytes) -> Image.Image:
    """Any of Pillow's modes → sRGB, mode RGB: 16 bits scaled to 8, palettes looked up, transparency laid on white."""
    profile = picture.info.get("icc_profile") or b""
    if picture.mode.startswith("I;16"):
        colours, alpha = _from_16_bits(picture)
    elif picture.mode in ("I", "F", "LAB", "HSV", "YCbCr"):
        raise Unreadable("unsupported", f"pixels of mode {picture.mode}")
    else:
        colours, alpha = _colours_and_alpha(picture, bits=data[24] if kind == "png" else 8)
    flat = to_srgb(colours, profile)
    if alpha is None:
        return flat
    canvas = Image.new("RGB", flat.size, "white")
    canvas.paste(flat, mask=alpha)
    return canvas


def _from_16_bits(picture: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Grey of 9 to 16 bits → mode L over the whole range of 8 bits, and its alpha if one grey is transparent."""
    levels = np.asarray(picture).astype(np.uint32)
    tags: Any = getattr(picture, "tag_v2", {})
    bits = tags.get(258, (16,))[0]
    grey = ((levels * 255 + (1 << bits - 1)) // ((1 << bits) - 1)).clip(0, 255).astype(np.uint8)
    if tags.get(262) == 0:  # WhiteIsZero, which Pillow leaves alone above 8 bits
        grey = 255 - grey
    key = picture.info.get("transparency")
    alpha = None if key is None else Image.fromarray(np.where(levels == key, 0, 255).astype(np.uint8))
    return Image.fromarray(grey), alpha


def _colours_and_alpha(picture: Image.Image, *, bits: int) -> tuple[Image.Image, Image.Image | None]:
    """8-bit modes → the colours in mode L, RGB or CMYK, ready for a profile, and the alpha channel if there is one.

    `bits` are those of a sample in the file: Pillow has made 8 of them, and left the transparent colour as it stands.
    """
    key = picture.info.get("transparency")
    if bits == 16 and isinstance(key, tuple):  # of each sample the upper 8 bits were kept
        picture.info["transparency"] = tuple(value >> 8 for value in key)
    elif bits in (2, 4) and picture.mode == "L" and isinstance(key, int):
        top = (1 << bits) - 1
        picture.info["transparency"] = (key & top) * 255 // top  # the other bits do not count (PNG, 11.3.1.1)
    if picture.mode in ("La", "RGBa"):  # premultiplied
        picture = picture.convert(picture.mode[:-1] + "A")
    alpha = picture.convert("RGBA").getchannel("A") if picture.has_transparency_data else None
    if picture.mode == "LA":
        return picture.getchannel("L"), alpha
    if picture.mode == "1":
        return picture.convert("L"), alpha
    return (picture if picture.mode in ("L", "RGB", "CMYK") else picture.convert("RGB")), alpha


# Out -----------------------------------------------------------------------------------------------------------------


def _encode(pixels: np.ndarray, data: bytes, layout: _Layout, image: config.Image) -> StoredImage:
    """Crop or pad the scaled, upright pixels as laid out, unless that is done, and write them as JPEG."""
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
    digest = hashlib.sha256(data).hexdigest()
    return StoredImage(encoded, *layout.out, *layout.source, phash(pixels), digest, *layout.offset, colours(pixels))
