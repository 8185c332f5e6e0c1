"""A real S3 server on loopback, and the proxy that spoils some of its answers, for tests of whole stages."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PROXY = Path(__file__).with_name("fault_proxy.py")
FAULTS = ["500", "503", "refused", "reset", "stall", "stalled_body", "truncated", "short"]


class S3:
    """`rclone serve s3` over a folder in which each folder is a bucket; `bucket` is there."""

    def __init__(self, folder: Path, key: str, secret: str) -> None:
        self.folder, self.key, self.secret = folder, key, secret
        (folder / "bucket").mkdir(parents=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def __enter__(self) -> S3:
        rclone = str(Path(sys.executable).with_name("rclone"))
        command = [rclone, "serve", "s3", "--auth-key", f"{self.key},{self.secret}", "--addr", f"127.0.0.1:{self.port}"]
        self.process = subprocess.Popen([*command, "."], cwd=self.folder, stderr=subprocess.DEVNULL)
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                break
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()

    @property
    def env(self) -> dict[str, str]:
        """The standard place of credentials."""
        return {"AWS_ACCESS_KEY_ID": self.key, "AWS_SECRET_ACCESS_KEY": self.secret, "AWS_DEFAULT_REGION": "us-east-1"}

    def storage(self, port: int | None = None) -> dict[str, Any]:
        """A recipe's `storage`: the endpoint, and no secret."""
        return {"endpoint_url": f"http://127.0.0.1:{port or self.port}", "config_kwargs": {"read_timeout": 3}}


class Faulty:
    """The proxy in front of a server, as a context; afterwards `counts` says what it did."""

    def __init__(self, server: S3, *options: str) -> None:
        command = [sys.executable, str(PROXY), str(server.port), *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        self.counts: dict[str, int] = {}

    @property
    def injected(self) -> int:
        return sum(self.counts.get(kind, 0) for kind in FAULTS)

    def __enter__(self) -> Faulty:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.counts = json.loads(self.process.communicate(timeout=240)[0])
