"""A folder or bucket as a destination: the card and dataset.json are written last

If shards of an earlier copy change, a manifest that lists only the unchanged ones comes first, so that a reader never
takes a file for what it is not.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Final

from capstan.pipeline.dataset.croissant import PUBLISHED
from capstan.pipeline.dataset.indexes import hide_indexes
from capstan.pipeline.dataset.shards import MANIFEST, Manifest, read_manifest, write_manifest
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.lease import lease
from capstan.pipeline.publish.card import NAME as CARD
from capstan.pipeline.publish.contents import PublishedFile, fetch
from capstan.pipeline.storage import Storage
from capstan.pipeline.storage.local import scratch

_READ_BYTES: Final = 4 << 20
_STARTED: Final = "state/publish/begun.json"  # written first: marks the folder as a copy that is being written
_OWN: Final = ("shards/", "ledger/", "captions/")  # what a copy may hold besides files at the top

Sent = Callable[[PublishedFile], None]


class Folder:
    """A destination in `storage`."""

    def __init__(self, storage: Storage) -> None:
        self.storage, self.url = storage, ""
        self._before: Manifest | None = None

    def check(self, source: Storage) -> None:
        """Raise RecipeError if the folder cannot be written, or holds something that is not an earlier copy."""
        here, field = self.storage, self.storage.field
        if source.url == here.url or (source.local_path() and source.local_path() == here.local_path()):
            raise RecipeError(field, "is the dataset itself", "choose another folder")
        self._before = read_manifest(here)
        if self._before is not None and PUBLISHED not in self._before.recipe:
            raise RecipeError(field, f"{here.url} holds another dataset", "choose an empty folder")
        if self._before is None and not here.exists(_STARTED):
            other = [name for name in here.names() if name != CARD and not name.startswith((".git", "state/lease"))]
            if other:
                problem = f"{here.url} holds other files, e.g. {other[0]}"
                raise RecipeError(field, problem, "choose an empty folder, or an earlier copy")

    def card(self) -> str:
        """Return the card that is there, or ""."""
        return self.storage.read(CARD).decode("utf-8", "replace") if self.storage.exists(CARD) else ""

    def has(self, source: Storage, file: PublishedFile) -> bool:
        """Return whether the folder has this file with this sum."""
        try:
            if self.storage.size(file.name) != file.size:
                return False
        except FileNotFoundError:
            return False
        digest = hashlib.sha256()
        with contextlib.closing(self.storage.open(file.name)) as there:
            while data := there.read(_READ_BYTES):
                digest.update(data)
        return digest.hexdigest() == file.sha256

    def stale(self, wanted: Sequence[PublishedFile]) -> list[str]:
        """Return the files of an earlier copy that are not in this one."""
        names = {file.name for file in wanted}
        there = [name for folder in _OWN for name in self.storage.names(folder.rstrip("/"))]
        return [name for name in there if name not in names]

    def write(
        self,
        source: Storage,
        files: Sequence[PublishedFile],
        send: Sequence[PublishedFile],
        stale: Sequence[str],
        sent: Sent,
    ) -> dict[str, Any]:
        """Write what differs, dataset.json last. Raises DamagedFile if a file of the dataset is not what it was."""
        self.storage.check_writable()
        if self._before is None:
            self.storage.write(_STARTED, b"{}\n")
        with lease(self.storage, "publish") as held, scratch() as folder:
            if any(name.startswith("shards/") for name in (*stale, *(file.name for file in send))):
                send = [*send, *self._hide(files, send, stale)]
            last = [file for file in send if file.name == MANIFEST]
            for file in (*(file for file in send if file.name != MANIFEST), *last):
                if file.name == MANIFEST:
                    held.check()
                    self.storage.delete(*stale)
                fetch(source, file, folder / "file")
                self.storage.put(folder / "file", file.name)
                sent(file)
            self.storage.delete(_STARTED)
        return {}

    def _hide(
        self, files: Sequence[PublishedFile], send: Sequence[PublishedFile], stale: Sequence[str]
    ) -> list[PublishedFile]:
        """Publish a manifest of the unchanged shards, and remove the indexes; return those to be written again."""
        if self._before is not None:
            changed = {*stale, *(file.name for file in send)}
            kept = [e for e in self._before.shards if not {e.tar, e.table, e.index} & changed]
            write_manifest(self.storage, Manifest(recipe=self._before.recipe, complete=False, shards=kept))
        hide_indexes(self.storage)
        names = {file.name for file in send}
        return [file for file in files if file.name not in names and not self.storage.exists(file.name)]
