"""What the viewer answers to requests that cannot be read, and to its own defects."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from capstan.cluster.view.answers import json_body, parsing, problems


async def reads(request: web.Request) -> web.Response:
    asked = await json_body(request)
    with parsing():
        key = str(asked["key"]).encode("ascii")
    return web.json_response({"length": len(key)})


async def is_broken(_: web.Request) -> web.Response:
    nothing: dict[str, str] = {}
    return web.Response(text=nothing["token of the user"])


def answers(path: str, data: bytes) -> tuple[int, str]:
    async def ask() -> tuple[int, str]:
        app = web.Application(middlewares=[problems])
        app.add_routes([web.post("/reads", reads), web.post("/is-broken", is_broken)])
        async with TestClient(TestServer(app)) as client, client.post(path, data=data) as answer:
            return answer.status, await answer.text()

    return asyncio.run(ask())


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"{}", b'"key"', b"\xff", '{"key": "ü"}'.encode()])
def test_a_request_that_cannot_be_read_is_the_users_mistake(data: bytes) -> None:
    status, text = answers("/reads", data)
    assert status == 400
    assert '"field": "request"' in text


def test_a_request_that_can_be_read_is_answered() -> None:
    assert answers("/reads", b'{"key": "abc"}') == (200, '{"length": 3}')


def test_a_defect_is_logged_and_its_details_stay_here(caplog: Any) -> None:
    status, text = answers("/is-broken", b"{}")
    assert status == 500
    assert "token of the user" not in text
    assert any(record.exc_info for record in caplog.records)
