"""The rows nearest to a vector: all compared, and by a graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from capstan.pipeline import extras
from capstan.pipeline.errors import MissingExtra
from capstan.pipeline.similar import nearest
from capstan.pipeline.similar.nearest import Nearest
from capstan.pipeline.similar.vectors import Vectors

ROWS, DIM = 3000, 24


@pytest.fixture
def vectors(tmp_path: Path) -> Vectors:
    """Embeddings of length 1; every hundredth row has none."""
    rows = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows[::100] = 0
    keys = np.arange(ROWS * 16, dtype=np.uint8).reshape(ROWS, 16)
    return Vectors(rows.astype(np.float16), keys, ("a", "b"), (1000, ROWS), tmp_path / "graph.usearch")


def expected(vectors: Vectors, query: np.ndarray) -> list[int]:
    cosines = vectors.rows.astype(np.float32) @ query
    cosines[::100] = -2
    return np.argsort(-cosines, kind="stable")[:20].tolist()


def test_all_are_compared(vectors: Vectors) -> None:
    query = np.random.default_rng(1).normal(size=DIM).astype(np.float32)
    near = Nearest(vectors)
    near.prepare()
    found = near.find(query, 20)
    assert [row for row, _ in found] == expected(vectors, query)
    assert near.exact
    own = near.find(np.asarray(vectors.rows[1234], np.float32), 1)
    assert own == [(1234, pytest.approx(1, abs=1e-3))]
    assert (vectors.unit(999), vectors.unit(1000), vectors.unit(ROWS - 1)) == ("a", "b", "b")


def test_few_rows_are_all_found_but_those_without_an_embedding(vectors: Vectors) -> None:
    few = Vectors(vectors.rows[95:105], vectors.keys[95:105], ("a",), (10,), vectors.graph)
    assert sorted(row for row, _ in Nearest(few).find(np.ones(DIM, np.float32), 60)) == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    none = Vectors(vectors.rows[:0], vectors.keys[:0], (), (), vectors.graph)
    assert Nearest(none).find(np.ones(DIM, np.float32), 60) == []


def test_many_rows_are_found_by_a_graph_which_is_kept(vectors: Vectors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "EXACT", 100)
    shares: list[float] = []
    near = Nearest(vectors)
    near.prepare(shares.append)
    assert shares[-1] == 1
    query = np.random.default_rng(1).normal(size=DIM).astype(np.float32)
    found = [row for row, _ in near.find(query, 20)]
    assert len(set(found) & set(expected(vectors, query))) >= 15
    assert not near.exact
    again = Nearest(vectors)
    again.prepare(pytest.fail)  # nothing is built again
    assert [row for row, _ in again.find(query, 20)] == found


def test_without_the_package_the_extra_is_named(vectors: Vectors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "EXACT", 100)
    monkeypatch.setitem(extras.PACKAGES, "similar", ("a_package_that_is_not_there",))
    with pytest.raises(MissingExtra, match=r"capstan-t2i\[similar\]"):
        Nearest(vectors).prepare()
