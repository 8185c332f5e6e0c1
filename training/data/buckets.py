"""Aspect-ratio buckets: image sizes of about one area

    train.data.buckets ──sizes──▶ [(width, height), …] ──assign(widths, heights of a shard's table)──▶ a bucket each

A batch holds images of one size; with buckets little is cropped. An image goes into the bucket with the nearest aspect
ratio (NovelAI's aspect-ratio bucketing, 2022; SDXL, Podell et al. 2023, section 2.3). The sizes are read from the
shards' tables; no image is opened.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pyarrow.parquet as pq

from capstan.pipeline.dataset.ratios import cells_of, ratios_of_cells, read_histograms
from capstan.pipeline.dataset.shards import MANIFEST, Dataset
from capstan.pipeline.errors import DamagedFile, RecipeError
from capstan.training.config import Buckets

Size = tuple[int, int]  # width, height in pixels

_AT_ONCE = 16  # tables read concurrently
_PARSED = 4096  # histograms parsed together


def sizes_of(buckets: Buckets) -> list[Size]:
    """Return the buckets' sizes, from the tallest to the widest."""
    sizes = set(buckets.sizes) if buckets.sizes is not None else _generated(buckets)
    return sorted(sizes, key=lambda size: (size[0] / size[1], size))


def nearest_square(sizes: list[Size], step: int) -> int:
    """Return the side in pixels of the square with about the area of the largest of `sizes`, a multiple of `step`.

    >>> nearest_square([(512, 512), (640, 384)], 64), nearest_square([(64, 16)], 16)
    (512, 32)
    """
    return round(max(width * height for width, height in sizes) ** 0.5 / step) * step


def _generated(buckets: Buckets) -> set[Size]:
    """Return every width (a multiple of `step`) with the tallest height that fits the area, and its transpose."""
    side, step, sizes = buckets.size or 0, buckets.step, set[Size]()
    for short in range(step, side + 1, step):
        long = side * side // short // step * step
        if long <= buckets.ratio * short:
            sizes |= {(short, long), (long, short)}
    return sizes


def assign(widths: np.ndarray, heights: np.ndarray, sizes: list[Size]) -> np.ndarray:
    """Return the bucket of each image (int16 [images]): the nearest aspect ratio on a logarithmic scale.

    The border between two buckets is the geometric mean of their ratios. Compared in integers, so that the result is
    the same on every machine. An image of unknown size (0) counts as a square.
    """
    known = (widths > 0) & (heights > 0)
    w2 = np.where(known, widths, 1).astype(np.int64) ** 2
    h2 = np.where(known, heights, 1).astype(np.int64) ** 2
    bucket = np.zeros(len(w2), np.int16)
    for (w_a, h_a), (w_b, h_b) in pairwise(sizes):
        bucket += w2 * (h_a * h_b) >= h2 * (w_a * w_b)
    return bucket


def assign_by_cell(widths: np.ndarray, heights: np.ndarray, sizes: list[Size]) -> np.ndarray:
    """Return the bucket of each image (int16 [images]) by the cell of its ratio (dataset.ratios).

    The same as `assign`, but that near the border of two buckets ratios are rounded, by at most 1.1%.
    """
    return _buckets_of_cells(sizes)[cells_of(widths, heights)]


def _buckets_of_cells(sizes: list[Size]) -> np.ndarray:
    """Return the bucket of each cell (int16 [CELLS])."""
    borders = [math.log2(w_a * w_b / (h_a * h_b)) / 2 for (w_a, h_a), (w_b, h_b) in pairwise(sizes)]
    return np.searchsorted(borders, ratios_of_cells(), side="right").astype(np.int16)


def bucket_counts(dataset: Dataset, samples: Sequence[int], sizes: list[Size]) -> np.ndarray:
    """Return how many of the first `samples` of each shard are in each bucket, by `assign_by_cell` (int64 [shards,
    sizes]).

    They come from the manifest; only the tables of shards without a histogram, or of which not all samples are
    counted, are read. Raises DamagedFile if the manifest's counts are wrong.
    """
    entries = dataset.manifest.shards[: len(samples)]
    counts, kinds = np.zeros((len(entries), len(sizes)), np.int64), np.eye(len(sizes), dtype=np.int64)
    kind_of_cell = kinds[_buckets_of_cells(sizes)]  # [CELLS, sizes]: 1 at the cell's bucket
    known = [n for n, entry in enumerate(entries) if entry.ratios and entry.samples == samples[n]]
    for start in range(0, len(known), _PARSED):
        part = known[start : start + _PARSED]
        try:
            counts[part] = read_histograms([entries[n].ratios for n in part]) @ kind_of_cell
        except ValueError as error:
            raise DamagedFile(dataset.storage.path(MANIFEST), str(error)) from None
    unknown = sorted(set(range(len(entries))) - set(known))
    for n, (widths, heights) in zip(unknown, shapes(dataset, [entries[n].name for n in unknown]), strict=True):
        seen = slice(samples[n])
        counts[n] = kind_of_cell[cells_of(widths[seen], heights[seen])].sum(0)
    for entry, count, found in zip(entries, samples, counts.sum(1).tolist(), strict=True):
        if found != count:
            raise DamagedFile(dataset.storage.path(MANIFEST), f"the aspect ratios of {entry.name} are not {count}")
    return counts


def shapes(dataset: Dataset, shards: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return widths and heights of the stored images (int64 [samples] each), shard by shard."""

    def read(shard: str) -> tuple[np.ndarray, np.ndarray]:
        with dataset.storage.open(f"shards/{shard}.parquet") as file:
            table = pq.ParquetFile(file, page_checksum_verification=True).read(columns=["width", "height"])
        return table["width"].to_numpy().astype(np.int64), table["height"].to_numpy().astype(np.int64)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(read, shards))


def check_sizes(buckets: Buckets | None, multiple: int) -> None:
    """Raise RecipeError if a bucket's sides are not multiples of `multiple` pixels, as the model requires."""
    for width, height in sizes_of(buckets) if buckets is not None else []:
        if width % multiple or height % multiple:
            problem = f"a bucket of {width} × {height} pixels does not divide by {multiple}"
            raise RecipeError("train.data.buckets", problem, f"use a step, or sizes, in multiples of {multiple}")
