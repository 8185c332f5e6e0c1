"""The user's own folders: settings, and records of submitted jobs"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def config_folder() -> Path:
    """Return the folder of the user's settings: ~/.config/capstan, or as $XDG_CONFIG_HOME says."""
    return platformdirs.user_config_path("capstan")


def state_folder() -> Path:
    """Return the folder of job records: $CAPSTAN_STATE, or ~/.local/state/capstan, or as $XDG_STATE_HOME says."""
    if folder := os.environ.get("CAPSTAN_STATE"):
        return Path(folder)
    return platformdirs.user_state_path("capstan")
