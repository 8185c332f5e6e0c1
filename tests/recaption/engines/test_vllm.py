"""Servers that Capstan starts: with a small model of random weights, by `transformers serve`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import vision_models
from chat_server import jpeg

from capstan.pipeline.config import Recipe, Resources
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage import Storage
from capstan.recaption import job, store
from capstan.recaption.config import RecaptionConfig
from capstan.recaption.engines import CaptionEngine, Request, TextEngine, make, watched_process
from capstan.recaption.engines.local_server import LocalServer, serve_command
from capstan.recaption.engines.vllm import VllmEngine

IMAGES = [jpeg(n) for n in range(3)]
REQUESTS = [Request(f"image {n}", ("short", "descriptive"), f"text {n}") for n in range(3)]


def config(model: Any, **section: Any) -> RecaptionConfig:
    options = {"max_tokens": 6, "max_side": None, "device": "cpu", **section}
    return RecaptionConfig.model_validate({"engine": "vllm", "model": str(model), **options})


def until(condition: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def serving(model: Path) -> list[psutil.Process]:
    """The processes that serve the model."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = process.info["cmdline"] or []
        if str(model) in line and "serve" in line and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def servers(model: Path) -> list[psutil.Process]:
    return [process for process in serving(model) if "watched_process" not in " ".join(process.cmdline())]


@pytest.mark.integration
def test_a_server_is_started_used_started_again_and_ended(tmp_path: Path) -> None:
    """What it writes is what the transformers engine writes, also after it was killed."""
    folder = vision_models.llava(tmp_path / "llava")
    made = make(config(folder))
    assert isinstance(made, VllmEngine)
    assert isinstance(made, CaptionEngine)
    assert isinstance(made, TextEngine)
    made.client.server = made.client.server.model_copy(update={"retries": 1})
    try:
        first = made.caption(IMAGES, REQUESTS)
        (server,) = servers(folder)
        server.send_signal(signal.SIGKILL)
        server.wait(120)
        assert made.caption(IMAGES, REQUESTS) == first
        assert len(servers(folder)) == 1
        assert 0 < made.write(["describe the red circle"], seeds=[1], max_tokens=4)[0].tokens <= 4
    finally:
        made.close()
    assert not serving(folder)
    local = make(config(folder, engine="transformers"))
    expected = local.caption([local.prepare(data) for data in IMAGES], REQUESTS)
    assert [{slot: c.raw for slot, c in row.items()} for row in first] == [
        {slot: c.raw for slot, c in row.items()} for row in expected
    ]


@pytest.mark.integration
def test_a_layer_by_servers_of_ray_actors(build: Callable[..., Storage], tmp_path: Path) -> None:
    """On Ray: the servers end with the job."""
    folder = vision_models.llava(tmp_path / "llava")
    storage = build([[0, 1, 2], [3]])
    section = {"engine": {"kind": "vllm", "model": str(folder), "replicas": 1}, "max_tokens": 6, "lint": {"retries": 0}}
    recipe = Recipe.model_validate(
        {"dataset": storage.url, "resources": {"cpus": 1, "gpus": 0}, "recaption": section | {"slots": ["short"]}}
    )
    summary = job.recaption(recipe, progress=False)
    assert (summary["new"], summary["failed"]) == (4, 0)
    rows = store.read_rows(storage, summary["layer"], "shard-000000").to_pylist()
    assert all(row["raw"] and row["tokens"] for row in rows)
    until(lambda: not serving(folder))


