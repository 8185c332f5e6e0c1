"""Dataset, finished or not → report.html: one self-contained file under 5 MB

It also shows images that were left out, if they are still staged. Review it before you publish it with a dataset.
"""

from __future__ import annotations

from typing import Final

from capstan.pipeline.errors import CapstanError
from capstan.pipeline.html import page
from capstan.pipeline.report import sections
from capstan.pipeline.report.examples import choose
from capstan.pipeline.report.layer_diffs import comparisons
from capstan.pipeline.report.layers import layers
from capstan.pipeline.report.query import Rows
from capstan.pipeline.report.thumbnails import find_images, thumbnails
from capstan.pipeline.run_history import read_runs
from capstan.pipeline.storage import Storage

REPORT: Final = "report.html"
LIMIT: Final = 5_000_000  # bytes of the whole file
_IMAGES: Final = 3_100_000  # bytes of all images; base64 adds a third, and texts and plots need the rest


def write_report(storage: Storage) -> str:
    """Publish report.html in the dataset's folder and return its path or URL.

    Raises RecipeError if there is neither a dataset nor a started one.
    """
    with Rows(storage) as rows:
        data = report(rows).encode()
    if len(data) > LIMIT:
        raise CapstanError(
            f"the report has {len(data):,} bytes, more than {LIMIT:,}: this is a bug in Capstan, please report it"
        )
    storage.write(REPORT, data)
    return f"{storage.url}/{REPORT}"


def report(rows: Rows) -> str:
    """Return the whole page as HTML."""
    examples = choose(rows)
    thumbs = thumbnails(find_images(rows, examples.shown()), _IMAGES)
    size = sum(entry.bytes for entry in rows.manifest.shards) if rows.manifest else 0
    name = rows.storage.url.rstrip("/").rpartition("/")[2] or rows.storage.url
    notes = [page.note(text) for text in (_state(rows), rows.coverage) if text]
    made = page.Page(name, *notes, sections.key_figures(rows, size))
    if rows.manifest and rows.finished:
        made.section("Funnel", sections.funnel(sections.steps_run(rows.manifest), rows.conditions))
    made.section(
        "What is kept" if rows.finished else "What is staged",
        sections.kept(examples, thumbs),
        sections.takedown_note(rows),
    )
    if examples.steps:
        made.section("What the conditions dropped", *sections.by_step(examples, thumbs, rows))
    made.section("Sizes, captions and scores", *sections.distributions(rows))
    if captioned := layers(rows, examples, thumbs):
        made.section("Caption layers", *captioned)
    if compared := comparisons(rows.storage):
        made.section("Captions compared", *compared)
    if examples.pairs:
        made.section("Duplicates", *sections.duplicates(examples, thumbs, rows))
    if hosts := sections.domains(rows):
        made.section("Hosts", *hosts)
    if rows.manifest and (licensed := sections.licenses(rows.manifest)):
        made.section("Licences", *licensed)
    made.section("Failures", *sections.failures(rows, examples))
    made.section("Throughput", *sections.throughput(read_runs(rows.storage)))
    if rows.manifest:
        made.section("Recipe", sections.recipe(rows))
    return made.html()


def _state(rows: Rows) -> str:
    """Return the dataset's location and whether it is finished."""
    if rows.manifest is None:
        done = f"{rows.count:,} of {rows.planned:,} planned rows have been processed so far"
        return f"{rows.storage.url} is not finished: {done}."
    if not rows.finished:
        return f"{rows.storage.url} is being repacked: rows are undecided until `capstan build` has finished."
    if not rows.manifest.complete:
        return f"{rows.storage.url} is incomplete: some shards could not be packed. Run `capstan build` again."
    return rows.storage.url
