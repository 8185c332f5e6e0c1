"""Sections of the report: rows and examples → HTML blocks"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any, Final

from capstan.pipeline.dataset.shards import Manifest
from capstan.pipeline.html import page, plots
from capstan.pipeline.html.axes import short
from capstan.pipeline.html.page import Cell, Html, percent
from capstan.pipeline.records import DUPLICATE, FAILED, KEPT, REJECTED
from capstan.pipeline.report.examples import CONTAMINATED, Examples, Step
from capstan.pipeline.report.histograms import histograms, subjects
from capstan.pipeline.report.query import SAMPLE, STAGED, Row, Rows, recipe_text
from capstan.pipeline.report.thumbnails import why_missing
from capstan.pipeline.run_history import Run

_CAPTION: Final = 140  # characters shown of a caption
_DETAIL: Final = 110  # characters shown of a URL, and of a fetch error
_DOMAINS: Final = 20
_LICENSES: Final = 40
_RUNS: Final = 12
_RECIPE: Final = 20_000  # characters

# Failure reason → its meaning, for readers who want to know what to do about it.
_MEANING: Final = {
    "bad_url": "not a URL that can be fetched",
    "private_address": "the host is in a private network (fetch.allow_private)",
    "dns": "the host name is unknown",
    "connect": "the host refused the connection",
    "tls": "the host's certificate is not valid",
    "timeout": "not finished within fetch.timeout_s",
    "redirects": "redirected too often, or without a target",
    "robots": "disallowed by robots.txt",
    "noai": "the site or the file opts out of AI training (fetch.robots, fetch.noai)",
    "too_large_bytes": "larger than fetch.max_bytes",
    "empty": "no bytes",
    "not_an_image": "not an image, often an HTML page",
    "unsupported": "an unsupported format",
    "truncated": "the file ends early",
    "corrupt": "damaged, or its checksum does not match",
    "too_many_pixels": "more than image.max_pixels",
    "too_small": "the shorter side is below image.min_size",
    "bad_caption": "the caption is not text",
    "read_error": "the source could not be read",
    "no_video": "neither a video nor, with cut.sound: only, a sound",
    "no_sound": "a video without sound, and cut.sound is only",
    "too_long": "longer than cut.max_seconds or cut.max_frames",
    "no_clip": "no piece is as long as cut.seconds asks",
}

# Kind of duplicate → its meaning, if the name does not say it.
_KINDS: Final = {
    "perceptual": "They look the same (dedup.perceptual).",
    "copies": "One is an edited copy of the other (dedup.copies).",
    "semantic": "Their embeddings are near (dedup.semantic).",
    CONTAMINATED: "They repeat images of the evaluation set (dedup.decontaminate), which are not shown.",
}

# Step of the funnel → the key of `dedup` that turns it off.
_SEARCHES: Final = {"exact duplicates": "exact", "near duplicates": "perceptual", "semantic duplicates": "semantic"}

Thumbs = Mapping[str, bytes]


def key_figures(rows: Rows, size: int) -> Html:
    """Return the main counts; `size` is the total of all tars in bytes."""
    total = rows.count
    if not rows.finished:
        staged = rows.having(STAGED)
        shares = {"Rows planned": f"{rows.planned:,}", "Processed": f"{total:,}", "Staged": f"{staged:,}"}
        return page.figures(shares | {"Failed": percent(rows.having(FAILED), total)})
    counts = {"Rows": f"{total:,}", "Kept": f"{rows.having(KEPT):,}"}
    names = {"Rejected": REJECTED, "Duplicates": DUPLICATE, "Failed": FAILED}
    counts |= {name: percent(rows.having(outcome), total) for name, outcome in names.items()}
    shards = len(rows.manifest.shards) if rows.manifest else 0
    return page.figures(counts | {"Shards": f"{shards:,}", "Size": _bytes(size)})


def steps_run(manifest: Manifest) -> list[dict[str, Any]]:
    """Return the steps of the manifest's funnel without the searches for duplicates that its recipe turns off."""
    dedup = manifest.recipe.get("dedup") or {}
    off = {step for step, key in _SEARCHES.items() if key in dedup and dedup[key] in (None, False)}
    return [step for step in manifest.funnel if step["step"] not in off or step["lost"]]


def takedown_note(rows: Rows) -> Html:
    """Return how an image that is seen here is removed."""
    command = f"capstan remove {shlex.quote(rows.storage.url)} --keys FILE"
    return page.note(f"Below each image is its key. To remove images, write their keys into a file: {command}")


def funnel(steps: list[dict[str, Any]], conditions: Mapping[str, str]) -> Html:
    """Return the manifest's funnel: rows left after each step, and lost by it."""
    shown = [(str(s["step"]), page.clip(conditions.get(s["step"], ""), 300), s["left"], s["lost"]) for s in steps]
    return plots.steps(shown) if shown else page.paragraph("No rows.")


