"""Clips in the viewer: their files are served whole and by ranges, to those who may see the row."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from moving import shown, write_clips
from small_views import Viewing

from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.storage import Storage

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write_clips(tmp_path_factory.mktemp("clips")))


@pytest.fixture(scope="module")
def viewing(dataset: Path) -> Iterator[Viewing]:
    with Viewing(dataset) as running:
        yield running


def get(viewing: Viewing, path: str, **headers: str) -> tuple[int, bytes, Any]:
    request = urllib.request.Request(viewing.origin + path, headers=viewing.cookie | headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, b"", error.headers


def test_video_and_sound_are_served_whole_and_by_ranges(viewing: Viewing, dataset: Path) -> None:
    opened = Dataset(Storage(str(dataset)))
    for key, _, parts in opened.read_samples(opened.shard_names[0]):
        for part, data in parts.items():
            status, body, headers = get(viewing, f"/part/{key}/{part}")
            assert (status, body) == (200, data)
            assert headers["Content-Type"] == {"mp4": "video/mp4", "flac": "audio/flac"}[part]
            status, body, headers = get(viewing, f"/part/{key}/{part}", Range="bytes=10-19")
            assert (status, body) == (206, data[10:20])
            assert headers["Content-Range"] == f"bytes 10-19/{len(data)}"
            assert get(viewing, f"/part/{key}/{part}", Range="bytes=5-")[1] == data[5:]
            assert get(viewing, f"/part/{key}/{part}", Range=f"bytes={len(data)}-")[0] == 416
        assert len(shown(parts["mp4"])) == 24


def test_nothing_else_is_served(viewing: Viewing, dataset: Path) -> None:
    key = Dataset(Storage(str(dataset))).ledger(["key"])["key"][0].as_py()
    assert get(viewing, f"/part/{key}/json")[0] == 404
    assert get(viewing, f"/part/{'0' * 32}/mp4")[0] == 404
    assert get(viewing, "/part/x/mp4")[0] == 404
    assert "media-src 'self'" in get(viewing, "/")[2]["Content-Security-Policy"]
    request = urllib.request.Request(f"{viewing.origin}/part/{key}/mp4")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(request, timeout=120)
