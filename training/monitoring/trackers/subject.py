"""What a tracker's records are about: a training run, or a dataset"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

FIELD: Final = "train.watch.trackers"  # the recipe's key of a training run's trackers


@dataclass(frozen=True)
class Subject:
    """`folder` holds the tracker's own files and its pending records, `config` gives what is kept with the records."""

    folder: Path
    config: Callable[[], Mapping[str, Any]]
    name: str
