"""clusters.yaml → named targets

    lab:   {kind: ray, address: "http://127.0.0.1:8265", token_file: ~/.ray/auth_token}
    night: {kind: slurm, folder: /shared/jobs, nodes: 4, gpus: 8}

The file is the first that exists of --clusters, $CAPSTAN_CLUSTERS, ./clusters.yaml and clusters.yaml in the user's
config folder. A target `local`, this machine, always exists.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capstan.cluster.targets import KINDS
from capstan.cluster.targets.base import Target
from capstan.cluster.user_dirs import config_folder
from capstan.pipeline.config import validate
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.secrets import refuse_assignments, refuse_secrets
from capstan.pipeline.text import safe_yaml

LOCAL = "local"


def read_targets(file: Path | None = None) -> dict[str, Target]:
    """Return all targets by name. Raises RecipeError for any mistake in the file."""
    path = find_file(file)
    raw = _read(path) if path is not None else {}
    targets = {name: make_target(name, settings) for name, settings in raw.items()}
    return {LOCAL: make_target(LOCAL, {"kind": "local"})} | targets


def find_target(name: str, file: Path | None = None) -> Target:
    """Return the target `name`. Raises RecipeError if it does not exist."""
    targets = read_targets(file)
    if name not in targets:
        near = difflib.get_close_matches(name, targets, n=1)
        where = find_file(file) or "no clusters.yaml"
        hint = f"did you mean {near[0]}?" if near else f"{where} has: {', '.join(targets)}"
        raise RecipeError("--to", f"no target {name!r}", hint)
    return targets[name]


def find_file(file: Path | None = None) -> Path | None:
    """Return the path of the clusters.yaml in use, or None."""
    named = file or (Path(os.environ["CAPSTAN_CLUSTERS"]) if os.environ.get("CAPSTAN_CLUSTERS") else None)
    if named is not None:
        return named
    candidates = (Path("clusters.yaml"), config_folder() / "clusters.yaml")
    return next((path for path in candidates if path.is_file()), None)


def make_target(name: str, settings: Any) -> Target:
    """Return the target with these settings. Raises RecipeError for a mistake in them."""
    if not isinstance(settings, Mapping):
        raise RecipeError(name, "must be a mapping of keys to values", "write e.g. {kind: ray, address: ...}")
    kind = settings.get("kind")
    if kind not in KINDS:
        hint = f"use one of {', '.join(KINDS)}"
        raise RecipeError(f"{name}.kind", "is missing" if kind is None else f"{kind!r} is not a kind of target", hint)
    plain = {key: value for key, value in settings.items() if key != "secrets"}  # `secrets` has references only
    refuse_secrets(plain, name)
    refuse_assignments(plain, name)
    target = validate(KINDS[kind], settings, name)
    return target.model_copy(update={"name": name})


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = safe_yaml.parse_file(path)
    except OSError as error:
        raise RecipeError("clusters", f"cannot read {path} ({error.strerror})", "choose a readable file") from None
    except safe_yaml.InvalidYaml as error:
        raise RecipeError("clusters", f"{path} is not valid YAML: {error}", "correct the file") from None
    if not isinstance(raw, dict):
        raise RecipeError("clusters", f"{path} is not a mapping", "write `name: {kind: ..., ...}` lines")
    return raw
