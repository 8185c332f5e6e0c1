"""Decode a JPEG strictly: harmless faults are ignored, damage is refused.

libjpeg warns about faults that change no pixel and about damage in similar words. So a file with a warning is decoded
once more without the faults that are known to be harmless (jpeg.tidy). A warning that is left is about damage.
"""

from __future__ import annotations

import re
from typing import Final

import numpy as np
import simplejpeg

from capstan.pipeline.image import jpeg
from capstan.pipeline.image.sniff import Unreadable

# Sampling factors of the first component that TurboJPEG reads if the others have 1 × 1.
_COMMON: Final = frozenset({0x11, 0x21, 0x12, 0x22, 0x41, 0x14})
_LEFT_OVER: Final = re.compile(r"extraneous bytes before marker 0xd9")


class RareSubsamplingError(Exception):
    """TurboJPEG does not read this chroma subsampling; libjpeg's other interfaces do."""


def decode_strictly(
    data: bytes, header: jpeg.Header, colours: str, needed: tuple[int, int]
) -> tuple[np.ndarray, bytes]:
    """Return the pixels, uint8 [H, W, C] in libjpeg's `colours`, and the file that they were decoded from.

    That file is `data`, or `data` without its harmless faults. The size is `needed` (w, h) or larger. Raises Unreadable
    for a damaged file, RareSubsamplingError for a file that must be decoded otherwise.
    """
    jpeg.check_scans(data, header)
    try:
        return _strict(data, header, colours, needed), data
    except ValueError as error:
        warning = str(error)
    tidied = jpeg.tidy(data, header)
    try:
        return _strict(tidied, header, colours, needed), tidied
    except ValueError as error:
        left = str(error)
    if "subsampling level" in left and is_rare(header):  # TurboJPEG says so of any fault in the header, too
        raise RareSubsamplingError
    if _LEFT_OVER.search(left):
        for candidate in jpeg.without_padding(tidied):
            if _is_exact(candidate):
                return _strict(candidate, header, colours, needed), candidate
    cut = "premature end" in left.lower() or not jpeg.has_end(data)
    raise Unreadable("truncated" if cut else "corrupt", warning)


def is_rare(header: jpeg.Header) -> bool:
    """Return whether the chroma subsampling is legal (T.81, A.1.1 and B.2.3), but not one that TurboJPEG reads."""
    factors = [divmod(both, 16) for both in header.sampling]
    legal = all(1 <= h <= 4 and 1 <= v <= 4 for h, v in factors) and sum(h * v for h, v in factors) <= 10
    common = header.sampling[0] in _COMMON and set(header.sampling[1:]) <= {0x11}
    return legal and not common


def _strict(data: bytes, header: jpeg.Header, colours: str, needed: tuple[int, int]) -> np.ndarray:
    """Decode; raises ValueError for whatever libjpeg warns about."""
    return simplejpeg.decode_jpeg(
        data, colours, min_width=needed[0], min_height=needed[1], min_factor=_least_factor(header, needed)
    )


def _is_exact(data: bytes) -> bool:
    """Return whether the last scan ends with its last byte: all of it is needed, and nothing is missing.

    libjpeg does not notice up to seven bytes too many, which damaged data may leave over.
    """
    return _is_whole(data) and not _is_whole(data[:-3] + data[-2:])


def _is_whole(data: bytes) -> bool:
    try:
        simplejpeg.decode_jpeg(data, "GRAY", min_width=1, min_height=1)
    except ValueError:
        return False
    return True


def _least_factor(header: jpeg.Header, needed: tuple[int, int]) -> int:
    """Return the least factor by which libjpeg shrinks: 2, or 1 if 5/8 is enough.

    libjpeg has no vector code for 6/8 and 7/8: decoding then costs more than averaging fewer pixels saves.
    """
    width, height = needed
    return 1 if 8 * width <= 5 * header.width and 8 * height <= 5 * header.height else 2
