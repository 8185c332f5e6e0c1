"""Damaged JPEGs: how far off their pixels are, and which of them Capstan keeps.

    python benchmarks/jpeg_damage.py [--copies 2800]

Photographs that come with scikit-image and scikit-learn are encoded in seven ways. Each copy is damaged at random in
one of eight ways, or given one of six faults that change no pixel. A copy's error is the mean difference from the
undamaged file's pixels, in levels of 256, as a lenient decoder (Pillow, which ignores libjpeg's warnings) shows it.
"warned": a strict decoder (libjpeg-turbo by simplejpeg) refuses the copy as it is. "whole": its error is 0.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg
from photos import originals
from PIL import Image, ImageFile

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from capstan.pipeline import config  # noqa: E402
from capstan.pipeline.image import jpeg  # noqa: E402
from capstan.pipeline.image.decode import StoredImage, decode  # noqa: E402

SETTINGS = config.Image(min_size=8, size=4096)
LARGE_ERROR = 2.0  # levels
FORMS: dict[str, dict[str, object]] = {
    "baseline": {"quality": 90},
    "baseline, optimised": {"quality": 75, "optimize": True},
    "baseline, 4:4:4": {"quality": 95, "subsampling": 0},
    "baseline, restarts": {"quality": 85, "restart_marker_rows": 1},
    "progressive": {"quality": 90, "progressive": True},
    "progressive, 4:4:4": {"quality": 95, "progressive": True, "subsampling": 0},
    "progressive, restarts": {"quality": 80, "progressive": True, "restart_marker_rows": 2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copies", type=int, default=2800)
    parser.add_argument("--side", type=int, default=256, help="longer side of the images, pixels")
    arguments = parser.parse_args()
    images = _photographs(arguments.side)
    files = [(form, _encoded(image, **how)) for image in images for form, how in FORMS.items()]
    rng = np.random.default_rng(0)
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    worst: dict[str, float] = defaultdict(float)
    for number in range(arguments.copies):
        form, data = files[number % len(files)]
        kind = list(DAMAGE)[int(rng.integers(len(DAMAGE)))]
        damaged = DAMAGE[kind](data, rng)
        for name in (kind, "baseline, any" if "baseline" in form else "progressive, any"):
            row = counts[name]
            row["copies"] += 1
            error, warned = _error(data, damaged), _warned(damaged)
            kept = isinstance(decode(damaged, SETTINGS), StoredImage)
            row["warned"] += warned
            row["kept"] += kept
            row["kept, warned, error > 2"] += kept and warned and error > LARGE_ERROR
            row["kept, silent, error > 2"] += kept and not warned and error > LARGE_ERROR
            row["whole"] += error == 0
            row["whole, refused"] += error == 0 and not kept
            worst[name] = max(worst[name], error if kept and warned else 0)
    columns = [
        "copies",
        "warned",
        "whole",
        "whole, refused",
        "kept",
        "kept, warned, error > 2",
        "kept, silent, error > 2",
    ]
    print(f"| damage | {' | '.join(columns)} | largest error, kept and warned |")
    print("|---|" + "---:|" * (len(columns) + 1))
    for name in [*DAMAGE, "baseline, any", "progressive, any"]:
        print(f"| {name} | {' | '.join(str(counts[name][column]) for column in columns)} | {worst[name]:.2f} |")


def _photographs(side: int) -> list[Image.Image]:
    images = [Image.fromarray(pixels[:, :, ::-1]) for pixels in originals()]
    for image in images:
        image.thumbnail((side, side))
    return images


def _encoded(image: Image.Image, **how: object) -> bytes:
    out = io.BytesIO()
    image.save(out, "jpeg", **how)
    return out.getvalue()


def _error(data: bytes, damaged: bytes) -> float:
    """Return the mean difference in levels; infinity if the damaged copy cannot be decoded, or has another size."""
    expected, shown = _lenient(data), _lenient(damaged)
    if expected is None or shown is None or shown.shape != expected.shape:
        return float("inf")
    return float(np.abs(shown - expected).mean())


def _lenient(data: bytes) -> np.ndarray | None:
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB")).astype(int)
    except (OSError, SyntaxError, ValueError):
        return None
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False  # Capstan's own decoding must not see it


def _warned(data: bytes) -> bool:
    try:
        simplejpeg.decode_jpeg(data)
    except ValueError:
        return True
    return False


# Damage --------------------------------------------------------------------------------------------------------------


def _first_scan(data: bytes) -> int:
    return data.index(b"\xff\xda")


def _place(data: bytes, rng: np.random.Generator) -> int:
    """Return a random offset in the scans."""
    return int(rng.integers(_first_scan(data) + 16, len(data) - 2))


def _flipped(data: bytes, rng: np.random.Generator) -> bytes:
    at, changed = _place(data, rng), bytearray(data)
    changed[at] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _header_flipped(data: bytes, rng: np.random.Generator) -> bytes:
    at, changed = int(rng.integers(2, _first_scan(data))), bytearray(data)
    changed[at] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _overwritten(data: bytes, rng: np.random.Generator) -> bytes:
    at, size = _place(data, rng), int(rng.integers(4, 600))
    size = min(size, len(data) - at)
    filler = bytes(size) if rng.integers(2) else rng.integers(0, 256, size).astype(np.uint8).tobytes()
    return data[:at] + filler + data[at + size :]


def _inserted(data: bytes, rng: np.random.Generator) -> bytes:
    at = _place(data, rng)
    return data[:at] + rng.integers(0, 255, int(rng.integers(1, 60))).astype(np.uint8).tobytes() + data[at:]


def _removed(data: bytes, rng: np.random.Generator) -> bytes:
    at = _place(data, rng)
    return data[:at] + data[at + int(rng.integers(1, 600)) :]


def _cut(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: _place(data, rng)] + (b"\xff\xd9" if rng.integers(2) else b"")


def _pieces(data: bytes) -> tuple[list[bytes], list[int]]:
    """Return the file's segments, each scan with its header, and which of them are scans."""
    pieces, scans = [], []
    for segment in jpeg.segments(data):
        if segment.marker == 0xDA:
            scans.append(len(pieces))
        size = (len(segment.payload) + 2).to_bytes(2, "big")
        pieces.append(bytes((0xFF, segment.marker)) + size + segment.payload + segment.scan)
    return pieces, scans


