"""The cost of each layer between a command and its work, by stage: wall-clock seconds.

    plain           capstan STAGE recipe.yaml
    local           capstan submit --wait                       a process of its own, watched
    local-cluster   capstan submit --to local-cluster --wait    Ray Jobs, a head and a worker node, a token

    python benchmarks/submit.py [--scenes 600] [--repeats 3]

The images are drawn, so that nothing waits for a network. The cluster starts before the clock.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

from small_captioner import write_captioner  # noqa: E402

from capstan.cluster.local_cluster import Nodes  # noqa: E402

STAGES = ["build", "recaption", "train"]
LAYERS = {
    "plain": [],
    "local": ["submit", "--wait", "--"],
    "local-cluster": ["submit", "--to", "local-cluster", "--wait", "--"],
}


def recipe(folder: Path, name: str, captioner: Path, scenes: int) -> Path:
    content: dict[str, Any] = {
        "dataset": str(folder / name / "ds"),
        "source": {"format": "world", "world": {"scenes": scenes, "size": 64, "defects": False}},
        "image": {"size": 32, "min_size": 24},
        "unit": {"rows": 50},
        "shards": {"samples": 50},
        "resources": {"cpus": 2},
        "recaption": {"model": str(captioner), "batch": 16},
        "train": {
            "model": "recording:RecordingFamily",
            "run": str(folder / name / "run"),
            "steps": 100,
            "batch": 16,
            "engine": {"strategy": "ddp", "workers": 2, "threads": 1},
        },
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def seconds(command: list[str], env: dict[str, str]) -> float:
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "capstan", *command], env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command} ended with {done.returncode}: {done.stderr[-3000:]}")
    return time.monotonic() - started


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--scenes", type=int, default=600)
    options.add_argument("--repeats", type=int, default=3)
    chosen = options.parse_args()
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")])
    with tempfile.TemporaryDirectory() as name, Nodes(Path(name) / "ray") as nodes:
        folder = Path(name)
        env = os.environ | {"PYTHONPATH": paths, "CAPSTAN_STATE": str(folder / "state"), "OMP_NUM_THREADS": "1"}
        captioner = write_captioner(folder / "captioner")
        nodes.start_head(env=env)
        nodes.start_worker(cpus=2, env=env)
        target = {"kind": "ray", "address": nodes.address, "token_file": str(nodes.token_file)}
        target |= {"program": f"{sys.executable} -m capstan", "env": {"PYTHONPATH": paths}}
        (folder / "clusters.yaml").write_text(yaml.safe_dump({"local-cluster": target}))
        env["CAPSTAN_CLUSTERS"] = str(folder / "clusters.yaml")
        taken: dict[tuple[str, str], list[float]] = {}
        for repeat in range(chosen.repeats):
            for layer, prefix in LAYERS.items():  # alternating, so that a busy moment does not affect only one of them
                path = recipe(folder, f"{layer}-{repeat}", captioner, chosen.scenes)
                for stage in STAGES:
                    taken.setdefault((stage, layer), []).append(seconds([*prefix, stage, str(path)], env))
    print(f"{'stage':<12}" + "".join(f"{layer:>16}" for layer in LAYERS) + f"{'submit adds':>14}{'cluster adds':>14}")
    for stage in STAGES:
        plain, local, cluster = (statistics.median(taken[stage, layer]) for layer in LAYERS)
        row = "".join(f"{value:>14.1f} s" for value in (plain, local, cluster))
        print(f"{stage:<12}{row}{local - plain:>12.1f} s{cluster - plain:>12.1f} s")


if __name__ == "__main__":
    main()
