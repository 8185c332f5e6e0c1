"""Verification of a dataset: hash every file, walk every tar, compare them all

    verify ─▶ Verify, a job: shards, ledger tables, staged and derived files, batches of the plan
                 │  each unit checks some of them and returns what is wrong (pipeline.pack.verify_shard)
           ─▶ Twice, a job: a range of keys of shards whose keys overlap
           ─▶ counts, sums and indexes, which follow from the manifest and from what the units returned

Nothing is written in the dataset. A small one is verified by threads of this process, others by workers.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

from capstan.pipeline.config import Resources
from capstan.pipeline.dataset import croissant, energon
from capstan.pipeline.dataset.indexes import indexes
from capstan.pipeline.dataset.shards import MANIFEST, Manifest, read_manifest, seal_holds
from capstan.pipeline.errors import CapstanError, DamagedFile, RecipeError
from capstan.pipeline.ingest.job import Staged, staged
from capstan.pipeline.ingest.staging import may_be_freed
from capstan.pipeline.pack.job import unlisted
from capstan.pipeline.pack.verify_derived import derived_files, verify_derived
from capstan.pipeline.pack.verify_job import Checked, repeated_keys, run_checks
from capstan.pipeline.records import FORMAT_VERSION, OUTCOMES
from capstan.pipeline.source.planning.batches import planned_batches
from capstan.pipeline.storage import Storage
from capstan.pipeline.storage.local import scratch
from capstan.pipeline.units import MarkerLog

_READ_BYTES: Final = 4 << 20


def verify(storage: Storage, *, resources: Resources | None = None, progress: bool = False) -> list[str]:
    """Return every problem of the dataset at `storage`, one line each that names the file; [] if there is none.

    Raises RecipeError if there is no dataset, or if a newer Capstan wrote it; CapstanError if a worker kept failing.
    """
    try:
        manifest = read_manifest(storage)
    except RecipeError:
        raise  # a newer Capstan wrote it: no damage
    except CapstanError as error:
        return [f"{MANIFEST}: {error}"]
    if manifest is None:
        raise RecipeError(storage.field, f"no dataset at {storage.url}", "name a folder that holds a dataset.json")
    if manifest.format_version < FORMAT_VERSION:
        return [f"{MANIFEST}: format {manifest.format_version} is too old for this version: run `capstan build` again"]
    problems = [] if manifest.complete else [f"{MANIFEST}: incomplete: run `capstan build` again"]
    problems += [f"{name}: a link, and links inside a dataset are not followed" for name in storage.links()]
    if not seal_holds(storage.read(MANIFEST)):
        problems.append(f"{MANIFEST}: does not match its own seal: damaged, or edited by hand")
    return problems + _problems(storage, manifest, resources or Resources(), progress)


def _problems(storage: Storage, manifest: Manifest, resources: Resources, progress: bool) -> list[str]:
    """Return the problems of all files that the manifest, the markers and the plan name."""
    # a published copy may be without the ledger
    has_ledger = manifest.complete and (manifest.recipe.get(croissant.PUBLISHED) or {}).get("ledger", True)
    files, unread = _staged_files(storage) if manifest.complete else ([], [])
    present = set(storage.names("staged")) if files else set()
    work: dict[str, list[Any]] = {
        "shard": [entry.model_dump() for entry in manifest.shards],
        "ledger": [entry.model_dump() for entry in manifest.ledger] if has_ledger else [],
        "staged": [name for name in files if name in present],
        "batch": planned_batches(storage),
        "derived": derived_files(storage),
    }
    with scratch() as folder:
        state = Storage(str(folder))
        found = run_checks(storage, state, manifest, work, resources, progress)
        problems = _lines(found["shard"])
        if manifest.complete:
            problems += repeated_keys(storage, state, manifest, found["shard"], resources, progress)
    if manifest.complete:
        sums = _shard_sums(manifest, found["shard"])
        problems += _ledger(manifest, found["ledger"], sums) if has_ledger else []
        problems += _indexes(storage, manifest, tables_are_whole=sums is not None)
        problems += [f"{name}: not listed in {MANIFEST}" for name in unlisted(storage, manifest)]
        staged_problems = dict(zip(work["staged"], (one.problems for one in found["staged"]), strict=True))
        problems += [*unread, *_staged(storage, files, staged_problems)]
    problems += _lines(found["batch"])
    return problems + verify_derived(storage, manifest, _lines(found["derived"]))


def _lines(found: list[Checked]) -> list[str]:
    return [problem for one in found for problem in one.problems]


def _staged_files(storage: Storage) -> tuple[list[str], list[str]]:
    """Return the staged files that markers name, sorted, and the problems of markers that cannot be read."""
    jobs = {name.split("/")[1] for name in storage.names("state") if name.startswith("state/ingest-")}
    units, problems = list[Staged](), list[str]()
    for job in sorted(jobs):
        try:
            units += staged(MarkerLog(storage, job).read()).values()
        except DamagedFile as error:
            problems.append(str(error))
    return sorted({unit.table for unit in units} | {unit.tar for unit in units if unit.tar}), problems


def _staged(storage: Storage, files: list[str], found: dict[str, list[str]]) -> Iterator[str]:
    """Yield the problems of staged files; tars of a dataset that frees them may be missing."""
    freed = may_be_freed(storage)
    for name in files:
        if name in found:
            yield from found[name]
        elif not (freed and name.endswith(".tar")):
            yield f"{name}: missing"


def _shard_sums(manifest: Manifest, found: list[Checked]) -> Counter[str] | None:
    """Return shard → sum of its keys; None if a shard does not have the samples that the manifest lists."""
    if any(one.rows != entry.samples for one, entry in zip(found, manifest.shards, strict=True)):
        return None
    return Counter({entry.name: one.sums[entry.name] for one, entry in zip(found, manifest.shards, strict=True)})


def _ledger(manifest: Manifest, found: list[Checked], shards: Counter[str] | None) -> list[str]:
    """Return the problems of the ledger's tables and counts, and where ledger and shards differ."""
    outcomes, sums = Counter[str](), Counter[str]()
    for one in found:
        outcomes.update(one.outcomes)
        sums.update(one.sums)
    if problems := _lines(found):
        return problems
    for outcome in OUTCOMES:
        if outcomes[outcome] != manifest.counts.get(outcome, 0):
            listed = manifest.counts.get(outcome, 0)
            problems.append(f"ledger: {outcomes[outcome]} rows {outcome}, {MANIFEST} says {listed}")
    if shards is not None:
        wrong = sorted(name for name in sums.keys() | shards.keys() if sums[name] != shards[name])
        problems += [f"ledger: the rows kept in {name or 'no shard'} are not those of its table" for name in wrong]
    return problems


