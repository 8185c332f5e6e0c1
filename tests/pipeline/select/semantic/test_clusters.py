"""Semantic duplicates: first kept row, independent of the number of cores, and stable as batches are added."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capstan.pipeline.select.arrays.apart import Apart
from capstan.pipeline.select.semantic import clusters as semantic
from capstan.pipeline.select.semantic.clusters import find_semantic, unit


def embeddings(seed: int, n: int, dim: int = 16) -> np.ndarray:
    """Return rows, every third of them an earlier row with a little noise."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((n, dim)).astype(np.float16)
    for row in range(2, n, 3):
        rows[row] = rows[rng.integers(0, row)] + rng.standard_normal(dim) * 0.03
    return rows


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(0, 80), threshold=st.sampled_from([0.5, 0.8, 0.95, 0.99]))
def test_in_one_cluster_it_is_the_first_kept_row_that_is_near(seed: int, n: int, threshold: float) -> None:
    rows = embeddings(seed, n)
    order = np.random.default_rng(seed).permutation(n)
    near = find_semantic(rows, order, threshold, first=n)
    cosine = unit(rows[order]) @ unit(rows[order]).T
    kept: list[int] = []
    for position in range(n):
        close = [other for other in kept if cosine[position, other] >= threshold]
        assert near[position] == (close[0] if close else -1)
        kept += [] if close else [position]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 60), threshold=st.sampled_from([0.5, 0.8]))
def test_rows_that_are_apart_do_not_repeat_each_other(seed: int, n: int, threshold: float) -> None:
    rows, rng = embeddings(seed, n), np.random.default_rng(seed)
    pairs = np.array([rng.choice(n, 2, replace=False) for _ in range(n)], np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(semantic, "_PIECE", 40)
        near = find_semantic(rows, np.arange(n), threshold, first=n, apart=Apart.of(n, pairs))
    cosine, told = unit(rows) @ unit(rows).T, {frozenset(pair) for pair in pairs.tolist()}
    kept: list[int] = []
    for row in range(n):
        close = [k for k in kept if cosine[row, k] >= threshold and {k, row} not in told]
        assert near[row] == (close[0] if close else -1)
        kept += [] if close else [row]


def test_pieces_of_a_large_cluster_agree_with_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = embeddings(1, 700)
    whole = find_semantic(rows, np.arange(700), 0.95, first=700)
    monkeypatch.setattr(semantic, "_PIECE", 64)
    assert find_semantic(rows, np.arange(700), 0.95, first=700).tolist() == whole.tolist()


def test_a_row_without_an_embedding_repeats_nothing() -> None:
    rows = np.zeros((4, 8), np.float16)
    rows[1] = rows[3] = 1
    assert find_semantic(rows, np.arange(4), 0.9, first=4).tolist() == [-1, -1, -1, 1]


@pytest.fixture(params=["at once", "in steps"])
def clusters(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters of 50 rows each, so that a few hundred rows make several; at once, or clusters of clusters."""
    monkeypatch.setattr(semantic, "CLUSTER_ROWS", 50)
    monkeypatch.setattr(semantic, "MOST_CLUSTERS", 4096 if request.param == "at once" else 4)


@pytest.mark.usefixtures("clusters")
def test_clusters_miss_little(tmp_path: Path) -> None:
    rows = np.memmap(tmp_path / "rows.f16", np.float16, "w+", shape=(2000, 32))
    rows[:] = embeddings(2, 2000, 32)
    near = find_semantic(rows, np.arange(2000), 0.95, first=2000)
    everywhere = unit(rows) @ unit(rows).T >= 0.95
    wanted = [row for row in range(2000) if everywhere[row, :row].any()]
    assert len(wanted) > 600
    assert sum(near[row] >= 0 for row in wanted) >= 0.95 * len(wanted)
    assert all(everywhere[row, near[row]] for row in np.flatnonzero(near >= 0))


@pytest.mark.usefixtures("clusters")
def test_a_new_batch_changes_no_earlier_decision() -> None:
    rows = embeddings(3, 900)
    before = find_semantic(rows[:600], np.arange(600), 0.95, first=600)
    after = find_semantic(rows, np.arange(900), 0.95, first=600)
    assert after[:600].tolist() == before.tolist()
    assert (after[600:] >= 0).any()


@pytest.mark.usefixtures("clusters")
def test_the_number_of_cores_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = embeddings(4, 900)
    found = []
    for cores in (1, 5):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        found.append(find_semantic(rows, np.arange(900), 0.95, first=900).tolist())
    assert found[0] == found[1]


def test_clusters_grow_with_the_rows_and_not_in_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semantic, "CLUSTER_ROWS", 50)
    monkeypatch.setattr(semantic, "MOST_CLUSTERS", 8)
    compared = []
    first_kept = semantic._first_kept
    monkeypatch.setattr(
        semantic, "_first_kept", lambda rows, own, *rest: compared.append(len(own)) or first_kept(rows, own, *rest)
    )
    for rows in (1000, 4000):
        compared.clear()
        random = np.random.default_rng(0).normal(size=(rows, 16)).astype(np.float16)
        find_semantic(random, np.arange(rows), 0.99, first=rows)
        assert sum(compared) == rows
        assert rows / 150 < len(compared) < rows / 20
        assert max(compared) < 250


def test_equal_embeddings_are_found_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """They cannot be split into clusters."""
    monkeypatch.setattr(semantic, "CLUSTER_ROWS", 5)
    monkeypatch.setattr(semantic, "MOST_CLUSTERS", 4)
    near = find_semantic(np.ones((300, 8), np.float16), np.arange(300), 0.99, first=300)
    assert near.tolist() == [-1] + [0] * 299
