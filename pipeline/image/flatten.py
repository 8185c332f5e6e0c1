"""Decoded frames of any mode → sRGB pixels, in little more memory than both take

Each step of the conversion makes a copy, and copies of a whole image would take three times its memory. So it is done
in strips.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import cv2
import numpy as np
from PIL import Image, ImageFile

from capstan.pipeline.image.icc import to_srgb
from capstan.pipeline.image.sniff import Unreadable

Cut = Callable[[int, int], Image.Image]  # cuts the rows [top, bottom) out of a decoded frame

_STRIP_PIXELS: Final = 1 << 20  # converted together


def loaded(frame: ImageFile.ImageFile) -> Cut:
    """Decode with Pillow."""
    frame.load()
    return lambda top, bottom: frame.crop((0, top, frame.width, bottom))


def still_webp(data: bytes) -> Cut:
    """Decode with OpenCV: Pillow's decoder also holds two canvases for frames that a still image does not have."""
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise ValueError("libwebp cannot decode it")
    order = (2, 1, 0, 3)[: pixels.shape[2]]  # BGR or BGRA
    return lambda top, bottom: Image.fromarray(pixels[top:bottom, :, order])


def flatten(frame: Image.Image, cut: Cut, *, bits: int) -> np.ndarray:
    """Convert any Pillow mode to sRGB, [H, W, 3]: 16 bits scaled to 8, palettes looked up, transparency laid on white.

    `bits` per sample are the file's. Raises Unreadable for modes that have no such meaning.
    """
    if frame.mode in ("I", "F", "LAB", "HSV", "YCbCr"):
        raise Unreadable("unsupported", f"pixels of mode {frame.mode}")
    profile, tags = frame.info.get("icc_profile") or b"", getattr(frame, "tag_v2", {})
    pixels = np.empty((frame.height, frame.width, 3), np.uint8)
    rows = max(1, _STRIP_PIXELS // frame.width)
    for top in range(0, frame.height, rows):
        strip = cut(top, min(top + rows, frame.height))
        pixels[top : top + rows] = np.asarray(_flat_strip(strip, profile, bits, tags))
    return pixels


def _flat_strip(strip: Image.Image, profile: bytes, bits: int, tags: Any) -> Image.Image:
    """Convert a part of an image; the profile, `bits` per sample and TIFF `tags` are of its file."""
    if strip.mode.startswith("I;16"):
        colours, alpha = _from_16_bits(strip, tags)
    else:
        colours, alpha = _colours_and_alpha(strip, bits=bits)
    flat = to_srgb(colours, profile)
    if alpha is None:
        return flat
    canvas = Image.new("RGB", flat.size, "white")
    canvas.paste(flat, mask=alpha)
    return canvas


def _from_16_bits(frame: Image.Image, tags: Any) -> tuple[Image.Image, Image.Image | None]:
    """Convert grey of 9 to 16 bits to mode L, full 8-bit range; also return alpha if one grey is transparent."""
    levels = np.asarray(frame).astype(np.uint32)
    bits = tags.get(258, (16,))[0]
    grey = ((levels * 255 + (1 << bits - 1)) // ((1 << bits) - 1)).clip(0, 255).astype(np.uint8)
    if tags.get(262) == 0:  # WhiteIsZero, which Pillow leaves alone above 8 bits
        grey = 255 - grey
    key = frame.info.get("transparency")
    alpha = None if key is None else Image.fromarray(np.where(levels == key, 0, 255).astype(np.uint8))
    return Image.fromarray(grey), alpha


def _colours_and_alpha(frame: Image.Image, *, bits: int) -> tuple[Image.Image, Image.Image | None]:
    """Return an 8-bit image's colours in mode L, RGB or CMYK, ready for a profile, and its alpha channel if any.

    `bits` is the number of bits per sample in the file: Pillow converts samples to 8 bits but not the transparent
    colour.
    """
    key = frame.info.get("transparency")
    if bits == 16 and isinstance(key, tuple):  # Pillow kept the upper 8 bits of each sample
        frame.info["transparency"] = tuple(value >> 8 for value in key)
    elif bits in (2, 4) and frame.mode == "L" and isinstance(key, int):
        top = (1 << bits) - 1
        frame.info["transparency"] = (key & top) * 255 // top  # the other bits are to be ignored (PNG, 11.3.1.1)
    if frame.mode in ("La", "RGBa"):  # premultiplied
        frame = frame.convert(frame.mode[:-1] + "A")
    alpha = frame.convert("RGBA").getchannel("A") if frame.has_transparency_data else None
    if frame.mode == "LA":
        return frame.getchannel("L"), alpha
    if frame.mode == "1":
        return frame.convert("L"), alpha
    return (frame if frame.mode in ("L", "RGB", "CMYK") else frame.convert("RGB")), alpha