def kept(examples: Examples, thumbs: Thumbs) -> Html:
    """Return a gallery of kept rows."""
    if not examples.kept:
        return page.paragraph("Nothing is kept.")
    return page.gallery(_card(examples, key, thumbs) for key in examples.kept)


def by_step(examples: Examples, thumbs: Thumbs, rows: Rows) -> list[Html]:
    """Return, per condition, a gallery of rows that it dropped and of rows that it passed."""
    blocks: list[Html] = []
    for step in examples.steps:
        lost = rows.outcomes.get((REJECTED, step.name), 0)
        blocks.append(page.heading(step.name, page.clip(rows.conditions.get(step.name, ""), 300)))
        where = " nearest to the threshold" if step.threshold else ""
        share = percent(lost, rows.count)
        blocks.append(page.note(f"Dropped {lost:,} rows ({share} of all); those{where or ' with the first keys'}:"))
        blocks.append(page.gallery(_stepped(step, key, examples, thumbs) for key in step.dropped))
        if step.passed:
            blocks.append(page.note(f"Kept, those{where}:" if where else "Kept, for comparison:"))
            blocks.append(page.gallery(_stepped(step, key, examples, thumbs) for key in step.passed))
    return blocks


def distributions(rows: Rows) -> list[Html]:
    """Return the histograms, with thresholds."""
    drawn, notes = histograms(rows, subjects(rows))
    if not drawn:
        return [page.paragraph("No row has an image that could be measured.")]
    words = ("kept", "left out, or a duplicate") if rows.finished else ("kept", "staged, not yet decided")
    about = "Rows with an image. Dashed lines are thresholds of the recipe's conditions, which reject what is shaded. "
    return [
        page.note(about + _sample_note(rows)),
        plots.legend(*words),
        page.grid(map(plots.histogram, drawn)),
        *([page.note(" · ".join(notes))] if notes else []),
    ]


def duplicates(examples: Examples, thumbs: Thumbs, rows: Rows) -> list[Html]:
    """Return dropped images next to the ones that were kept instead."""
    blocks: list[Html] = []
    for kind, dropped in examples.pairs.items():
        count = rows.outcomes[DUPLICATE, kind]
        blocks += [page.heading(f"{kind}: {count:,}"), *([page.note(_KINDS[kind])] if kind in _KINDS else [])]
        blocks.append(page.gallery((_pair(examples.rows[key], examples, thumbs) for key in dropped), wide=True))
    return blocks


def domains(rows: Rows) -> list[Html]:
    """Return the hosts with most rows, and the share that is kept; [] if rows have no URL."""
    host = "lower(split_part(split_part(split_part(split_part(url, '://', 2), '/', 1), '?', 1), '@', -1))"
    query = f"""
        SELECT left(host, 80), count(*) AS n,
               count(*) FILTER (outcome = '{KEPT}'), count(*) FILTER (outcome = '{FAILED}')
        FROM (SELECT {host} AS host, outcome FROM rows WHERE {rows.sample})
        WHERE host <> '' GROUP BY host ORDER BY n DESC, host LIMIT {_DOMAINS}
    """
    found = rows.query(query)
    if not found:
        return []
    most = found[0][1]
    table = [
        [name, n, k, percent(k, n), percent(f, n), Cell(plots.bar((k / most, "kept"), ((n - k) / most, "lost")))]
        for name, n, k, f in found
    ]
    note = page.note(f"The {_DOMAINS} hosts with most rows. {_sample_note(rows)}")
    return [
        note,
        plots.legend("kept", "not kept"),
        page.table(["host", "rows", "kept", "share kept", "failed", ""], table),
    ]


def licenses(manifest: Manifest) -> list[Html]:
    """Return the licences of the kept rows; [] if the recipe does not name the source's."""
    total = sum(manifest.licenses.values())
    listed = list(manifest.licenses.items())[:_LICENSES]
    table = [
        [name, count, percent(count, total), Cell(plots.bar((count / max(1, listed[0][1]), "kept")))]
        for name, count in listed
    ]
    if not table:
        return []
    left = len(manifest.licenses) - len(listed)
    about = "SPDX license expressions. NOASSERTION: the source says nothing. LicenseRef-…: it says something else."
    more = [page.note(f"And {left:,} more.")] if left else []
    return [page.note(about), page.table(["licence", "kept rows", "share", ""], table), *more]


