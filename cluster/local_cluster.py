"""A Ray cluster of several nodes on one machine, for rehearsals and tests

    Nodes(folder) ─▶ start_head() ─▶ start_worker(cpus, gpus, labels) … kill(node) … ─▶ close()

Each node is a process tree of its own. The cluster listens on loopback only and requires a token of every client. The
token is in a file that only its owner can read; processes get the file's name in their environment.
`python -m capstan.cluster.local_cluster N` waits until a cluster has N nodes.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capstan.pipeline.errors import CapstanError
from capstan.pipeline.ports import free_port

_START_S = 120.0
_LOOK_EVERY_S = 0.2
_STORE_BYTES = 160 << 20  # shared memory of each node
_LOOPBACK = "127.0.0.1"
_KEEP_TO_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # named after the systems on which it is the default


class Nodes:
    """The nodes of one cluster; a context manager that ends them all. `folder` holds their logs and the token."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.token_file = folder, folder / "token"
        self.port = self.dashboard_port = 0
        self._nodes: list[subprocess.Popen[bytes]] = []
        self.temps: list[str] = []  # Ray's own folders, one per node as on separate machines

    @property
    def address(self) -> str:
        """The URL of the dashboard, to which Ray Jobs are sent."""
        return f"http://{_LOOPBACK}:{self.dashboard_port}"

    def driver_env(self) -> dict[str, str]:
        """Return the environment variables with which a process joins the cluster."""
        return self.auth_env() | {"RAY_ADDRESS": f"{_LOOPBACK}:{self.port}", _KEEP_TO_LOOPBACK: "0"}

    def auth_env(self) -> dict[str, str]:
        """Return the environment variables that every process of the cluster and every client needs."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_file), "RAY_USAGE_STATS_ENABLED": "0"}

    def start_head(self, *, cpus: int = 0, env: Mapping[str, str] | None = None) -> None:
        """Start the head: by default it runs drivers and job servers, and no work."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.token_file.touch(mode=0o600)
        self.token_file.write_text(secrets.token_hex(32))
        self.port, self.dashboard_port = free_port(), free_port()
        options = [f"--port={self.port}", f"--dashboard-host={_LOOPBACK}", f"--dashboard-port={self.dashboard_port}"]
        options += ["--head", f"--num-cpus={cpus}", f"--ray-client-server-port={free_port()}"]
        self._start(options, env or {})

    def start_worker(
        self,
        *,
        cpus: int = 1,
        gpus: int = 0,
        labels: Mapping[str, str] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Add a worker node, wait until it has joined, and return its process, for `kill`."""
        options = [f"--address={_LOOPBACK}:{self.port}", f"--num-cpus={cpus}", f"--num-gpus={gpus}"]
        if labels:
            options.append("--labels=" + ",".join(f"{name}={value}" for name, value in labels.items()))
        return self._start(options, env or {})

    def _start(self, options: list[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-m",
            "capstan.cluster.local_cluster",
            "start",
            "--block",
            f"--node-ip-address={_LOOPBACK}",
        ]
        command += ["--min-worker-port=0", "--max-worker-port=0", f"--dashboard-agent-listen-port={free_port()}"]
        command += [f"--object-store-memory={_STORE_BYTES}", "--include-log-monitor=false", "--disable-usage-stats"]
        name = f"node-{len(self.temps)}"
        self.temps.append(
            tempfile.mkdtemp(prefix="capstan-ray-")
        )  # short: paths of sockets have at most 107 characters
        everything = os.environ | self.auth_env() | dict(env)
        with (self.folder / f"{name}.log").open("ab") as log:
            node = subprocess.Popen(
                [*command, f"--node-name={name}", f"--temp-dir={self.temps[-1]}", *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={key: value for key, value in everything.items() if key not in ("RAY_ADDRESS", _KEEP_TO_LOOPBACK)},
                start_new_session=True,
            )
        self._nodes.append(node)
        self._wait_for(name, node)
        return node

    def alive(self) -> list[dict[str, Any]]:
        """Return the head's description of each live node; an empty list while it does not answer."""
        request = urllib.request.Request(f"{self.address}/nodes?view=summary")
        request.add_header("Authorization", f"Bearer {self.token_file.read_text()}")
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                nodes = json.load(response)["data"]["summary"]
        except (OSError, ValueError, KeyError):
            return []
        return [node for node in nodes if node["raylet"].get("state") == "ALIVE"]

    def _wait_for(self, name: str, node: subprocess.Popen[bytes]) -> None:
        """Wait until the node `name` is alive. Raises CapstanError if that takes too long or the process ends."""
        started = time.monotonic()
        while name not in (known["raylet"].get("nodeName") for known in self.alive()):
            if node.poll() is not None or time.monotonic() - started > _START_S:
                log = self.folder / f"{name}.log"
                raise CapstanError(f"a Ray node did not start; see {log}: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(_LOOK_EVERY_S)

    def pids(self) -> list[int]:
        """Return the ids of all processes of the cluster."""
        return [pid for node in self._nodes for pid in _tree(node.pid)]

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """Kill a node and everything that runs on it at once, as when its machine is lost."""
        for pid in _tree(node.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        node.wait()
        self._nodes.remove(node)

    def close(self) -> None:
        """End all nodes, the head last."""
        for node in reversed(list(self._nodes)):
            self.kill(node)
        for temp in self.temps:
            shutil.rmtree(temp, ignore_errors=True)

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _tree(root: int) -> list[int]:
    """Return the ids of a process and all its descendants, the root first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    tree = [root]
    for pid in tree:
        tree += children.get(pid, [])
    return tree


def _ray_start(options: list[str]) -> None:
    """Run `ray start` so that all its servers listen on loopback.

    Ray has no option for that with several nodes: it replaces 127.0.0.1 by the machine's address, and the variable that
    keeps its processes on loopback makes its command refuse a second node.
    """
    from ray._private import services
    from ray.scripts import scripts

    services.resolve_ip_for_localhost = lambda host: host
    os.environ[_KEEP_TO_LOOPBACK] = "0"  # read by the processes that are started from here
    scripts.cli(["start", *options])


def _wait_until_joined(count: int, patience_s: float = 600.0) -> int:
    """Wait until the cluster of RAY_ADDRESS has `count` nodes, and return an exit code."""
    import ray

    ray.init(log_to_driver=False, logging_level="ERROR")
    started = time.monotonic()
    while (seen := sum(node["Alive"] for node in ray.nodes())) < count:
        if time.monotonic() - started > patience_s:
            print(f"error: {seen} of {count} Ray nodes joined in {patience_s:.0f} s", file=sys.stderr)
            return 1
        time.sleep(1)
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "start":
        _ray_start(sys.argv[2:])
    else:
        sys.exit(_wait_until_joined(int(sys.argv[1])))
