"""`capstan doctor`: looks at the machine, a recipe and a target before they are needed; every finding with its mend."""

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


def examine(recipe: Path | None = None, target: Target | None = None, overrides: Sequence[str] = ()) -> list[Finding]:
    """Everything that doctor looks at, in the order in which a run would need it."""
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
        return None  # the recipe's own finding says so


def show(findings: list[Finding]) -> None:
    """One line a finding on stderr; the mend below what is not well."""
    for finding in findings:
        print(f"{'ok  ' if finding.ok else 'FIX '} {finding.name}: {finding.seen}", file=sys.stderr)
        if not finding.ok:
            print(f"       → {finding.hint}", file=sys.stderr)
