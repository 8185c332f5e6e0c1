"""Images and texts → embeddings by an open_clip CLIP, which judges captions

The judge should not be the model that wrote the captions. It is the model class that scoring uses too
(pipeline.score.clip_model); here it is chosen on the command line.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from capstan.pipeline.errors import RecipeError
from capstan.pipeline.score.clip_model import CONFIG_FILE, ClipModel

BATCH: Final = 64

Embeddings = npt.NDArray[np.float32]  # [images or texts, width], unit length


class Clip:
    """A CLIP: an open_clip name with a tag or checkpoint file, or a folder. Loaded on construction."""

    def __init__(self, model: str, pretrained: str | None = None) -> None:
        import torch

        folder = Path(model)
        if folder.is_dir() and not (folder / CONFIG_FILE).is_file():
            raise RecipeError("--model", f"{folder} has no {CONFIG_FILE}", "use a folder written by open_clip")
        self.name = model if folder.is_dir() else f"{model}/{pretrained}"
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self._model = ClipModel(model, None if folder.is_dir() else pretrained, "fp32", "-")
            self._loaded = self._model.load(device, threads=torch.get_num_threads())
        except RecipeError as error:  # its field is a recipe key, model or pretrained
            raise RecipeError(f"--{error.field.rpartition('.')[2]}", error.problem, error.hint) from None
        self._pad = self._loaded.tokens([""])[0][-1]

    def fits(self, text: str) -> bool:
        """Return whether all of `text` fits into the model's context."""
        return bool(self._loaded.tokens([text])[0][-1] == self._pad)

    def images(self, files: Sequence[bytes]) -> Embeddings:
        """Embed encoded images."""

        def read(data: bytes) -> npt.NDArray[np.uint8]:
            with Image.open(io.BytesIO(data)) as image:
                return self._model.prepare(np.asarray(image.convert("RGB")))

        return self._each(files, lambda batch: self._loaded.images(np.stack([read(data) for data in batch])))

    def texts(self, texts: Sequence[str]) -> Embeddings:
        """Embed texts that fit."""
        return self._each(texts, self._loaded.texts)

    def _each(self, items: Sequence[Any], encode: Callable[[Sequence[Any]], Any]) -> Embeddings:
        parts = [items[start : start + BATCH] for start in range(0, len(items), BATCH)]
        return np.concatenate([self._loaded.normalize(encode(part)).cpu().numpy() for part in parts])
