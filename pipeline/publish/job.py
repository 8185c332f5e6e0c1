"""Publish a dataset: check everything, see what is there, send what differs, show it at the end"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

from capstan.pipeline.dataset.shards import MANIFEST, Manifest, manifest_bytes
from capstan.pipeline.progress import Progress
from capstan.pipeline.publish import card
from capstan.pipeline.publish.contents import PublishedFile, Wishes, are_fetched, check_layers, contents, ready
from capstan.pipeline.storage import Storage

log = logging.getLogger(__name__)

_LISTED: Final = 50  # files that --dry-run lists


class Destination(Protocol):
    """Where a copy goes. `url` is its page, or ""."""

    url: str

    def check(self, source: Storage) -> None: ...

    def card(self) -> str: ...

    def has(self, source: Storage, file: PublishedFile) -> bool: ...

    def stale(self, wanted: Sequence[PublishedFile]) -> list[str]: ...

    def write(
        self,
        source: Storage,
        files: Sequence[PublishedFile],
        send: Sequence[PublishedFile],
        stale: Sequence[str],
        sent: Callable[[PublishedFile], None],
    ) -> dict[str, Any]: ...


def publish(
    source: Storage,
    destination: Destination,
    dest: str,
    *,
    layers: Sequence[str] = (),
    ledger: bool = False,
    contact: str = "",
    dry_run: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Publish the dataset at `source` and return a summary; `dest` is the destination as the user wrote it.

    What is there with the same sum is not sent again. A reader sees the copy whole or not at all. Raises RecipeError
    for what the user can fix, and DamagedFile if a file of the dataset is not what was written.
    """
    manifest = ready(source)
    wanted = check_layers(source, layers)
    destination.check(source)
    name = dest.rstrip("/").rpartition("/")[2].partition("@")[0]
    wishes = Wishes(name, destination.url, contact, wanted, ledger, are_fetched(source, manifest))
    published, files = contents(source, manifest, wishes)
    text = card.card(published, wishes, _slots(source, wanted), destination.card())
    files += [PublishedFile.of(card.NAME, text.encode()), PublishedFile.of(MANIFEST, manifest_bytes(published))]
    with Progress("compare", len(files), unit="files", enabled=progress) as bar:
        send = []
        for file in files:
            if not destination.has(source, file):
                send.append(file)
            bar.advance()
    stale = destination.stale(files)
    summary = _summary(source, dest, published, files, send, stale)
    if dry_run:
        listed = [{"file": file.name, "bytes": file.size} for file in send[:_LISTED]]
        return {**summary, "would_send": listed, "would_remove": stale[:_LISTED], "dry_run": True}
    if not contact and not destination.url:
        log.warning("publish: the card names nobody to ask for removal; set --contact")
    if not send and not stale:
        return summary
    with Progress("publish", len(send), unit="files", enabled=progress) as bar:
        more = destination.write(source, files, send, stale, lambda file: bar.advance(counts={"bytes": file.size}))
    return {**summary, **more}


def _summary(
    source: Storage,
    dest: str,
    published: Manifest,
    files: Sequence[PublishedFile],
    send: Sequence[PublishedFile],
    stale: Sequence[str],
) -> dict[str, Any]:
    return {
        "dataset": source.url,
        "published": dest,
        "samples": sum(entry.samples for entry in published.shards),
        "files": len(files),
        "bytes": sum(file.size for file in files),
        "sent": len(send),
        "sent_bytes": sum(file.size for file in send),
        "unchanged": len(files) - len(send),
        "removed": len(stale),
    }


def _slots(storage: Storage, layers: Sequence[str]) -> Mapping[str, Sequence[str]]:
    """Return the slots of each layer."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        recipe = json.loads(storage.read(f"captions/{layer}/recipe.json"))
        found[layer] = [str(slot) for slot in recipe.get("slots", [])]
    return found
