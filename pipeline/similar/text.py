"""A text → its embedding, by the CLIP that made a dataset's embeddings. Nothing is downloaded"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from capstan.pipeline import extras
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.score.clip_model import CONFIG_FILE, ClipModel

_SECTION: Final = "score.clip"
_WEIGHTS: Final = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


class TextEncoder:
    """The CLIP of a recipe's `score.clip`, loaded at the first text; safe to call from several threads.

    `identity` is that of the CLIP that embedded the images: another one is refused.
    """

    def __init__(self, clip: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
        self._clip, self._identity = clip, identity
        self._loaded: Any = None
        self._lock = threading.Lock()

    def encode(self, text: str) -> npt.NDArray[np.float32]:
        """Return the text's embedding. Raises RecipeError if the model is not on this machine, or is another one."""
        with self._lock:
            if self._loaded is None:
                self._loaded = self._model().load("cpu", threads=len(os.sched_getaffinity(0)))
            vector = self._loaded.texts([text])[0]
        return np.asarray(vector.numpy(), np.float32)

    def _model(self) -> ClipModel:
        extras.require(extras.RECAPTION, _SECTION)
        model, pretrained = str(self._clip.get("model", "")), self._clip.get("pretrained")
        if not (Path(model) / CONFIG_FILE).is_file():
            pretrained = str(_at_hand(model, str(pretrained)))
        found = ClipModel(model, pretrained, str(self._clip.get("precision", "fp32")), _SECTION)
        own = {name: found.identity[name] for name in ("weights", "architecture", "vocabulary")}
        if any(value != self._identity.get(name) for name, value in own.items()):
            problem = f"{found.file} is not the CLIP that embedded the images"
            raise RecipeError(f"{_SECTION}.pretrained", problem, "use the weights with which the dataset was scored")
        return found


def _at_hand(model: str, pretrained: str) -> Path:
    """Return the weights of an open_clip model if they are on this machine."""
    if Path(pretrained).is_file():
        return Path(pretrained)
    import open_clip
    from transformers.utils import cached_file

    config = open_clip.get_pretrained_cfg(model, pretrained)
    places = [Path.home() / ".cache" / "clip" / Path(config.get("url") or "none").name]
    hub, _, name = str(config.get("hf_hub") or "").rpartition("/")
    for file in ([name] if name else _WEIGHTS) if hub else []:
        with contextlib.suppress(OSError):  # not in the hub's cache
            places.append(Path(str(cached_file(hub, file, local_files_only=True))))
    if (place := next((place for place in places if place.is_file()), None)) is not None:
        return place
    problem = f"the weights {pretrained!r} of {model} are not on this machine"
    hint = "copy them here and open the viewer where `score.clip.pretrained` finds them; it downloads nothing"
    raise RecipeError(f"{_SECTION}.pretrained", problem, hint)
