"""Caption language, by a fastText model (lid.176, GlotLID or another)."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

import pyarrow as pa

from capstan.pipeline.config import LanguageScore
from capstan.pipeline.errors import MissingExtra, RecipeError
from capstan.pipeline.score.scorer import Sample, SampleScorer, Values

_FIELD: Final = "score.language"
_DEFAULT: Final = Path(__file__).parent / "weights" / "lid.176.ftz"
_PREFIX: Final = "__label__"


class Language(SampleScorer):
    """The most probable language of the caption, and its probability."""

    name: ClassVar[str] = "language"
    sees_images: ClassVar[bool] = False
    columns: ClassVar[list[pa.Field]] = [
        pa.field("language", pa.string()),  # as the model names it: en, or eng_Latn
        pa.field("language_score", pa.float32()),  # its probability
    ]

    def __init__(self, config: LanguageScore) -> None:
        if importlib.util.find_spec("fasttext") is None:
            raise MissingExtra(_FIELD, "fasttext", "language")
        self._file = _DEFAULT if config.weights is None else Path(config.weights).absolute()

    def weights(self) -> dict[str, Path]:
        return {f"{_FIELD}.weights": self._file}

    def setup(self, device: str) -> None:
        self._loaded = _load(self._file)

    def score(self, samples: Sequence[Sample]) -> dict[str, Values]:
        found = [self._one(" ".join(sample.caption.split())) for sample in samples]
        return {"language": [label for label, _ in found], "language_score": [score for _, score in found]}

    def _one(self, text: str) -> tuple[str | None, float | None]:
        """Return (label, probability); (None, None) if the model knows no word of the caption."""
        labels, scores = self._loaded.predict(text.encode("utf-8", "replace").decode())
        if not text or not labels:
            return None, None
        return str(labels[0]).removeprefix(_PREFIX), min(1.0, float(scores[0]))  # fastText rounds to 1.00001

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_loaded"}


@functools.lru_cache(maxsize=1)
def _load(file: Path) -> Any:
    """Load the model once per worker process: units arrive one by one."""
    import fasttext

    try:
        return fasttext.load_model(str(file))
    except ValueError as error:
        hint = "use a .bin or .ftz file written by fastText"
        raise RecipeError(f"{_FIELD}.weights", f"cannot load {file} ({error})", hint) from None