def gone(process_id: int) -> bool:
    try:
        return psutil.Process(process_id).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def sleeper() -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Starts a process that starts a watched one, whose id it prints, and waits."""
    code = (
        "import subprocess, sys, time;"
        f"command = [sys.executable, '-I', {str(watched_process.__file__)!r}, sys.executable, '-c',"
        " 'import os, time; print(os.getpid(), flush=True); time.sleep(100)'];"
        "process = subprocess.Popen(command, stdin=subprocess.PIPE); time.sleep(100)"
    )
    running: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        running.append(subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.wait()


def test_a_watched_process_ends_with_its_parent_however_that_ends(sleeper: Any) -> None:
    parent = sleeper()
    child = int(parent.stdout.readline())
    assert psutil.pid_exists(child)
    os.kill(parent.pid, signal.SIGKILL)
    until(lambda: gone(child))


def test_a_watched_process_ends_with_its_watcher(sleeper: Any) -> None:
    """Ray kills what its workers started, and so the watcher first."""
    child = int(sleeper().stdout.readline())
    watcher = psutil.Process(child).ppid()
    os.kill(watcher, signal.SIGKILL)
    until(lambda: gone(child))


def test_a_server_that_does_not_start_is_the_users_to_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the end of its log, without control characters."""
    code = "import sys; print('no such model \\x1b[2J'); sys.exit(1)"
    monkeypatch.setattr("capstan.recaption.engines.local_server.serve_command", lambda *_: [sys.executable, "-c", code])
    problem = r"recaption\.vllm: the server of x ended; the end of its log: no such model"
    with pytest.raises(RecipeError, match=problem) as caught:
        LocalServer(config("x")).ensure()
    assert "\x1b" not in str(caught.value)
    code = "import time; time.sleep(60)"
    with pytest.raises(RecipeError, match="took more than start_s"):
        LocalServer(config("x", vllm={"start_s": 0.5})).ensure()


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = ["serve", "org/model", "--device", "cpu", "--host", "127.0.0.1", "--port", "1234"]
    assert serve_command(config("org/model"), 1234)[-8:] == served
    chosen = config("org/model", vllm={"serve": "vllm"})
    with pytest.raises(RecipeError, match=r"recaption\.vllm\.serve: the package vllm is not installed"):
        serve_command(chosen, 1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    chosen = config(
        "org/model",
        pretrained="v2",
        precision="bf16",
        vllm={"serve": "vllm", "tensor_parallel": 2, "max_model_len": 4096},
    )
    options = " ".join(serve_command(chosen, 1))
    for option in ("--model org/model", "--tensor-parallel-size 2", "--revision v2", "--dtype bfloat16"):
        assert option in options
    assert "--max-model-len 4096" in options
    assert options.endswith("--host 127.0.0.1 --port 1")


def test_what_is_part_of_a_layers_id() -> None:
    base = make(config("org/model")).describe()
    for same in ({"vllm": {"replicas": 4}}, {"vllm": {"start_s": 9}}, {"batch": 5}, {"server": {"concurrency": 2}}):
        assert make(config("org/model", **same)).describe() == base, same
    for change in (
        {"vllm": {"serve": "vllm"}},
        {"vllm": {"max_model_len": 512}},
        {"pretrained": "v2"},
        {"precision": "bf16"},
        {"server": {"extra": {"top_k": 1}}},
        {"system": "x"},
    ):
        assert make(config("org/model", **change)).describe() != base, change


def test_recipes() -> None:
    section = {"engine": {"kind": "vllm", "model": "org/model", "replicas": "auto", "tensor_parallel": 2}}
    made = RecaptionConfig.model_validate(section)
    assert (made.engine, made.model, made.vllm.tensor_parallel) == ("vllm", "org/model", 2)
    for wrong, problem in (
        ({"engine": "vllm", "model": "m", "server": {"url": "http://x/v1"}}, "server.url"),
        ({"engine": {"kind": "vllm", "model": "m"}, "model": "n"}, "model is set twice"),
        ({"engine": {"kind": "coca", "replicas": 2}}, "replicas applies only to kind vllm"),
        ({"engine": {"kind": "vllm", "replica": 2}}, "replica"),
        ({"engine": "vllm", "model": "m", "decoding": {"method": "beam"}}, "beam"),
    ):
        with pytest.raises(ValueError, match=problem):
            RecaptionConfig.model_validate(wrong)


@pytest.mark.parametrize(
    ("gpus", "each", "replicas", "servers"), [(0, 1, "auto", 1), (8, 1, "auto", 8), (8, 4, "auto", 2), (8, 2, 3, 3)]
)
def test_how_many_servers(gpus: int, each: int, replicas: Any, servers: int) -> None:
    chosen = config("m", vllm={"tensor_parallel": each, "replicas": replicas})
    assert job._servers(chosen, Resources(gpus=gpus)) == servers


def test_too_few_gpus_for_a_server_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"tensor_parallel: needs 4 GPUs per server, and 2 are there"):
        job._servers(config("m", vllm={"tensor_parallel": 4}), Resources(gpus=2))
