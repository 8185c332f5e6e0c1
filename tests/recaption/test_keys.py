"""Somebody else's recipe cannot send the environment's secrets to its server."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import chat_server
import pytest
from chat_server import ChatServer, engine, jpeg
from in_process import run_here

from capstan.cluster.cli import run
from capstan.pipeline import units
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage import Storage
from capstan.recaption.config import RecaptionConfig
from capstan.recaption.engines import Request
from capstan.recaption.upsample import text_engine


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with chat_server.serving() as running:
        yield running


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's config folder, and a secret of another program."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "their-secret")
    monkeypatch.setenv("MY_KEY", "my-key")
    monkeypatch.delenv("CAPSTAN_ALLOWED_KEYS", raising=False)
    return tmp_path / "config" / "capstan"


Recaption = Callable[..., int]


@pytest.fixture
def recaption(server: ChatServer, build: Callable[..., Storage], tmp_path: Path, monkeypatch: Any) -> Recaption:
    monkeypatch.setattr(units, "run", run_here)
    storage, file = build([[0]]), tmp_path / "recipe.yaml"

    def run_with(key_env: str, *options: str) -> int:
        section = {"engine": "openai", "model": "m", "slots": ["short"], "server": {"url": server.url}}
        section["server"] = {"url": server.url, "key_env": key_env}
        file.write_text(json.dumps({"dataset": storage.url, "recaption": section}))
        return run(["recaption", str(file), *options])

    return run_with


@pytest.mark.parametrize("options", [[], ["--plan"]])
def test_a_variable_that_is_not_on_the_list_is_not_sent(
    recaption: Recaption, server: ChatServer, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    assert recaption("AWS_SECRET_ACCESS_KEY", *options) == 2
    error = capsys.readouterr().err
    assert "recaption.server.key_env: AWS_SECRET_ACCESS_KEY is not on the list" in error
    assert "their-secret" not in error
    assert not server.bodies


def test_the_user_can_allow_further_names(
    recaption: Recaption, server: ChatServer, own_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    caplog.set_level(logging.INFO)
    assert recaption("MY_KEY") == 2
    own_folder.mkdir(parents=True)
    (own_folder / "allowed-keys").write_text("# keys of my servers\nMY_KEY\n")
    assert recaption("MY_KEY") == 0
    assert server.headers[0]["Authorization"] == "Bearer my-key"
    assert f"requests go to {server.url}, with the key in MY_KEY" in caplog.text
    assert "my-key" not in caplog.text
    (own_folder / "allowed-keys").unlink()
    assert recaption("MY_KEY") == 2
    monkeypatch.setenv("CAPSTAN_ALLOWED_KEYS", "OTHER, MY_KEY")
    assert recaption("MY_KEY") == 0


def test_names_of_capstans_own_need_no_list(
    recaption: Recaption, server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPSTAN_SERVER_KEY", "own-key")
    assert recaption("CAPSTAN_SERVER_KEY") == 0
    assert server.headers[0]["Authorization"] == "Bearer own-key"


def test_expanding_prompts_checks_the_name_too(server: ChatServer) -> None:
    section = {"engine": "openai", "model": "m", "server": {"url": server.url, "key_env": "AWS_SECRET_ACCESS_KEY"}}
    with pytest.raises(RecipeError, match=r"server\.key_env"):
        text_engine(RecaptionConfig.model_validate(section))


def test_redirects_are_not_followed(server: ChatServer) -> None:
    """Else an image, and on the same host the key, would go where the recipe does not say."""
    with chat_server.serving() as other:
        target = {"Location": f"{other.url}/chat/completions"}
        server.misbehave = lambda body, tries: (307, target, {})
        with pytest.raises(RecipeError, match=r"HTTP 307: redirected to"):
            engine(server).caption([jpeg(0)], [Request("a", ("short",))])
        assert not other.bodies
