"""Text in the image, found and read by PP-OCR (package rapidocr, extra `ocr`).

Only lines that are read count: detection alone sees text in a third of plain photographs.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from capstan.pipeline import extras
from capstan.pipeline.config import TextInImage as Settings
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.score.scorer import Sample, SampleScorer, Values

_FIELD: Final = "score.text_in_image"
_EXTRA: Final = "ocr"
_DETECTION: Final = "PP-OCRv6_det_small.onnx"
_RECOGNITION: Final = "PP-OCRv6_rec_small.onnx"

_LONGEST: Final = 2000  # pixels; longer images are shrunk
_FLATTEST: Final = 4  # the detector enlarges the shorter side to 736, so flatter images are padded

Line = tuple[npt.NDArray[np.float32], str]  # corners [4, 2] in pixels, and the text


class TextInImage(SampleScorer):
    """The share of the image's area that lines of text cover, and their words."""

    name: ClassVar[str] = "text_in_image"
    sees_images: ClassVar[bool] = True
    columns: ClassVar[list[pa.Field]] = [
        pa.field("text_in_image_share", pa.float32()),  # 0 without text
        pa.field("text_in_image_words", pa.string()),  # lines from top to bottom, separated by spaces; "" without text
    ]

    def __init__(self, config: Settings) -> None:
        extras.require(_EXTRA, _FIELD)
        self._config = config
        package = importlib.util.find_spec("rapidocr")
        assert package is not None
        assert package.origin is not None
        self._files = [Path(package.origin).parent / "models" / name for name in (_DETECTION, _RECOGNITION)]
        for file in self._files:
            if not file.is_file():
                problem = f"the installed rapidocr has no {file.name}"
                raise RecipeError(_FIELD, problem, "pip install 'rapidocr>=3.10,<3.11'")

    def settings(self) -> dict[str, Any]:
        return {"confidence": self._config.confidence, "letters": self._config.letters}

    def weights(self) -> dict[str, Path]:
        return {f"{_FIELD}.{file.name}": file for file in self._files}

    def score(self, samples: Sequence[Sample]) -> dict[str, Values]:
        found = [self._one(sample.rgb) for sample in samples if sample.rgb is not None]
        return {
            "text_in_image_share": [share for share, _ in found],
            "text_in_image_words": [words for _, words in found],
        }

    def _one(self, rgb: npt.NDArray[np.uint8]) -> tuple[float, str]:
        lines = self._lines(rgb)
        covered = np.zeros(rgb.shape[:2], np.uint8)
        for corners, _ in lines:
            cv2.fillPoly(covered, [np.rint(corners).astype(np.int32)], 1)
        return float(covered.mean()), " ".join(" ".join(text.split()) for _, text in lines)

    def _lines(self, rgb: npt.NDArray[np.uint8]) -> list[Line]:
        """Return the lines that are read with enough confidence and have enough letters."""
        from rapidocr.ch_ppocr_rec import TextRecInput
        from rapidocr.utils.process_img import get_rotate_crop_image

        detector, recognizer = _load(*self._files)
        bgr, scale = _bounded(cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))
        boxes = detector(bgr).boxes
        if boxes is None or not len(boxes):
            return []
        read = recognizer(TextRecInput(img=[get_rotate_crop_image(bgr, box.astype(np.float32)) for box in boxes]))
        lines = zip(boxes, read.txts, read.scores, strict=True)
        return [
            (box / scale, text)
            for box, text, score in lines
            if score >= self._config.confidence and sum(map(str.isalpha, text)) >= self._config.letters
        ]


def _bounded(image: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], float]:
    """Shrink a large image and pad a flat one at its lower right, which bounds memory; return it and its scale."""
    height, width = image.shape[:2]
    scale = min(1.0, _LONGEST / max(height, width))
    if scale < 1:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    height, width = image.shape[:2]
    least = -(-max(height, width) // _FLATTEST)
    below, right = max(0, least - height), max(0, least - width)
    return cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_REPLICATE), scale


@functools.lru_cache(maxsize=1)
def _load(detection: Path, recognition: Path) -> tuple[Any, Any]:
    """Load both networks once per worker process: (detector, recognizer).

    They are called one after the other, since RapidOCR itself logs an error of its networks and returns no text.
    """
    from rapidocr import RapidOCR

    ocr = RapidOCR(
        params={
            "Global.log_level": "critical",
            "Global.use_cls": False,
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            "Det.model_path": str(detection),  # with a path, rapidocr downloads nothing
            "Rec.model_path": str(recognition),
        }
    )
    return ocr._load_det_model(), ocr._load_rec_model()
