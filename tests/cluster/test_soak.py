"""All stages on several nodes, with nodes and drivers lost on the way: the bytes are those of an untouched run."""

import subprocess
import sys

import pytest
from repo import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1500)]


def test_what_is_lost_on_the_way_leaves_no_trace(capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "soak.py"),
        "--units",
        "12",
        "--workers",
        "2",
        "--sleep",
        "0.5",
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    with capsys.disabled():
        print(f"\n{done.stdout}")
    assert done.returncode == 0
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == ["build", "score", "recaption", "encode"]
    assert [row[1:3] for row in rows] == [["1", "1"]] * 4, "a node and a driver were lost in every stage"
    assert done.stdout.splitlines()[-1].endswith("of which 0 differ from the untouched run's")
