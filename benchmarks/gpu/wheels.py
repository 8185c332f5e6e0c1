"""Wheels for a machine that has torch and a GPU, but no network.

    python -m benchmarks.gpu.wheels collect DIR --python 3.12 [--have freeze.txt]     (make gpu-wheels)
    python -m benchmarks.gpu.wheels install DIR SITE                                  (make gpu, on that machine)

Collected are the pinned versions of what training and its tests need, except torch with its CUDA libraries, and except
what --have lists: the output of `pip list --format=freeze` on the machine. Needs nothing but pip.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NEEDED = [".[train]", "psutil", "pytest", "pytest-timeout"]
OWN_TORCH = re.compile(r"(torch|torchvision|triton|nvidia-.*|cuda-.*)$")
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 24, 17, 12, 5)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.wheels", description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=["collect", "install"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("site", type=Path, nargs="?", help="install: the folder to put on PYTHONPATH")
    parser.add_argument("--python", default=f"{sys.version_info[0]}.{sys.version_info[1]}", help="of the other machine")
    parser.add_argument("--have", type=Path, help="what the other machine has, by `pip list --format=freeze`")
    arguments = parser.parse_args()
    if arguments.task == "install":
        install(arguments.folder, arguments.site)
        return
    have = names_in(arguments.have.read_text()) if arguments.have else set()
    collect(arguments.folder, lacking(resolved(), have), arguments.python)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def names_in(freeze: str) -> set[str]:
    """Return the packages of a list with lines such as `numpy==2.4.6`, or `name @ where`."""
    return {normal(line.split("==")[0].split(" @ ")[0].strip()) for line in freeze.splitlines() if line.strip()}


def resolved() -> dict[str, str]:
    """Return package → version of all that is needed, as pip resolves it under constraints.txt."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    command += ["--constraint", "constraints.txt", *NEEDED]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    packages = json.loads(done.stdout[done.stdout.index("{") :])["install"]
    return {normal(package["metadata"]["name"]): package["metadata"]["version"] for package in packages}


def lacking(needed: dict[str, str], have: Collection[str]) -> list[str]:
    """Return the requirements that the other machine lacks; torch is always its own."""
    own = {"capstan-t2i", *have}
    return [f"{name}=={version}" for name, version in sorted(needed.items()) if name not in own and not own_torch(name)]


def own_torch(name: str) -> bool:
    return OWN_TORCH.match(name) is not None


def collect(folder: Path, requirements: list[str], python: str) -> None:
    """Download a wheel for each requirement; build it where there is only a source."""
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip"]
    where = ["--no-deps", "--quiet"]
    platforms = [option for name in PLATFORMS for option in ("--platform", name)]
    target = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", *platforms]
    for requirement in requirements:
        done = subprocess.run([*pip, "download", *where, *target, "--dest", str(folder), requirement])
        if done.returncode:  # DeepSpeed comes as a source; its kernels are compiled where they are needed
            environment = os.environ | {"DS_BUILD_OPS": "0"}
            subprocess.run(
                [*pip, "wheel", *where, "--wheel-dir", str(folder), requirement], env=environment, check=True
            )
    wheels = list(folder.glob("*.whl"))
    print(f"{len(wheels)} wheels, {sum(wheel.stat().st_size for wheel in wheels) / 2**20:.0f} MiB, in {folder}")


def install(folder: Path, site: Path) -> None:
    """Install all wheels of the folder, without a network, next to what the machine has."""
    wheels = sorted(map(str, folder.glob("*.whl")))
    if not wheels:
        raise SystemExit(f"{folder} has no wheels. Fix: run `make gpu-wheels` on a machine with a network, and copy it")
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-compile", "--quiet"]
    subprocess.run([*command, "--upgrade", "--target", str(site), *wheels], check=True)


if __name__ == "__main__":
    main()
