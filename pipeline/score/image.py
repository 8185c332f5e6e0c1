"""Image measures without a model: sharpness, flatness, quality, entropy, border.

Luma is 0 … 255.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, ClassVar, Final

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from capstan.pipeline.config import ImageScore
from capstan.pipeline.score.scorer import Sample, SampleScorer, Values

_FLAT: Final = 2.0  # levels: an 8 × 8 block, or a line at the edge, that varies less is flat
_BLOCK: Final = 8
# The luma table of quality 50 (ITU-T T.81, table K.1), in Pillow's order.
_QUALITY_50: Final = np.fromstring(
    "16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62 "
    "18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99",
    sep=" ",
)


class ImageMeasures(SampleScorer):
    """Measures of the stored image's pixels and JPEG tables."""

    name: ClassVar[str] = "image"
    sees_images: ClassVar[bool] = True
    columns: ClassVar[list[pa.Field]] = [
        pa.field(
            "image_sharpness", pa.float32()
        ),  # variance of luma's Laplacian: below 100 looks blurred to most people
        pa.field("image_flatness", pa.float32()),  # share of 8 × 8 blocks that are empty: 1 is one flat colour
        pa.field("image_quality", pa.float32()),  # JPEG quality of the stored file by its tables, 1 … 100
        pa.field("image_entropy", pa.float32()),  # of luma, bits: 0 … 8
        pa.field("image_border", pa.float32()),  # share of the image covered by flat margins
    ]

    def __init__(self, config: ImageScore) -> None:
        del config  # nothing to set yet

    def score(self, samples: Sequence[Sample]) -> dict[str, Values]:
        rows = [self._one(sample) for sample in samples]
        return {field.name: list(values) for field, values in zip(self.columns, zip(*rows, strict=True), strict=True)}

    @staticmethod
    def _one(sample: Sample) -> tuple[Any, ...]:
        assert sample.rgb is not None
        assert sample.jpeg is not None
        luma = cv2.cvtColor(sample.rgb, cv2.COLOR_RGB2GRAY)
        return sharpness(luma), flatness(luma), quality(sample.jpeg), entropy(luma), border(luma)


def sharpness(luma: npt.NDArray[np.uint8]) -> float:
    """Return the Laplacian's variance (Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield microscopy")."""
    _, deviation = cv2.meanStdDev(cv2.Laplacian(luma, cv2.CV_16S))
    return float(deviation[0, 0] ** 2)


def flatness(luma: npt.NDArray[np.uint8]) -> float:
    """Return the share of whole 8 × 8 blocks whose standard deviation is below 2 levels; 0 or 1 for smaller images."""
    height, width = (side - side % _BLOCK for side in luma.shape)
    if not height or not width:
        return float(luma.std() < _FLAT)
    values = luma[:height, :width].astype(np.float32)
    size = (width // _BLOCK, height // _BLOCK)
    mean = cv2.resize(values, size, interpolation=cv2.INTER_AREA)  # of each block
    square = cv2.resize(values * values, size, interpolation=cv2.INTER_AREA)
    return float((square - mean * mean < _FLAT**2).mean())


def quality(jpeg: bytes) -> float:
    """Return the libjpeg quality, 1 … 100, whose luma table is nearest to the file's.

    For an image stored without re-encoding this is the source's quality, otherwise the recipe's.
    """
    with Image.open(io.BytesIO(jpeg)) as image:
        table = np.array(image.quantization[0], np.float64)  # type: ignore[attr-defined]
    scale = float(np.median(table / _QUALITY_50)) * 100
    return float(np.clip(100 - scale / 2 if scale <= 100 else 5000 / scale, 1, 100))


def entropy(luma: npt.NDArray[np.uint8]) -> float:
    """Return the Shannon entropy of the histogram, in bits."""
    share = np.bincount(luma.ravel(), minlength=256) / luma.size
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum()) + 0.0


def border(luma: npt.NDArray[np.uint8]) -> float:
    """Return the share of the image outside the smallest rectangle that holds all rows and columns that vary."""
    rows, columns = (_extent(luma.astype(np.float32).std(axis=axis)) for axis in (1, 0))
    return 1 - rows * columns / luma.size


def _extent(deviation: npt.NDArray[Any]) -> int:
    """Return the number of lines from the first to the last that varies."""
    (busy,) = np.nonzero(deviation >= _FLAT)
    return int(busy[-1] - busy[0] + 1) if len(busy) else 0
