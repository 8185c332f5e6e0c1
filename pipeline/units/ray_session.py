"""Ray in this process: started on this machine, quietly and on loopback only, or joined as a cluster"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from capstan.pipeline.config import Resources
from capstan.pipeline.errors import INTERRUPTS, RecipeError

_GIB = 1 << 30
_CORE_LINE = re.compile(rb"\[\d{4}-\d\d-\d\d [\d:,]+ [A-Z] \d+ \d+\] \S+\.cc:\d+:")  # as Ray's C++ core writes them


def start_ray(resources: Resources) -> None:
    """Start Ray in this process, quietly and on loopback only, unless it runs already. RAY_ADDRESS joins a cluster."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # see _without_core_lines
    if not os.environ.get("RAY_ADDRESS"):
        # Ray's only switch that keeps a one-machine Ray off the network (the default on the systems in its name).
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray
    from ray._private import worker

    worker._worker_logs_enabled = False  # else Ray reports dead nodes on stdout, which is for the summary
    if not ray.is_initialized():
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if not os.environ.get("RAY_ADDRESS"):
            _check_free(resources.metrics_port)
            options |= {
                "address": "local",
                "num_cpus": _cpus(resources),
                "num_gpus": resources.gpus,
                "object_store_memory": min(_GIB, max(_GIB // 8, _memory_bytes() // 12)),
                "include_dashboard": False,
                "_metrics_export_port": resources.metrics_port,
            }
            atexit.register(_remove_session, ray)
        with _interrupts_held(), _without_core_lines():
            ray.init(**options)


def _remove_session(ray: Any) -> None:
    """End the Ray that this process started, however far it had come, and remove its folder of logs and sockets."""
    from ray._common.utils import get_default_ray_temp_dir

    ray.shutdown()
    folder = Path(get_default_ray_temp_dir())
    for session in folder.glob(f"session_*_{os.getpid()}"):
        latest = folder / "session_latest"
        with contextlib.suppress(OSError):
            if latest.resolve() == session.resolve():
                latest.unlink()
        shutil.rmtree(session, ignore_errors=True)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Raise KeyboardInterrupt for a signal that interrupts once Ray has started; at once for a second one.

    Ray swallows exceptions at some points of its start, and would replace the handler of SIGTERM by one that ends the
    process before it could save.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    from ray._private import utils

    held = list[int]()

    def hold(number: int, _: object) -> None:
        held.append(number)
        if len(held) > 1:
            raise KeyboardInterrupt

    left = (None, signal.SIG_IGN)
    before = {number: signal.signal(number, hold) for number in INTERRUPTS if signal.getsignal(number) not in left}
    set_by_ray, utils.set_sigterm_handler = utils.set_sigterm_handler, lambda _: None
    try:
        yield
    except Exception as error:  # a terminal that is closed ends Ray's processes as well
        if held:
            raise KeyboardInterrupt from error
        raise
    finally:
        utils.set_sigterm_handler = set_by_ray
        for number, handler in before.items():
            signal.signal(number, handler)
    if held:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _without_core_lines() -> Iterator[None]:
    """Hold stderr back while Ray starts, and drop the lines of its C++ core.

    The core writes to the file descriptor, past Python. A log level of fatal silences it but for one line, which says
    that the level was set.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            for line in held:
                if not _CORE_LINE.match(line):
                    os.write(2, line)


def _check_free(port: int | None) -> None:
    """Raise RecipeError if the port is taken. Ray would start without its exporter and not report it."""
    if port is not None:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                problem = f"cannot listen on port {port} ({error.strerror})"
                raise RecipeError("resources.metrics_port", problem, "set a free port") from None


def count_nodes() -> int:
    """Return how many nodes the cluster has: those with a GPU, if any has."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    return len([node for node in alive if node["Resources"].get("GPU")] or alive)


def _cpus(resources: Resources) -> int:
    return resources.cpus or len(os.sched_getaffinity(0))


def _memory_bytes() -> int:
    """Return the memory of this machine, or of this container if that is less."""
    from ray._common.utils import get_system_memory

    return int(get_system_memory())