def _without_scan(data: bytes, rng: np.random.Generator) -> bytes:
    pieces, scans = _pieces(data)
    del pieces[scans[int(rng.integers(len(scans)))]]
    return b"\xff\xd8" + b"".join(pieces) + b"\xff\xd9"


def _scans_swapped(data: bytes, rng: np.random.Generator) -> bytes:
    pieces, scans = _pieces(data)
    a, b = (scans[int(n)] for n in rng.integers(len(scans), size=2))
    pieces[a], pieces[b] = pieces[b], pieces[a]
    return b"\xff\xd8" + b"".join(pieces) + b"\xff\xd9"


# Faults that change no pixel -----------------------------------------------------------------------------------------


def _stray_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """Insert a line break, or a phone's private segment without its marker, between two segments."""
    pieces, scans = _pieces(data)
    at = int(rng.integers(1, scans[0] + 1))
    stray = b"\r\n" if rng.integers(2) else b"\0\xe1\0\x20" + bytes(rng.integers(32, 127, 30).astype(np.uint8))
    return b"\xff\xd8" + b"".join(pieces[:at]) + stray + b"".join(pieces[at:]) + b"\xff\xd9"


def _padded(data: bytes, rng: np.random.Generator) -> bytes:
    """Pad with zeros before EOI, as drones do."""
    return data[:-2] + bytes(int(rng.integers(1, 4000))) + data[-2:]


def _no_end(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: len(data) - int(rng.integers(1, 3))]


def _after_end(data: bytes, rng: np.random.Generator) -> bytes:
    return data + rng.integers(0, 256, int(rng.integers(1, 5000))).astype(np.uint8).tobytes()


def _odd_version(data: bytes, rng: np.random.Generator) -> bytes:
    return data.replace(b"JFIF\0\1", b"JFIF\0" + bytes([int(rng.integers(2, 200))]), 1)


def _odd_spectrum(data: bytes, rng: np.random.Generator) -> bytes:
    """Write zeros for a sequential scan's spectral range, which every decoder ignores."""
    if data[data.index(b"\xff\xc0" if b"\xff\xc0" in data else b"\xff\xc2") + 1] == 0xC2:
        return data
    at = data.index(b"\xff\xda") + 2
    end = at + int.from_bytes(data[at : at + 2], "big")
    return data[: end - 3] + bytes(3) + data[end:]


DAMAGE: dict[str, Callable[[bytes, np.random.Generator], bytes]] = {
    "a bit flipped": _flipped,
    "a bit of the header flipped": _header_flipped,
    "bytes overwritten": _overwritten,
    "bytes inserted": _inserted,
    "bytes removed": _removed,
    "cut": _cut,
    "a scan lost": _without_scan,
    "scans swapped": _scans_swapped,
    "stray bytes between segments": _stray_bytes,
    "zeros before EOI": _padded,
    "no EOI": _no_end,
    "bytes after EOI": _after_end,
    "odd JFIF version": _odd_version,
    "odd spectral range": _odd_spectrum,
}

if __name__ == "__main__":
    main()
