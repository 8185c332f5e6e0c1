"""Markers and leases of a dataset → what is being done to it now: units, rates, failures so far, what is staged

Nothing is locked and nothing is written. Rates come from the markers that appear between looks.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from capstan.pipeline.dataset.shards import Manifest, read_manifest
from capstan.pipeline.lease import writers
from capstan.pipeline.source.plan import read_plan
from capstan.pipeline.storage import Storage
from capstan.pipeline.units.markers import Facts, MarkerLog

WINDOW_S: Final = 300.0
_TITLES: Final = {"ingest": "Ingest", "score": "Score", "ledger": "Ledger", "pack": "Pack", "recaption": "Captions"}
_SAMPLES: Final = ("rows", "scored", "images", "samples")  # names under which jobs count what a unit holds
_PLANNED: Final = ("ingest", "score", "ledger")  # jobs with the plan's units; captions have a unit per shard
_REASONS: Final = 20


@dataclass(frozen=True)
class Stage:
    """A job's progress. `total` is None if it is not known; rates are None until something was seen to be done."""

    job: str
    title: str
    done: int
    total: int | None
    samples: int
    failed: dict[str, int]
    quarantined: dict[str, str]
    units_per_minute: float | None
    samples_per_s: float | None
    left_s: float | None


@dataclass
class _Seen:
    """What earlier looks found of a job: its units' markers, and (time, units, samples) within the window."""

    facts: dict[str, Facts] = field(default_factory=dict)
    moments: deque[tuple[float, int, int]] = field(default_factory=deque)


class Running:
    """Looks at one dataset, again and again. Only new markers are read."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._seen: dict[str, _Seen] = {}
        self.manifest: Manifest | None = None  # as the latest look found it

    def look(self, now: float | None = None) -> dict[str, Any]:
        """Return {writers, stages, staged, finished}; `now` is a monotonic time."""
        now = time.monotonic() if now is None else now
        manifest, planned = read_manifest(self._storage), read_plan(self._storage)
        self.manifest = manifest
        totals: dict[str, int] = dict.fromkeys(_PLANNED, len(planned.units))
        totals |= {"recaption": len(manifest.shards)} if manifest else {}
        folders = sorted({name.split("/")[1] for name in self._storage.names("state") if name.count("/") > 1})
        kinds = {job: job.partition("-")[0] for job in folders}
        stages = [
            self._stage(job, kind, totals.get(kind) or None, now) for job, kind in kinds.items() if kind in _TITLES
        ]
        order = list(_TITLES.values())
        stages = sorted((s for s in stages if s.done or s.quarantined), key=lambda stage: order.index(stage.title))
        return {
            "writers": [
                {"command": w.command, "host": w.host, "pid": w.pid, "ago_s": max(0.0, time.time() - w.seen)}
                for w in writers(self._storage)
            ],
            "stages": [asdict(stage) for stage in stages],
            "staged": self._staged(planned.rows),
            "finished": _is_finished(manifest),
        }

    def _stage(self, job: str, kind: str, total: int | None, now: float) -> Stage:
        markers, seen = MarkerLog(self._storage, job), self._seen.setdefault(job, _Seen())
        seen.facts = markers.read(seen.facts)
        samples = sum(_samples(facts) for facts in seen.facts.values())
        done = len(seen.facts)
        moments = seen.moments
        if moments and (done, samples) < moments[-1][1:]:
            moments.clear()  # begun again
        moments.append((now, done, samples))
        while len(moments) > 2 and moments[1][0] <= now - WINDOW_S:
            moments.popleft()
        seconds, units, rows = (last - first for last, first in zip(moments[-1], moments[0], strict=True))
        pace = units / seconds if seconds > 0 and units else None
        left = (total - done) / pace if pace and total is not None and total >= done else None
        return Stage(
            job=job,
            title=_TITLES[kind],
            done=done,
            total=total if total is None or total >= done else None,
            samples=samples,
            failed=_failed(seen.facts),
            quarantined=dict(list(markers.quarantined().items())[:_REASONS]),
            units_per_minute=None if pace is None else 60 * pace,
            samples_per_s=None if pace is None else rows / seconds,
            left_s=left,
        )

    def _staged(self, planned: int) -> dict[str, int]:
        """Return units and rows staged, those with an image, and the rows planned; of the job that staged most."""
        jobs = [seen.facts for job, seen in self._seen.items() if job.startswith("ingest-")]
        facts = max(jobs, key=len, default={})
        rows = sum(_samples(one) for one in facts.values())
        bad = sum(int(one.get("failed", 0)) for one in facts.values())
        return {"units": len(facts), "rows": rows, "images": rows - bad, "planned": planned}


def _is_finished(manifest: Manifest | None) -> bool:
    return manifest is not None and (manifest.complete or bool(manifest.ledger))


def _samples(facts: Mapping[str, Any]) -> int:
    return next((int(facts[name]) for name in _SAMPLES if isinstance(facts.get(name), int)), 0)


def _failed(units: Mapping[str, Facts]) -> dict[str, int]:
    """Return reason → rows, the most frequent first."""
    counts = Counter[str]()
    for facts in units.values():
        counts.update({name[7:]: int(n) for name, n in facts.items() if name.startswith("failed.") and n})
    return dict(counts.most_common(_REASONS))
