"""Headless Chromium, asked over its DevTools protocol: what a page logs, runs, asks for, and how wide it is."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_SWITCHES = [
    "--headless",
    "--no-sandbox",  # tests run as root
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--remote-debugging-port=0",
]
_PATIENCE_S = 300.0


def find() -> str | None:
    """The browser's binary, or None."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@dataclass
class Visit:
    """What happened while a page was open."""

    problems: list[str] = field(default_factory=list)  # console messages, exceptions, dialogs
    requests: list[str] = field(default_factory=list)  # all but data:
    answers: list[Any] = field(default_factory=list)  # of the expressions that were asked


@dataclass(frozen=True)
class Press:
    """A key that a person presses, among the expressions of a visit."""

    key: str


@dataclass(frozen=True)
class Shot:
    """A screenshot, among the expressions of a visit."""

    path: Path
    whole: bool = False


Step = str | Press | Shot


class Browser:
    """A running browser."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def visit(self, page: Path | str, *expressions: Step, width: int = 1280, dark: bool = False) -> Visit:
        """Open a file or a URL, let it settle, and evaluate `expressions` (JavaScript, promises too) in it."""
        return asyncio.run(asyncio.wait_for(self._visit(page, expressions, width, dark), _PATIENCE_S))

    async def _visit(self, page: Path | str, expressions: Sequence[Step], width: int, dark: bool) -> Visit:
        async with aiohttp.ClientSession() as session:
            async with session.put(f"{self._url}/json/new?about:blank") as answer:
                target = await answer.json(content_type=None)
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                tab = _Tab(socket)
                for domain in ("Page", "Runtime", "Log", "Network"):
                    await tab.ask(f"{domain}.enable")
                size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
                await tab.ask("Emulation.setDeviceMetricsOverride", **size)
                scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
                await tab.ask("Emulation.setEmulatedMedia", features=[scheme])
                url = page if isinstance(page, str) else page.resolve().as_uri()
                await tab.ask("Page.navigate", url=url)
                await tab.until("Page.loadEventFired")
                await asyncio.sleep(0.3)  # what a page starts after it has loaded
                for expression in expressions:
                    if isinstance(expression, Press):
                        await tab.press(expression.key)
                        tab.visit.answers.append(None)
                        continue
                    if isinstance(expression, Shot):
                        shot = await tab.ask("Page.captureScreenshot", captureBeyondViewport=expression.whole)
                        expression.path.write_bytes(base64.b64decode(shot["data"]))
                        tab.visit.answers.append(None)
                        continue
                    answer = await tab.ask(
                        "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
                    )
                    tab.visit.answers.append(answer["result"].get("value"))
            await session.get(f"{self._url}/json/close/{target['id']}")
        return tab.visit


class _Tab:
    """Commands to a page, and the events that come between their answers."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.visit, self._socket, self._numbers, self._seen = Visit(), socket, itertools.count(1), set[str]()

    async def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = await self._receive()
            if message.get("id") == number:
                assert "error" not in message, (method, message)
                return dict(message["result"])

    async def press(self, key: str) -> None:
        text = {"text": "\r" if key == "Enter" else key} if len(key) == 1 or key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            await self.ask("Input.dispatchKeyEvent", type=kind, key=key, **(text if kind == "keyDown" else {}))

    async def until(self, event: str) -> None:
        while event not in self._seen:
            await self._receive()

    async def _receive(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads((await self._socket.receive()).data)
        method, parameters = message.get("method", ""), message.get("params", {})
        self._seen.add(method)
        if method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Page.javascriptDialogOpening"):
            self.visit.problems.append(f"{method}: {json.dumps(parameters)[:500]}")
        elif method == "Log.entryAdded":
            self.visit.problems.append(f"{method}: {parameters['entry']['level']}: {parameters['entry']['text']}")
        elif method == "Network.requestWillBeSent" and not parameters["request"]["url"].startswith("data:"):
            self.visit.requests.append(parameters["request"]["url"])
        return message


@contextlib.contextmanager
def start(binary: str) -> Iterator[Browser]:
    """A browser with a profile of its own, ended with the block."""
    with tempfile.TemporaryDirectory(prefix="capstan-browser-", ignore_cleanup_errors=True) as profile:
        command = [binary, *_SWITCHES, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield Browser(_port(Path(profile), process))
        finally:
            process.terminate()
            process.wait(timeout=120)


def _port(profile: Path, process: subprocess.Popen[bytes]) -> int:
    """Where the browser listens; it writes that down once it does."""
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError, IndexError, ValueError):
            return int((profile / "DevToolsActivePort").read_text().splitlines()[0])
        assert process.poll() is None, "the browser ended at once"
        time.sleep(0.05)
    raise AssertionError("the browser does not listen")
