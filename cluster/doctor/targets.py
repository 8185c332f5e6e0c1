"""Checks of a target of clusters.yaml: commands, connection, token, clock, Ray's version"""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from capstan.cluster.doctor.clock_skew import clock_against
from capstan.cluster.doctor.finding import Finding
from capstan.cluster.targets.aws import Aws
from capstan.cluster.targets.base import Target
from capstan.cluster.targets.kuberay import KubeRay
from capstan.cluster.targets.ray_jobs import RayJobs
from capstan.cluster.targets.slurm import Slurm
from capstan.pipeline.errors import CapstanError

_TOOLS: Final[dict[type[Target], tuple[str, ...]]] = {
    KubeRay: ("kubectl",),
    Slurm: ("sbatch", "squeue", "scancel"),
    Aws: ("ssh", "rsync"),
}


def target_findings(target: Target) -> Iterator[Finding]:
    """Check what a submit to `target` needs."""
    for tool in _TOOLS.get(type(target), ()):
        found = shutil.which(tool)
        yield Finding(f"{target.name}: {tool}", found is not None, found or "not on the PATH", f"install {tool}")
    if isinstance(target, RayJobs):
        yield from _ray(target)
    if isinstance(target, Slurm):
        folder = Path(target.folder)
        hint = "create it, on a disk that all nodes share"
        yield Finding(f"{target.name}: folder", folder.is_dir(), str(folder), hint)
    if isinstance(target, KubeRay):
        yield same_ray(target.name, target.ray_version or importlib.metadata.version("ray"))


def _ray(target: RayJobs) -> Iterator[Finding]:
    try:
        theirs = target.version()
    except CapstanError as error:
        yield Finding(
            f"{target.name}: cluster", False, str(error).partition(". Fix: ")[0], str(error).partition("Fix: ")[2]
        )
        return
    yield Finding(f"{target.name}: cluster", True, f"{target.address} answers and accepts the token")
    yield same_ray(target.name, theirs)
    if (clock := clock_against(f"{target.address}/api/version", f"{target.name}: clock")) is not None:
        yield clock


def same_ray(name: str, theirs: str) -> Finding:
    """Compare the cluster's version of Ray with this one: client and cluster must be the same."""
    ours = importlib.metadata.version("ray")
    hint = f"run `pip install ray=={theirs}` here, or install {ours} there"
    return Finding(f"{name}: Ray's version", ours == theirs, f"{theirs} there, {ours} here", hint)
