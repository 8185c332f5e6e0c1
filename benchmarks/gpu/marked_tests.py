"""The tests that are marked `gpu`, a measurement per file."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.results import Measurement, Row, Scale

ROOT = Path(__file__).resolve().parents[2]
BUDGET_S = {"test_engine_on_gpu": 540.0}  # a process per test
_TOY = "test_clip_model_on_gpu"


def measure(file: Path, scale: Scale) -> list[Row]:
    """Run a file's tests; a dry run collects them. Raises RuntimeError with the failures if there are any."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(file)]
    command += ["--collect-only"] if scale.toy else []
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout[-4000:] + done.stderr[-1000:])
    last = done.stdout.strip().splitlines()[-1]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|skipped|failed|tests? collected)", last)}
    if not scale.toy and not counts.get("passed"):
        raise RuntimeError(f"no test of {file.name} ran: {last}")
    return [Row("tests passed", counts.get("passed", 0), "", facts={"summary": last.strip("= ")})]


MEASUREMENTS = [
    Measurement(
        f"tests {file.stem.removeprefix('test_').removesuffix('_on_gpu')}",
        BUDGET_S.get(file.stem, 300),
        functools.partial(measure, file),
        file.stem == _TOY,
    )
    for file in sorted((ROOT / "tests").rglob("test_*_on_gpu.py"), key=lambda file: file.stem not in BUDGET_S)
]
