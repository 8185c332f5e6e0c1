"""Arrays of a value per row → bytes of a file that a worker leaves for the process that decides"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from capstan.pipeline.dataset.shards import sha256_of
from capstan.pipeline.errors import DamagedFile
from capstan.pipeline.storage import Storage

SCRATCH: Final = "state/columns/values"  # files of selections on workers; pack.added removes what a kill has left
Arrays = dict[str, npt.NDArray[Any]]


def save(storage: Storage, name: str, arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, Any]:
    """Publish arrays in one file; return what `load` has to know, as plain data."""
    file = io.BytesIO()
    for values in arrays.values():
        np.save(file, values, allow_pickle=False)
    data = file.getvalue()
    storage.write(name, data)
    return {"file": name, "sha256": sha256_of(data), "arrays": list(arrays)}


def load(storage: Storage, file: str, sha256: str, arrays: Sequence[str]) -> Arrays:
    """Return arrays that `save` has published. Raises DamagedFile."""
    data = storage.read(file)
    if sha256_of(data) != sha256:
        problem = "its SHA-256 is not that of what was written"
        raise DamagedFile(storage.path(file), problem, "run the same command again")
    content = io.BytesIO(data)
    return {name: np.load(content, allow_pickle=False) for name in arrays}
