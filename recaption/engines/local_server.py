"""A model → an OpenAI-compatible server on loopback, next to the model worker that uses it

`vllm serve` on GPUs, `transformers serve` without one. The server sees the GPUs that Ray gave to its worker, is started
again if it dies, and ends with its worker, however that ends.
"""

from __future__ import annotations

import importlib.util
import logging
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import weakref
from pathlib import Path
from typing import IO, Final

from capstan.pipeline.errors import CapstanError, MissingExtra, RecipeError
from capstan.recaption.config import RecaptionConfig
from capstan.recaption.engines import watched_process

log = logging.getLogger(__name__)

_POLL_S: Final = 0.3
_DYING_S: Final = 2.0
_LOG_SHOWN: Final = 800  # characters of the end of a server's log


class LocalServer:
    """One server process. `ensure` starts it, or starts it again if it has died."""

    def __init__(self, config: RecaptionConfig) -> None:
        self.config, self.starts = config, 0
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the server
        self._url = ""

    def ensure(self) -> str:
        """Return the URL of the running server, up to /v1. Raises RecipeError if it does not start."""
        if not self.is_alive():
            self._start()
        return self._url

    def is_alive(self) -> bool:
        """Return whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def has_died(self) -> bool:
        """Return whether the process has ended, or ends within a moment; for after a connection failed."""
        assert self._process is not None
        try:
            self._process.wait(_DYING_S)
        except subprocess.TimeoutExpired:
            return False
        return True

    def close(self) -> None:
        """End the server and wait for it."""
        if self._process is not None:
            _end(self._process)

    def _start(self) -> None:
        if self.starts:
            log.warning("the server of %s died: starting it again", self.config.model)
        self.starts += 1
        port = _free_port()
        command = serve_command(self.config, port)
        self.close()  # what is left of the last one
        watched = [sys.executable, "-I", str(watched_process.__file__), *command]
        self._process = subprocess.Popen(watched, stdin=subprocess.PIPE, stdout=self._log, stderr=subprocess.STDOUT)
        weakref.finalize(self, _end, self._process)
        self._wait(f"http://127.0.0.1:{port}/health", time.monotonic() + self.config.vllm.start_s)
        self._url = f"http://127.0.0.1:{port}/v1"
        log.info("%s is served at %s", self.config.model, self._url)

    def _wait(self, health: str, deadline: float) -> None:
        """Return when the server is healthy."""
        while True:
            try:
                with urllib.request.urlopen(health, timeout=5) as answer:
                    if answer.status == 200:
                        return
            except OSError:
                pass
            if not self.is_alive() or time.monotonic() > deadline:
                why = "took more than start_s" if self.is_alive() else "ended"
                self.close()
                problem = f"the server of {self.config.model} {why}; the end of its log: {self._log_end()}"
                hint = "correct the model, or on a GPU vllm.max_model_len and vllm.tensor_parallel"
                raise RecipeError("recaption.vllm", problem, hint)
            time.sleep(_POLL_S)

    def _log_end(self) -> str:
        size = self._log.seek(0, 2)
        self._log.seek(max(0, size - _LOG_SHOWN))
        text = self._log.read().decode(errors="replace")
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())


class ServerDied(CapstanError):
    """The server died again on the same requests."""


def serve_command(config: RecaptionConfig, port: int) -> list[str]:
    """Return the command that serves the recipe's model on a port of loopback. Raises MissingExtra."""
    model = str(Path(config.model).absolute()) if Path(config.model).is_dir() else config.model
    where = ["--host", "127.0.0.1", "--port", str(port)]
    if kind_of(config) == "transformers":
        if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("uvicorn") is None:
            raise MissingExtra("recaption.vllm.serve", "transformers[serving]", "transformers")
        device = "cuda" if _has_gpu() and config.device != "cpu" else "cpu"
        code = "from transformers.cli.transformers import main; main()"
        return [sys.executable, "-c", code, "serve", model, "--device", device, *where]
    if importlib.util.find_spec("vllm") is None:
        hint = "pip install vllm on the workers, or set vllm.serve: transformers"
        raise RecipeError("recaption.vllm.serve", "the package vllm is not installed", hint)
    options = ["--tensor-parallel-size", str(config.vllm.tensor_parallel), "--served-model-name", config.model]
    if config.vllm.max_model_len is not None:
        options += ["--max-model-len", str(config.vllm.max_model_len)]
    if config.pretrained is not None:
        options += ["--revision", config.pretrained]
    if config.precision is not None:
        options += ["--dtype", {"bf16": "bfloat16", "fp32": "float32"}[config.precision]]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *options, *where]


def kind_of(config: RecaptionConfig) -> str:
    """Return which server runs here: vllm on a GPU, transformers without one, unless the recipe says."""
    if config.vllm.serve != "auto":
        return config.vllm.serve
    return "vllm" if _has_gpu() and config.device != "cpu" else "transformers"


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a watched process: without its standard input it ends its command."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
