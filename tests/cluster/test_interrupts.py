"""An interrupted command ends with 130 and one line, at whatever moment, and leaves no process and no folder of Ray."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.integration


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Where Ray keeps its session: a short path, since sockets lie below it."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as name:
        yield Path(name)


def start(folder: Path, ray_folder: Path, executor: str) -> subprocess.Popen[str]:
    recipe = {
        "dataset": str(folder / "ds"),
        "source": {"format": "world", "world": {"scenes": 400, "size": 64}},
        "unit": {"rows": 10},
        "resources": {"cpus": 2, "executor": executor},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return subprocess.Popen(
        [sys.executable, "-m", "capstan", "build", str(folder / "recipe.yaml")],
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        | {"RAY_TMPDIR": str(ray_folder)},
        stderr=subprocess.PIPE,
        text=True,
    )


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300  # a bound for hangs
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def processes_naming(text: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended meanwhile
            continue
        found += [line] if text in line else []
    return found


@pytest.mark.parametrize("after_s", [0.0, pytest.param(1.0, marks=pytest.mark.slow)])
def test_sigterm_while_ray_starts(tmp_path: Path, ray_folder: Path, after_s: float) -> None:
    with start(tmp_path, ray_folder, "ray") as process:
        until(lambda: any(ray_folder.glob("ray/session_*")))
        time.sleep(after_s)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=240)
    assert process.returncode == 130
    assert "interrupted: " in err
    assert "Traceback" not in err
    until(lambda: not processes_naming(str(ray_folder)))
    assert not list(ray_folder.glob("ray/session_*"))


@pytest.mark.parametrize("executor", ["ray", "processes"])
def test_a_second_interrupt_while_it_ends(tmp_path: Path, ray_folder: Path, executor: str) -> None:
    with start(tmp_path, ray_folder, executor) as process:
        until(lambda: any(tmp_path.glob("ds/state/ingest-*/done/*.json")))
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=240)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert not list(ray_folder.glob("ray/session_*"))
    until(lambda: not processes_naming(str(ray_folder)))


# A command is interrupted, and again at the n-th line that Python runs after that: each n in a process of its own.
MOMENTS = """
import os, signal, sys
import capstan.cluster.recipe
from capstan.cluster.cli import main

NAMES = ("cli.py", "interrupts.py", "core.py", "main.py", "_main.py")

def at(moment, fired):
    left = moment

    def trace(frame, event, _):
        nonlocal left
        if not frame.f_code.co_filename.endswith(NAMES):
            return None
        left -= 1
        if left == 0:
            os.write(fired, b"x")
            os.kill(os.getpid(), signal.SIGINT)
        return trace

    def schema():
        frame = sys._getframe()
        while frame is not None:
            frame.f_trace = trace
            frame = frame.f_back
        sys.settrace(trace)
        os.kill(os.getpid(), signal.SIGINT)

    capstan.cluster.recipe.schema = schema

moment, codes, more = 0, [], True
while more:
    moment += 1
    read, fired = os.pipe()
    if not (child := os.fork()):
        at(moment, fired)
        sys.argv = ["capstan", "schema"]
        main()
    os.close(fired)
    _, status = os.waitpid(child, 0)
    more = bool(os.read(read, 1))
    os.close(read)
    if status != 130 << 8:
        print(f"moment {moment}: {os.waitstatus_to_exitcode(status)}", file=sys.stderr)
print(moment)
"""


def test_a_second_interrupt_at_any_line_after_the_first() -> None:
    done = subprocess.run([sys.executable, "-c", MOMENTS], capture_output=True, text=True, timeout=1200)
    assert set(done.stderr.split("\n")) == {
        "",
        "interrupted: finished work is kept; run the same command again to resume",
    }, done.stderr
    assert int(done.stdout) > 20


# A finalizer, from which Python lets no exception out.
FINALIZER = """
import os, signal, sys, time
import capstan.cluster.recipe
from capstan.cluster.cli import main

class Slow:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

def schema():
    Slow()
    time.sleep(600)

capstan.cluster.recipe.schema = schema
sys.argv = ["capstan", "schema"]
main()
"""


def test_an_interrupt_in_a_finalizer_is_not_lost() -> None:
    done = subprocess.run([sys.executable, "-c", FINALIZER], capture_output=True, text=True, timeout=240)
    assert done.returncode == 130
    assert done.stderr.strip() == "interrupted: finished work is kept; run the same command again to resume"


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGQUIT])
def test_a_terminal_ends_a_command_and_its_children(
    tmp_path: Path, ray_folder: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    with start(tmp_path, ray_folder, "processes") as process:
        until(lambda: any(tmp_path.glob("ds/state/ingest-*/done/*.json")))
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in (*children, process.pid):  # its end, and Ctrl-\\, reach all of its processes
            os.kill(int(pid), number)
        _, err = process.communicate(timeout=240)
    assert process.returncode == 130, err
    assert "interrupted: " in err
    assert "Traceback" not in err
    assert children
    # That of a worker that was killed meanwhile is removed by the next process that needs one.
    assert not list((tmp_path / "tmp").glob(f"*-{process.pid}-*"))
    until(lambda: not [pid for pid in children if Path(f"/proc/{pid}").exists()])


# A thread of Arrow's waits for a read that never ends, as when a viewer is stopped while it indexes a bucket.
READING = """
import io, sys, threading
import fsspec, pyarrow as pa, pyarrow.dataset as ds
from pyarrow.fs import FSSpecHandler, PyFileSystem

begun = threading.Event()

class Stuck(io.RawIOBase):
    def readable(self): return True
    def seekable(self): return True
    def seek(self, *_): return 1000
    def tell(self): return 1000
    def read(self, *_):
        begun.set()
        threading.Event().wait()

class Handler(FSSpecHandler):
    def open_input_file(self, path): return pa.PythonFile(Stuck(), mode="r")

memory = fsspec.filesystem("memory")
memory.pipe_file("/x.parquet", bytes(1000))
scan = ds.dataset(["/x.parquet"], schema=pa.schema([("a", pa.int64())]), format="parquet",
                  filesystem=PyFileSystem(Handler(memory)))
threading.Thread(target=scan.to_table, daemon=True).start()
assert begun.wait(60)
sys.argv = ["capstan", "--version"]
from capstan.cluster.cli import main
main()
"""


def test_a_command_ends_although_a_read_from_a_bucket_does_not() -> None:
    done = subprocess.run([sys.executable, "-c", READING], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("capstan ")