def _indexes(storage: Storage, manifest: Manifest, *, tables_are_whole: bool) -> Iterator[str]:
    """Yield the problems of every index: its sum, and differences from the shards."""
    expected = indexes(manifest)
    if croissant.NAME not in manifest.indexes:  # of a version that did not write it
        expected.pop(croissant.NAME, None)
    for name in sorted(expected.keys() | manifest.indexes.keys()):
        if not storage.exists(name):
            yield f"{name}: missing"
        elif name == energon.INDEX:
            yield from _sqlite(storage, manifest, compare=tables_are_whole)
        elif storage.read(name) != expected.get(name):
            yield f"{name}: does not match {MANIFEST}"


def _sqlite(storage: Storage, manifest: Manifest, *, compare: bool) -> Iterator[str]:
    name = energon.INDEX
    with scratch() as folder:
        path = storage.local_path(name)
        copy = None if path else folder / "index.sqlite"
        with contextlib.closing(storage.open(name)) as file, contextlib.ExitStack() as stack:
            target = stack.enter_context(copy.open("wb")) if copy else None
            digest = hashlib.sha256()
            while data := file.read(_READ_BYTES):
                digest.update(data)
                if target:
                    target.write(data)
        if digest.hexdigest() != manifest.indexes.get(name):
            yield f"{name}: its SHA-256 is not the one in {MANIFEST}"
        elif compare and (at := path or copy) and not energon.sqlite_agrees(at, storage, manifest.shards):
            yield f"{name}: does not match the shards' tables"
