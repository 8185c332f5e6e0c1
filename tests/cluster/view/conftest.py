"""A viewer over a small dataset with two caption layers, one by people and one by a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from small_views import Viewing, write_model_layer, write_viewed


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_viewed(tmp_path_factory.mktemp("view"))
    write_model_layer(folder)
    return folder


@pytest.fixture(scope="module")
def viewing(dataset: Path) -> Iterator[Viewing]:
    with Viewing(dataset) as running:
        yield running
