"""Rows that people found to be different: neither is a duplicate of the other"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from capstan.pipeline.select.arrays.large_arrays import Ints, which


@dataclass(frozen=True)
class Apart:
    """Pairs of n rows, each as the code `smaller row * n + larger row`, sorted."""

    n: int
    codes: Ints

    @classmethod
    def of(cls, n: int, pairs: Ints) -> Self:
        """Return the pairs [m, 2] of n rows."""
        return cls(n, np.unique(pairs.min(axis=1) * n + pairs.max(axis=1)) if len(pairs) else np.zeros(0, np.int64))

    @property
    def pairs(self) -> Ints:
        """The pairs [m, 2], the smaller row first."""
        return np.stack([self.codes // max(self.n, 1), self.codes % max(self.n, 1)], axis=1)

    @property
    def rows(self) -> Ints:
        """The rows that occur in a pair, sorted."""
        return np.unique(self.pairs)

    def has(self, a: Ints, b: Ints) -> npt.NDArray[np.bool_]:
        """Return whether the rows a[i] and b[i] are a pair."""
        if not len(self.codes):
            return np.zeros(len(a), bool)
        return np.isin(np.minimum(a, b) * self.n + np.maximum(a, b), self.codes)

    def take(self, rows: Ints) -> Apart:
        """Return the pairs among `rows`, as indices into them."""
        if not len(self.codes):
            return Apart(len(rows), self.codes)
        named = self.rows
        here = which(len(rows), lambda piece: np.isin(rows[piece], named))
        place = dict(zip(rows[here].tolist(), here.tolist(), strict=True))
        both = [(place[a], place[b]) for a, b in self.pairs.tolist() if a in place and b in place]
        return Apart.of(len(rows), np.array(both, np.int64).reshape(-1, 2))

    def alone(self, rows: Ints) -> npt.NDArray[np.uint64]:
        """Return a column in which the rows of pairs differ from all others, and the others are equal."""
        return np.where(np.isin(rows, self.rows), rows + 1, 0).astype(np.uint64)


NOTHING: Final = Apart(0, np.zeros(0, np.int64))
