"""Copy descriptors: an image → a vector that edits of the image hardly change (`dedup.copies`).

The network is an ONNX file that the user names, e.g. SSCD (Pizzi et al. 2022, "A Self-Supervised Descriptor for Image
Copy Detection"), or open_nsfw's features, which come in a package.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from capstan.pipeline.config import CopyDetection
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.score import open_nsfw
from capstan.pipeline.score.onnx_model import Floats, OnnxModel
from capstan.pipeline.score.scorer import Sample, SampleScorer, Values

EXTRA: Final = "copies"
OPEN_NSFW: Final = "open_nsfw"  # a model by name
_LEAST_DIM: Final = 8  # fewer numbers are classes, not a descriptor
_SIZE: Final = 320  # pixels: SSCD's, where the network takes any
_ZERO: Final = 1e-12


class Descriptor:
    """The network and how images are prepared for it. `field` is the recipe's section, for errors."""

    def __init__(self, config: CopyDetection, field: str = "dedup.copies") -> None:
        self.field, self.config = field, config
        own = field if field.startswith("--") else f"{field}.model"
        if config.model == OPEN_NSFW:
            self.model = open_nsfw.features(own)
        else:
            self.model = OnnxModel(Path(config.model).absolute(), own, EXTRA)

    @property
    def settings(self) -> dict[str, Any]:
        """How images are prepared."""
        if self.config.model == OPEN_NSFW:
            return {"network": OPEN_NSFW}
        return self.config.model_dump(include={"mean", "std"}) | {"size": self.size}

    @functools.cached_property
    def size(self) -> int:
        """Width and height of prepared images. Raises RecipeError if the network takes others."""
        if self.config.model == OPEN_NSFW:
            return open_nsfw.SIDE
        height, width = self.model.layout()[1:]
        if height != width:
            problem = f"{self.model.file} takes images of {height}×{width}"
            raise RecipeError(self.model.field, problem, "export the network for square images")
        if self.config.size is not None and height not in (None, self.config.size):
            problem = f"is {self.config.size}, and {self.model.file} takes images of {height}×{width}"
            raise RecipeError(f"{self.field}.size", problem, f"set size: {height}")
        return self.config.size or height or _SIZE

    @functools.cached_property
    def dim(self) -> int:
        """Length of the vectors. Raises RecipeError if the network does not return one for a test image."""
        size = self.size
        try:
            vector = self(np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8))
        except ValueError as error:
            problem = f"{self.model.file} returned no descriptor of a test image ({error})"
            raise RecipeError(self.model.field, problem, "use a network of images → one vector, e.g. SSCD") from None
        return len(vector)

    def __call__(self, rgb: npt.NDArray[np.uint8]) -> Floats:
        """Return the descriptor of an image uint8 [height, width, 3]: float32 [dim], of length 1.

        Raises ValueError if the network returns none.
        """
        vector = self.model.run(open_nsfw.prepared(rgb) if self.config.model == OPEN_NSFW else self._prepared(rgb))
        if len(vector) < _LEAST_DIM:
            raise ValueError(f"{len(vector)} numbers are not a descriptor")
        length = float(np.linalg.norm(vector.astype(np.float64)))
        if not np.isfinite(length):
            raise ValueError("the descriptor is not finite")
        if length < _ZERO:
            raise ValueError("the descriptor is zero")
        return np.asarray(vector / np.float32(length), np.float32)

    def _prepared(self, rgb: npt.NDArray[np.uint8]) -> Floats:
        """Return float32 [1, 3, size, size] or [1, size, size, 3], as the network wants it."""
        size = self.size
        shrinks = min(rgb.shape[:2]) >= size
        square = cv2.resize(rgb, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
        mean, std = (np.array(values, np.float32) for values in (self.config.mean, self.config.std))
        pixels = (square.astype(np.float32) / np.float32(255) - mean) / std
        return np.ascontiguousarray(pixels.transpose(2, 0, 1) if self.model.layout()[0] else pixels)[None]


class CopyDescriptors(SampleScorer):
    """The images' descriptors, of length 1. They stay in files of their own: no condition refers to them."""

    name: ClassVar[str] = "descriptors"
    in_ledger: ClassVar[bool] = False
    sees_images: ClassVar[bool] = True

    def __init__(self, config: CopyDetection) -> None:
        self.descriptor = Descriptor(config)
        kind = pa.list_(pa.float16(), self.descriptor.dim)
        self.columns: list[pa.Field] = [pa.field("descriptor", kind)]  # type: ignore[misc]

    def settings(self) -> dict[str, Any]:
        return self.descriptor.settings

    def weights(self) -> dict[str, Path]:
        return {self.descriptor.model.field: self.descriptor.model.file}

    def score(self, samples: Sequence[Sample]) -> dict[str, Values]:
        vectors = [self.descriptor(sample.rgb) for sample in samples if sample.rgb is not None]
        return {"descriptor": [vector.astype(np.float16) for vector in vectors]}
