"""Write requirements.lock: the versions of constraints.txt with the hashes of their files, for the given Pythons.

    python .ci/lock.py python3.11 python3.12 python3.13     (make lock)

Each Python's own pip resolves the project with all extras that constraints.txt covers, for this platform, and reports
the files that it would install. Only names, versions and hashes are kept: no address of a registry.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROJECT = ".[dev,bench,transformers]"
HEADER = """\
# Every package that Capstan and its development need, with the hashes of its files: Linux x86_64, Python {pythons}.
# Written by `make lock`; install with
#
#   pip install --require-hashes --no-deps -r requirements.lock
#   pip install --no-deps --no-build-isolation -e .
"""


def resolve(python: str) -> tuple[str, list[dict[str, Any]]]:
    """Return a Python's version, and what its pip would install."""
    code = "import sys; print('.'.join(map(str, sys.version_info[:2])))"
    version = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    command = [python, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    command += ["--constraint", "constraints.txt", PROJECT]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return version, json.loads(done.stdout[done.stdout.index("{") :])["install"]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def lock(resolved: dict[str, list[dict[str, Any]]]) -> str:
    """Return the text of requirements.lock. Raises ValueError for a file without a hash, or a second version."""
    versions: dict[str, str] = {}
    hashes: dict[str, set[str]] = defaultdict(set)
    pythons: dict[str, set[str]] = defaultdict(set)
    for python, packages in resolved.items():
        for package in packages:
            name, version = normal(package["metadata"]["name"]), package["metadata"]["version"]
            if name == "capstan-t2i":
                continue
            sha256 = package["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256")
            if sha256 is None:
                raise ValueError(f"{name} {version} has no hash: is it installed from a folder?")
            if versions.setdefault(name, version) != version:
                raise ValueError(f"{name} has versions {versions[name]} and {version}: pin it in constraints.txt")
            hashes[name].add(sha256)
            pythons[name].add(python)
    lines = [HEADER.format(pythons=", ".join(sorted(resolved)))]
    for name in sorted(versions):
        marker = ""
        if pythons[name] != set(resolved):
            marker = " ; " + " or ".join(f'python_version == "{python}"' for python in sorted(pythons[name]))
        files = "".join(f" \\\n    --hash=sha256:{value}" for value in sorted(hashes[name]))
        lines.append(f"{name}=={versions[name]}{marker}{files}\n")
    return "".join(lines)


def main(pythons: list[str]) -> None:
    with ThreadPoolExecutor() as pool:
        resolved = dict(pool.map(resolve, pythons))
    (ROOT / "requirements.lock").write_text(lock(resolved), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:] or ["python3.11", "python3.12", "python3.13"])
