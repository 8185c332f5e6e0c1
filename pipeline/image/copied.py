"""One source file's bytes → the image to store, copied where nothing has to be decoded (`image.check: header`)

A JPEG that is stored as it is but for its metadata is walked segment by segment up to its end marker. Its
entropy-coded data is not decoded, so damage within it is not seen, and hashes of pixels stay empty. All other files are
decoded: other formats, EXIF orientations, ICC profiles, grey, CMYK, rare subsampling, and faults in the structure.
"""

from __future__ import annotations

import hashlib

from capstan.pipeline import config
from capstan.pipeline.image import jpeg
from capstan.pipeline.image.decode import Failure, StoredImage, decode, is_stored_as_it_is, layout_of
from capstan.pipeline.image.jpeg_pixels import is_rare
from capstan.pipeline.image.opt_out import opt_out


def copy_or_decode(data: bytes, image: config.Image, *, noai: bool = False) -> StoredImage | Failure:
    """Return what `decode` returns, without decoding if the bytes can be copied.

    `phash` is then 0 and `colours` "": they need pixels.
    """
    return _copied(data, image, noai) or decode(data, image, noai=noai)


def _copied(data: bytes, image: config.Image, noai: bool) -> StoredImage | None:
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    try:
        header = jpeg.read_header(data)
        layout = layout_of(header, image)
        if not is_stored_as_it_is(header, layout) or is_rare(header):
            return None
        jpeg.check_scans(data, header)
        bare = data if jpeg.is_bare(data) else jpeg.strip(data)
        if noai and opt_out("jpeg", data):
            return None
    except MemoryError:
        raise  # the machine's fault, not the image's
    except Exception:  # noqa: BLE001 - the image boundary, as in `decode`, which finds the reason or that it is harmless
        return None
    sha256 = hashlib.sha256(data).hexdigest()
    return StoredImage(bare, *layout.out, *layout.source, phash=0, sha256=sha256)


def is_copy(data: bytes, width: int, height: int) -> bool:
    """Return whether `data` is a JPEG of this size that is stored byte for byte, as its structure says."""
    try:
        header = jpeg.read_header(data)
        if (header.width, header.height) != (width, height) or header.components != 3 or header.icc:
            return False
        if header.exif or header.process not in jpeg.HUFFMAN or is_rare(header):
            return False
        jpeg.check_scans(data, header)
        return jpeg.is_bare(data)
    except MemoryError:
        raise  # the machine's fault, not the image's
    except Exception:  # noqa: BLE001 - the image boundary: its row is read again, which finds the reason
        return False