def failures(rows: Rows, examples: Examples) -> list[Html]:
    """Return the failure reasons with counts, meanings and examples."""
    reasons = {reason: count for (outcome, reason), count in rows.outcomes.items() if outcome == FAILED}
    if not reasons:
        return [page.paragraph("No row failed.")]
    table = []
    for reason, listed in examples.failed.items():
        row = examples.rows[listed[0]]
        texts = (page.clip(row.url, _DETAIL), page.clip(row.detail, _DETAIL))
        count = reasons[reason]
        example = " · ".join(text for text in texts if text)
        table.append([reason, count, percent(count, rows.count), _meaning(reason), example])
    blocks = [page.table(["reason", "rows", "of all rows", "meaning", "example"], table)]
    if left := len(reasons) - len(table):
        blocks.append(page.note(f"And {left:,} more reasons."))
    return [
        *blocks,
        page.note("To retry rows with transient failures: capstan build RECIPE --retry timeout,http_503"),
    ]


def throughput(runs: list[Run]) -> list[Html]:
    """Return the duration of the latest runs, by stage."""
    if not runs:
        return [page.paragraph("No timed run has finished yet.")]
    stages = list(dict.fromkeys(stage for run in runs for stage in run.seconds))
    table = []
    for run in reversed(runs[-_RUNS:]):
        ingest = run.seconds.get("ingest", 0.0)
        rate = round(run.rows / ingest) if run.rows and ingest else None
        seconds = [run.seconds.get(stage) for stage in stages]
        ended = run.ended.strftime("%Y-%m-%d %H:%M")
        table.append([ended, run.command, run.rows, rate, *seconds])
    header = ["ended (UTC)", "command", "rows ingested", "rows/s", *(f"{stage}, s" for stage in stages)]
    remark = "Finished runs, the latest first. Interrupted runs are not listed."
    return [page.note(remark), page.table(header, table)]


def recipe(rows: Rows) -> Html:
    """Return the manifest's recipe, collapsed."""
    text = recipe_text(rows.manifest)
    return page.details("The recipe stored in the manifest", text[:_RECIPE])


# Parts ----------------------------------------------------------------------------------------------------------------


def _sample_note(rows: Rows) -> str:
    return f"Counted over a random sample of about {SAMPLE:,} rows." if rows.sampled else ""


def _image(row: Row, thumbs: Thumbs) -> Html:
    return page.frame(thumbs.get(row.key), page.clip(row.caption, _CAPTION), why_missing(row))


def _card(examples: Examples, key: str, thumbs: Thumbs, *facts: str) -> Html:
    row = examples.rows[key]
    shown = page.clip(row.caption, _CAPTION)
    why = ": ".join(text for text in (row.outcome, row.reason) if text) if row.outcome not in (KEPT, STAGED) else ""
    return page.card(_image(row, thumbs), shown, *facts, _extent(row, examples), why, key=row.key)


def _stepped(step: Step, key: str, examples: Examples, thumbs: Thumbs) -> Html:
    number = examples.values.get((step.name, key))
    return _card(examples, key, thumbs, "" if number is None else f"value {short(number)}")


def _pair(dropped: Row, examples: Examples, thumbs: Thumbs) -> Html:
    kept_row = examples.rows.get(dropped.detail) if dropped.reason != CONTAMINATED else None
    right = (_image(dropped, thumbs), "dropped")
    if kept_row is None:
        word = "evaluation image" if dropped.reason == CONTAMINATED else "kept"
        left = (page.frame(None, "", page.clip(dropped.detail, _DETAIL) or "not in this dataset"), word)
        return page.pair(left, right, page.clip(dropped.caption, _CAPTION), keys=[dropped.key])
    bits = (dropped.phash ^ kept_row.phash).bit_count()
    apart = "the same file" if dropped.reason == "exact" else f"hashes {bits} of 64 bits apart"
    sizes = " · ".join([" | ".join(dict.fromkeys(_extent(row, examples) for row in (kept_row, dropped))), apart])
    captions = [page.clip(row.caption, _CAPTION) for row in (kept_row, dropped)]
    texts = captions[:1] if captions[0] == captions[1] else [f"kept: {captions[0]}", f"dropped: {captions[1]}"]
    word = "kept" if kept_row.is_shown else kept_row.reason  # a row that was taken down holds its place
    return page.pair((_image(kept_row, thumbs), word), right, *texts, sizes, keys=[kept_row.key, dropped.key])


def _extent(row: Row, examples: Examples) -> str:
    """Return the size of an image, with its length that of a clip, and the length of a sound alone."""
    size = f"{row.original_width} × {row.original_height}" if row.original_width else ""
    if row.key not in examples.clips:
        return size
    seconds, codec = examples.clips[row.key]
    length = f"{seconds:.1f} s"
    return length if codec == "none" else f"{size} · {length}"


def _meaning(reason: str) -> str:
    if reason.startswith("http_"):
        return f"the server answered {reason[5:]}"
    return _MEANING.get(reason, "")


def _bytes(size: int) -> str:
    """
    >>> _bytes(0), _bytes(3_400_000)
    ('0 B', '3.4 MB')
    """
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= limit:
            return f"{size / limit:.3g} {unit}"
    return f"{size} B"
