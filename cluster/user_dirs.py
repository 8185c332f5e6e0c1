"""Where Capstan keeps what belongs to a user and to no dataset: settings, and notes of what was submitted."""

from __future__ import annotations

import os
from pathlib import Path


def config_folder() -> Path:
    """The user's settings: $XDG_CONFIG_HOME/capstan, or ~/.config/capstan."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "capstan"


def state_folder() -> Path:
    """Notes of jobs: $CAPSTAN_STATE, or $XDG_STATE_HOME/capstan, or ~/.local/state/capstan."""
    if named := os.environ.get("CAPSTAN_STATE"):
        return Path(named)
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "capstan"
