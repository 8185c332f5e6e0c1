"""Files of scores, and their columns joined to what is staged.

    scores/<scorer id>/recipe.json                what pins the scorer
    scores/<scorer id>/<unit>-<hash>.parquet      key, the scorer's columns, error: one row a staged row, in its order

A file is named as the staged table that it scores, so it is that table's and no other's, row by row.
`error` says why a row that could be scored has nulls ("" otherwise).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.ingest import Staged
from pipeline.score.scorer import Scorer
from pipeline.storage import Storage

ROOT: Final = "scores"
EMBEDDINGS: Final = "embeddings"  # the scorer that keeps them, and the prefix of their column
ERROR: Final = pa.field("score_error", pa.string(), nullable=False)  # the ledger's: "clip: …" where a score is missing


def file_name(scorer: str, staged_table: str) -> str:
    """Where the scorer of this id keeps its columns for a staged table."""
    return f"{ROOT}/{scorer}/{PurePosixPath(staged_table).name}"


def schema(scorer: Scorer) -> pa.Schema:
    """Of a scorer's files; its identity is in their metadata."""
    fields = [pa.field("key", pa.string(), nullable=False), *scorer.columns, pa.field("error", pa.string(), False)]
    return pa.schema(fields, metadata={"capstan.scorer": json.dumps(scorer.identity, sort_keys=True)})


def embeddings(storage: Storage, units: Sequence[Staged], folder: Path | None = None) -> npt.NDArray[np.float16]:
    """The pictures' embeddings [rows, dim], rows ordered as the units and their tables; zeros where there is none.

    Units need `scores` with a file of `score.clip.embeddings`; raises RecipeError where one has none. In `folder`, if
    given, the array is a file that is mapped to memory.
    """
    raise NotImplementedError
