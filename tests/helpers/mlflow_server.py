"""The part of MLflow's REST API that a run uses, on loopback; it can go away and come back."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

API = "/api/2.0/mlflow/"


class Server:
    """What was logged: (step, name, value), in order of arrival. Outside `up` connections are refused."""

    def __init__(self, artifacts: Path) -> None:
        self.artifacts, self.metrics, self.ended = artifacts, list[tuple[int, str, float]](), False
        self.tags: dict[str, str] = {}
        self.rejected: set[int] = set()  # steps that are answered with 400
        self.port = 0

    @contextlib.contextmanager
    def up(self) -> Iterator[Server]:
        http = ThreadingHTTPServer(("127.0.0.1", self.port), self._handler())
        http.daemon_threads = True
        self.port = http.server_port  # the same when it comes back
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            http.shutdown()
            http.server_close()
            thread.join()

    def losses(self) -> list[tuple[int, float]]:
        return [(step, value) for step, name, value in self.metrics if name == "loss"]

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        info = {"run_id": "r1", "run_uuid": "r1", "experiment_id": "1", "status": "RUNNING"}
        run = {"run": {"info": info | {"artifact_uri": self.artifacts.as_uri()}, "data": {}}}
        if path == "experiments/get-by-name":
            return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such experiment"}
        if path == "experiments/create":
            return 200, {"experiment_id": "1"}
        if path == "runs/log-batch":
            if body["metrics"][0]["step"] in self.rejected:
                return 400, {"error_code": "INVALID_PARAMETER_VALUE", "message": "not this one"}
            self.metrics += [(metric["step"], metric["key"], metric["value"]) for metric in body["metrics"]]
            return 200, {}
        if path == "runs/set-tag":
            self.tags[body["key"]] = body["value"]
            return 200, {}
        if path == "runs/update":
            self.ended = True
            return 200, {"run_info": info}
        return 200, run

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.0"  # no connection outlives the server

            def do_GET(self) -> None:
                self._answer()

            def do_POST(self) -> None:
                self._answer()

            def _answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length) or b"{}")
                status, content = server.answer(urlsplit(self.path).path.removeprefix(API), body)
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler
