"""A dataset → report.html: the funnel, why rows failed, and some of what each step kept and dropped.

Pictures are shown only of what was kept: rejected pixels are not published with the dataset.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from pipeline import page
from pipeline.records import DUPLICATE, FAILED, REJECTED
from pipeline.shards import Dataset

_SHOWN: Final = 12
_EXAMPLES: Final = 3  # captions shown for a reason


def write_report(dataset: Dataset) -> str:
    """Publish report.html in the dataset's folder; gives its address."""
    made = page.Page("Dataset", f"{dataset.storage.url}: {dataset.manifest.counts.get('kept', 0):,} pictures")
    made.section("Funnel", funnel(dataset))
    made.section("Why rows were left out", reasons(dataset))
    made.section("Some of what was kept", page.cards(samples(dataset, _SHOWN)))
    dataset.storage.write("report.html", made.html().encode())
    return f"{dataset.storage.url}/report.html"


def funnel(dataset: Dataset) -> str:
    """Rows left after each step, as bars."""
    steps = dataset.manifest.funnel
    return page.bars([(step["step"], step["left"], f"−{step['lost']:,}" if step["lost"] else "") for step in steps])


def reasons(dataset: Dataset) -> str:
    """Outcome and reason of the rows that were not kept, with examples."""
    ledger = dataset.ledger(["outcome", "reason", "caption"])
    counted, examples = Counter[tuple[str, str]](), dict[tuple[str, str], list[str]]()
    for outcome, reason, caption in zip(*(ledger[name].to_pylist() for name in ledger.column_names), strict=True):
        if outcome in (REJECTED, DUPLICATE, FAILED):
            counted[outcome, reason] += 1
            shown = examples.setdefault((outcome, reason), [])
            if len(shown) < _EXAMPLES:
                shown.append(caption)
    rows = [[*kind, count, " · ".join(examples[kind])] for kind, count in counted.most_common()]
    return page.table(["outcome", "reason", "rows", "captions, for example"], rows) if rows else page.paragraph("None.")


def samples(dataset: Dataset, count: int) -> list[tuple[bytes, dict[str, str]]]:
    """The first pictures in key order – a random sample, since keys are hashes – with their captions."""
    found: list[tuple[bytes, dict[str, str]]] = []
    for shard in dataset.shard_names:
        captions = dataset.table(shard, ["caption"])["caption"].to_pylist()[: count - len(found)]
        images = dataset.read_images(shard, range(len(captions)))
        found += [(jpeg, {"caption": text}) for (_, jpeg), text in zip(images, captions, strict=True)]
        if len(found) >= count:
            break
    return found
