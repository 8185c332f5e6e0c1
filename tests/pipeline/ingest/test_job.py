"""A planned unit → its staged table, without Ray: no server response may harm neighbouring rows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from web_site import Site

from capstan.pipeline.config import Recipe
from capstan.pipeline.ingest.job import Ingest
from capstan.pipeline.source.plan import plan
from capstan.pipeline.storage import Storage


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as running:
        yield running


def staged_rows(tmp_path: Path, addresses: list[str]) -> dict[str, dict[str, Any]]:
    """Return the staged rows of these URLs, by URL."""
    (tmp_path / "urls.txt").write_text("".join(f"{address}\n" for address in addresses))
    recipe = Recipe.model_validate(
        {
            "dataset": str(tmp_path / "dataset"),
            "source": {"path": str(tmp_path / "urls.txt")},
            "fetch": {"allow_private": True, "robots": False, "retries": 0, "timeout_s": 5},
            "image": {"size": 64},
        }
    )
    storage = Storage(recipe.dataset)
    job = Ingest(recipe, storage)
    (unit,) = job.units(plan(recipe, storage, progress=False).units)
    (marker,) = job.prepare(unit)
    return {row["url"]: row for row in storage.read_table(marker["table"]).to_pylist()}


@pytest.mark.parametrize(
    ("answer", "reason", "detail"),
    [
        (b"404 Non trouv\xe9\r\n", "http_404", "Non trouv?"),
        ("404 Nicht möglich\r\n".encode(), "http_404", "Nicht möglich"),
        (b"404 " + b"long " * 1000 + b"\r\n", "http_404", ("long " * 1000)[:999] + "…"),
        (b"200 OK\r\nContent-Encoding: \xe9\r\n", "not_an_image", None),  # unknown: plain bytes
        (b"302 Found\r\nLocation: http://\xe9.example/\r\n", "bad_url", None),
        (b"200 OK\r\nX\xe9: a\r\n", "not_an_image", None),  # the header is ignored
    ],
)
def test_no_server_response_fails_a_unit(
    tmp_path: Path, site: Site, draw: Callable[[int], bytes], answer: bytes, reason: str, detail: str | None
) -> None:
    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        image = draw(1)
        first, body = (answer, b"abc") if b"/odd" in request else (b"200 OK\r\n", image)
        writer.write(b"HTTP/1.1 " + first + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        writer.close()

    base = f"http://127.0.0.1:{site.raw(say)}"
    rows = staged_rows(tmp_path, [f"{base}/good.jpg", f"{base}/odd.jpg"])
    assert rows[f"{base}/good.jpg"]["reason"] == ""
    odd = rows[f"{base}/odd.jpg"]
    assert odd["reason"] == reason
    assert detail in (None, odd["detail"])
