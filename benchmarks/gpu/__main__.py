"""Measure what a GPU can show, in pieces of a few minutes.

    python -m benchmarks.gpu --minutes 8 --json build/gpu.json     (make gpu; again, until nothing is left)
    python -m benchmarks.gpu --list
    python -m benchmarks.gpu --toy --json x.json                   a dry run on a CPU: no figures

Each measurement runs in a process of its own with a time limit, and is written to the JSON file as it ends. The next
call resumes with what is left; failed ones are tried again last. A measurement is started only if its limit fits into
the minutes that are left. Nothing is downloaded: all weights are random, at real shapes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

from benchmarks.gpu.plan import MEASUREMENTS, derived
from benchmarks.gpu.results import DONE, Measurement, Results, Scale, as_data, table

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8, help="of this piece")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "gpu.json", help="the results file")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "gpu", help="datasets and models, kept")
    parser.add_argument("--only", default="", help="measurements whose name contains one of these words, by commas")
    parser.add_argument("--list", action="store_true", help="name the measurements and their limits")
    parser.add_argument("--toy", action="store_true", help="run every code path at toy size, also on a CPU")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    scale = Scale(arguments.toy, arguments.folder.absolute())
    scale.folder.mkdir(parents=True, exist_ok=True)
    chosen = [one for one in MEASUREMENTS if one.in_toy or not arguments.toy]
    chosen = [one for one in chosen if any(word in one.name for word in arguments.only.split(","))]
    if arguments.list:
        print("\n".join(f"{one.budget_s:5.0f} s  {one.name}" for one in chosen))
        return 0
    if arguments.measure:
        (found,) = (one for one in MEASUREMENTS if one.name == arguments.measure)
        arguments.json.write_text(json.dumps(as_data(found.run(scale))))
        return 0
    return piece(arguments, scale, chosen)


def piece(arguments: argparse.Namespace, scale: Scale, chosen: list[Measurement]) -> int:
    """Run the measurements that are left and fit into the minutes; print the table of all."""
    import torch

    if not (scale.toy or torch.cuda.is_available()):
        print("no GPU: torch finds no NVIDIA GPU. Fix: run this on a machine with one, or add --toy", file=sys.stderr)
        return 2
    device = "toy sizes, no figures" if scale.toy else torch.cuda.get_device_name()
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    results = Results(arguments.json, device, {"torch": torch.__version__, "date": today})
    end = time.monotonic() + 60 * arguments.minutes
    for one in sorted(filter(lambda one: results.open(one.name), chosen), key=lambda one: results.tried(one.name)):
        if time.monotonic() + one.budget_s > end and not scale.toy:
            print(f"{one.name}: not started, its limit of {one.budget_s:.0f} s does not fit", file=sys.stderr)
            continue
        print(f"{one.name} …", file=sys.stderr, flush=True)
        start = time.monotonic()
        status, rows, error = here(one, scale) if scale.toy else apart(one, scale)
        results.add(one.name, status, time.monotonic() - start, rows, error)
    names = [one.name for one in chosen]
    if not scale.toy:  # toy sizes on a CPU have no figures to show
        print(table(results, names, derived(results)))
    left = [name for name in names if results.open(name)]
    print(f"{len(left)} of {len(names)} measurements are left" + (": run the same command again" if left else ""))
    return 1 if left and scale.toy else 0


def here(one: Measurement, scale: Scale) -> tuple[str, list[dict], str]:
    """Run a measurement in this process."""
    try:
        return DONE, as_data(one.run(scale)), ""
    except Exception:  # noqa: BLE001 - the others are still to run
        return "failed", [], traceback.format_exc()


def apart(one: Measurement, scale: Scale) -> tuple[str, list[dict], str]:
    """Run a measurement in a process of its own, which returns all of the GPU's memory when it ends."""
    out = scale.folder / "measured.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu", "--measure", one.name]
    command += ["--json", str(out), "--folder", str(scale.folder)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=one.budget_s)
    except subprocess.TimeoutExpired:
        return "out of time", [], f"ended after {one.budget_s:.0f} s"
    if done.returncode or not out.is_file():
        return "failed", [], done.stderr[-4000:] or f"exit code {done.returncode}"
    return DONE, json.loads(out.read_text()), ""


if __name__ == "__main__":
    sys.exit(main())
