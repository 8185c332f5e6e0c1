"""Notes on damaged files, by which the next build knows what to rebuild

state/damaged/<name>.json    {file, problem}: written by whoever finds the damage, removed once it is repaired
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Final
from urllib.parse import quote, unquote

from capstan.pipeline.errors import DamagedFile
from capstan.pipeline.storage import Storage

_FOLDER: Final = "state/damaged"


def note_damage(storage: Storage, name: str, problem: str) -> None:
    """Note that the file `name` is not what was written."""
    storage.write(_note(name), json.dumps({"file": name, "problem": problem}).encode())


def note_error(storage: Storage, error: DamagedFile) -> None:
    """Note the file that an error names, if it is a file of this dataset."""
    if error.file.startswith(f"{storage.url}/"):
        note_damage(storage, error.file.removeprefix(f"{storage.url}/"), error.problem)


def noted_damage(storage: Storage) -> set[str]:
    """Return the names of the files that were found damaged."""
    return {unquote(note.removeprefix(f"{_FOLDER}/").removesuffix(".json")) for note in storage.names(_FOLDER)}


def forget_damage(storage: Storage, names: Iterable[str]) -> None:
    """Remove the notes on these files, which are repaired or no longer used."""
    storage.delete(*map(_note, names))


def _note(name: str) -> str:
    return f"{_FOLDER}/{quote(name, safe='')}.json"
