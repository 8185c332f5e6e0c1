"""The scorer interface: samples → ledger columns, pinned by an id.

    Scorer                 name, version, columns; settings and weights determine its id
    ├── SampleScorer       sees captions and decoded images, on CPU workers
    └── EmbeddingScorer    sees a CLIP's embeddings of images, on model workers (score.clip_model)

Scorers are cheap to create and to send to workers; `setup` loads anything heavy, once per worker.
"""

from __future__ import annotations

import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from capstan.pipeline.config import fingerprint
from capstan.pipeline.errors import RecipeError

Values = Sequence[Any] | npt.NDArray[Any]  # of one column, one per sample; None or NaN if there is none


@dataclass(frozen=True, slots=True)
class Sample:
    """The input of a SampleScorer. `jpeg` is the stored file, `rgb` its pixels, uint8 [height, width, 3].

    Both are None if no scorer of the run needs images. `part` is the file that the scorer names in `sees_part`.
    """

    caption: str
    jpeg: bytes | None = None
    rgb: npt.NDArray[np.uint8] | None = None
    part: bytes | None = None


class Scorer(ABC):
    """Base of all scorers. `name` is its key in the recipe; raise `version` when its arithmetic changes."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    in_ledger: ClassVar[bool] = True  # whether its columns join the ledger; otherwise they stay in its own files
    columns: ClassVar[list[pa.Field]]  # all nullable

    def settings(self) -> dict[str, Any]:
        """Return, as plain data, everything besides version and weights that can change the columns."""
        return {}

    def weights(self) -> dict[str, Path]:
        """Return recipe field → file that must exist; checked before anything is fetched."""
        return {}

    def setup(self, device: str) -> None:
        """Load anything heavy, once per worker, before the first `score`. `device` is a torch device name."""
        return

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that pins the scorer. Reads the weights: raises RecipeError if they are missing."""
        hashes = {field: sha256_of_file(path, field) for field, path in self.weights().items()}
        return {"name": self.name, "version": self.version, "settings": self.settings(), "weights": hashes}

    @functools.cached_property
    def id(self) -> str:
        """16 hexadecimal digits; columns of scorers with different ids never mix."""
        return fingerprint(self.identity)


class SampleScorer(Scorer):
    """Scorer of samples by themselves, on CPU workers."""

    sees_images: ClassVar[bool]
    sees_part: ClassVar[str] = ""  # the suffix of the clip's file that it reads, e.g. mp4

    @abstractmethod
    def score(self, samples: Sequence[Sample]) -> dict[str, Values]:
        """Return column → values. An exception for one sample becomes that sample's reason."""


class Embedded(Protocol):
    """A batch embedded by a CLIP: torch tensors [batch, dim], float32, each computed on first use."""

    @property
    def raw_images(self) -> Any: ...

    @property
    def images(self) -> Any:
        """Image embeddings of length 1."""

    @property
    def texts(self) -> Any:
        """Caption embeddings of length 1."""


class EmbeddingScorer(Scorer):
    """Scorer of samples as embedded by one of the recipe's CLIPs, on model workers."""

    clip_model: Any  # score.clip_model.ClipModel; models with equal ids are loaded and run once for all scorers

    @abstractmethod
    def score(self, batch: Embedded) -> dict[str, Values]:
        """Return column → values."""

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """As for any scorer, plus the CLIP's identity."""
        return super().identity | {"model": self.clip_model.identity}


@functools.lru_cache(maxsize=64)
def _sha256(path: Path, size: int, changed_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_file(path: Path, field: str) -> str:
    """Return the file's SHA-256. Raises RecipeError(field) if it is missing or cannot be read."""
    try:
        known = path.stat()
        return _sha256(path, known.st_size, known.st_mtime_ns)
    except FileNotFoundError:
        raise RecipeError(field, f"no file {path}", f"copy {path.name} to this machine and set its path") from None
    except OSError as error:
        raise RecipeError(field, f"cannot read {path} ({error.strerror})", "use a readable file") from None
