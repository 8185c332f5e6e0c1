"""`capstan doctor`: machine, recipe and target → findings, each problem with its fix"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from capstan.cluster.doctor.finding import Finding
from capstan.cluster.doctor.machine import cores_memory_disk, extension_locks, open_files, ports
from capstan.cluster.doctor.packages import accelerators, python_and_packages
from capstan.cluster.doctor.recipe import recipe_findings
from capstan.cluster.doctor.targets import target_findings
from capstan.cluster.targets.base import Target
from capstan.pipeline.text.printable import printable


def examine(recipe: Path | None = None, target: Target | None = None, overrides: Sequence[str] = ()) -> list[Finding]:
    """Return all findings, in the order in which a run would need what was checked."""
    findings = [*python_and_packages(), *cores_memory_disk(), *accelerators(), *extension_locks(), *open_files()]
    findings += ports(_metrics_port(recipe, overrides))
    if recipe is not None:
        findings += recipe_findings(recipe, overrides)
    if target is not None:
        findings += target_findings(target)
    return findings


def _metrics_port(recipe: Path | None, overrides: Sequence[str]) -> int | None:
    from capstan.cluster.recipe import load
    from capstan.pipeline.errors import CapstanError

    try:
        return load(recipe, overrides).resources.metrics_port if recipe is not None else None
    except CapstanError:
        return None  # reported by the recipe's own finding


def show(findings: list[Finding]) -> None:
    """Print one line per finding on stderr, and below a problem how to fix it."""
    for finding in findings:
        print(printable(f"{'ok  ' if finding.ok else 'FIX '} {finding.name}: {finding.seen}"), file=sys.stderr)
        if not finding.ok:
            print(printable(f"       → {finding.hint}"), file=sys.stderr)
