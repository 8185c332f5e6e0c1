"""What a small build costs: wall-clock and CPU seconds and peak memory of all its processes, with and without Ray.

    processes    resources.executor: processes    what `auto` chooses for so few rows
    ray          resources.executor: ray          what every build took before
    again        the same command once more: nothing is left to do

    python benchmarks/startup.py [--scenes 100] [--repeats 3]

The images are drawn, so that nothing waits for a network. Builds take turns; the table has medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml
from measure import Run, measure

EXECUTORS = ["processes", "ray"]
CPUS = 2


def write_recipe(folder: Path, executor: str, scenes: int) -> Path:
    """Write the recipe of a dataset that does not exist yet."""
    path = folder / f"{executor}.yaml"
    recipe = {
        "dataset": str(folder / executor),
        "source": {"format": "world", "world": {"scenes": scenes, "size": 64}},
        "resources": {"cpus": CPUS, "executor": executor},
    }
    path.write_text(yaml.safe_dump(recipe))
    return path


def round_of(scenes: int) -> Iterator[tuple[str, Run]]:
    """Yield name and cost of each build, in new folders."""
    with tempfile.TemporaryDirectory() as folder:
        for executor in EXECUTORS:
            command = [sys.executable, "-m", "capstan", "build", str(write_recipe(Path(folder), executor, scenes))]
            yield executor, measure(command)
            if executor == "processes":
                yield "again", measure(command)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=100, help="drawn images, at most 640,000 (default: 100)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default: 3)")
    arguments = parser.parse_args()
    costs: dict[str, list[Run]] = {}
    for _ in range(arguments.repeats):
        for name, cost in round_of(arguments.scenes):
            costs.setdefault(name, []).append(cost)
    print(f"| {arguments.scenes} drawn rows | wall s | CPU s | peak GiB |\n|---|---|---|---|")
    for name, runs in costs.items():
        wall, cpu = (statistics.median(getattr(run, field) for run in runs) for field in ("wall_s", "cpu_s"))
        print(f"| {name} | {wall:.1f} | {cpu:.1f} | {max(run.memory for run in runs) / 2**30:.2f} |")


if __name__ == "__main__":
    main()
