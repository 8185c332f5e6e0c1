"""What a scorer is: samples → columns; pinned by everything that can change them.

    Scorer                 name, version, columns; settings and weights make its id
    ├── SampleScorer       sees captions and decoded images, on CPU workers
    └── EmbeddingScorer    sees a CLIP's embeddings of images, on model workers (pipeline.score.tower)

Scorers are light to make and to send to workers: `setup` loads what is heavy, once a worker.
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

Values = Sequence[Any] | npt.NDArray[Any]  # of one column, one for each sample; None or NaN where there is none


@dataclass(frozen=True, slots=True)
class Sample:
    """What a SampleScorer sees. `jpeg` is the stored file, `rgb` its pixels, uint8 [height, width, 3]; both None where
    no scorer of the run asks for images."""

    caption: str
    jpeg: bytes | None = None
    rgb: npt.NDArray[np.uint8] | None = None


class Scorer(ABC):
    """`name` is its key in the recipe; raise `version` when its arithmetic changes."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    in_ledger: ClassVar[bool] = True  # its columns join the ledger; else they are files of their own only
    columns: ClassVar[list[pa.Field]]  # all nullable

    def settings(self) -> dict[str, Any]:
        """What can change the columns besides version and weights, as plain data."""
        return {}

    def weights(self) -> dict[str, Path]:
        """Recipe field → the file that must be there; checked before anything is fetched."""
        return {}

    def setup(self, device: str) -> None:
        """Load what is heavy: once a worker, before the first `score`. `device` is torch's name for one."""
        return

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What pins the scorer. Reads the weights: raises RecipeError where they are missing."""
        hashes = {field: sha256_of_file(path, field) for field, path in self.weights().items()}
        return {"name": self.name, "version": self.version, "settings": self.settings(), "weights": hashes}

    @functools.cached_property
    def id(self) -> str:
        """16 hexadecimal digits: other digits are another scorer, whose columns never mix with this one's."""
        return fingerprint(self.identity)


class SampleScorer(Scorer):
    """Scores samples by themselves, on CPU workers."""

    sees_images: ClassVar[bool]

    @abstractmethod
    def score(self, samples: Sequence[Sample]) -> dict[str, Values]:
        """Column → values. What it raises for one sample becomes that sample's reason."""


class Embedded(Protocol):
    """A batch as a CLIP sees it: torch tensors [batch, dim], float32, each made when first asked for."""

    @property
    def raw_images(self) -> Any: ...

    @property
    def images(self) -> Any:
        """Of length 1."""

    @property
    def texts(self) -> Any:
        """Of the captions, of length 1."""


class EmbeddingScorer(Scorer):
    """Scores what one of the recipe's CLIPs makes of samples, on model workers."""

    tower: Any  # pipeline.score.tower.Tower; those with one id are loaded and run once for all scorers

    @abstractmethod
    def score(self, batch: Embedded) -> dict[str, Values]:
        """Column → values."""

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """Takes in the CLIP's."""
        return super().identity | {"model": self.tower.identity}


@functools.lru_cache(maxsize=64)
def _sha256(path: Path, size: int, changed_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_file(path: Path, field: str) -> str:
    """Raises RecipeError(field) naming the file to bring where it is missing."""
    try:
        known = path.stat()
        return _sha256(path, known.st_size, known.st_mtime_ns)
    except FileNotFoundError:
        raise RecipeError(field, f"no file {path}", f"bring {path.name}, and name where it is") from None
    except OSError as error:
        raise RecipeError(field, f"cannot read {path} ({error.strerror})", "name a readable file") from None
