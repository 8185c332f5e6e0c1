"""`capstan select --dry-run` on a large ledger: seconds, CPU, and the memory of all processes together.

`own` is memory without files: arrays of many rows are files on the scratch disk, which the system may drop from memory.

    python benchmarks/selection.py [--rows 10000000] [--work FOLDER]

Writes staged tables, scores and markers as a build leaves them (random keys, hashes and measurements; one row in fifty
repeats another's image), once for each number of rows. Then it selects by conditions alone, with sampling steps, and
with duplicates.

    python benchmarks/selection.py --added 10000 [--rows 1000000]

A second batch of so many rows: CPU seconds until it is known which ledger tables to write, by comparing all rows again,
and by meeting the kept rows of the first batch, whose ledger and runs are written before.
"""

from __future__ import annotations

import argparse
import base64
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml
from measure import measure

from capstan.pipeline import build
from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.shards import LedgerEntry, Manifest, sha256_of
from capstan.pipeline.ingest.job import STAGED_SCHEMA, Ingest
from capstan.pipeline.pack.ledger import WriteLedger
from capstan.pipeline.score import registry
from capstan.pipeline.score.store import file_name, schema
from capstan.pipeline.select import kept_runs
from capstan.pipeline.select.decide import decide
from capstan.pipeline.select.meeting import KeptRows
from capstan.pipeline.storage import Storage, parquet_bytes

ROOT = Path(__file__).resolve().parents[1]
UNIT_ROWS = 10_000
WHERE = [
    {"name": "size", "where": "least(original_width, original_height) >= 200"},
    {"name": "shape", "where": "greatest(width, height) <= 3 * least(width, height)"},
    {"name": "caption", "where": "caption_words >= 5 AND NOT caption_boilerplate"},
    {"name": "sharp", "where": "image_sharpness >= 100"},
]
SAMPLING = [
    {"name": "domains", "at_most": 5000, "per": "domain"},
    {"name": "best", "top": 0.5, "by": "image_entropy"},
]
IN_PROCESSES = {"resources": {"executor": "processes"}}
NO_DUPLICATES = {"exact": False, "perceptual": None}
QUESTIONS: dict[str, dict[str, Any]] = {
    "4 conditions": {"select": WHERE, "dedup": NO_DUPLICATES},
    "and domains, best": {"select": [*WHERE, *SAMPLING], "dedup": NO_DUPLICATES},
    "4 conditions, exact": {"select": WHERE, "dedup": {"exact": True, "perceptual": None}},
    "4 conditions, exact, near": {"select": WHERE, "dedup": {"exact": True, "perceptual": 4}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "capstan-bench-select")
    parser.add_argument("--added", type=int, default=0, metavar="N", help="decide on a second batch of N rows")
    arguments = parser.parse_args()
    if arguments.added:
        added(arguments.work.resolve() / f"{arguments.rows}-{arguments.added}", arguments.rows, arguments.added)
        return
    folder = arguments.work.resolve() / str(arguments.rows)
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        write_ledger(folder / "dataset", arguments.rows)
        (folder / "done").touch()
    print(f"{arguments.rows:,} rows{'':<15}{'seconds':>9}{'CPU s':>8}{'peak GiB':>10}{'own':>7}{'kept':>12}")
    for name, question in QUESTIONS.items():
        recipe = folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(settings(folder / "dataset") | question))
        command = [sys.executable, "-m", "capstan", "select", str(recipe), "--dry-run", "--json"]
        run = measure(command, {"PYTHONPATH": str(ROOT)})
        summary = json.loads(run.output.splitlines()[-1])
        figures = f"{run.wall_s:>9.1f}{run.cpu_s:>8.1f}{run.memory / 2**30:>10.2f}{run.own / 2**30:>7.2f}"
        print(f"  {name:<26}{figures}{summary['counts']['kept']:>12,}", flush=True)
    print(json.dumps(summary["funnel"]))


def settings(dataset: Path) -> dict[str, Any]:
    return {"dataset": str(dataset), "score": {"caption": {}, "image": {}}, "unit": {"rows": UNIT_ROWS}}


def added(folder: Path, rows: int, new: int) -> None:
    """Print the cost of deciding on `new` rows that come to `rows`."""
    shutil.rmtree(folder, ignore_errors=True)
    write_ledger(folder / "dataset", rows, new)
    print(f"{rows:,} rows, and {new:,} new ones{'':<6}{'seconds':>9}{'CPU s':>8}{'new duplicates':>17}", flush=True)
    for name, question in list(QUESTIONS.items())[2:]:
        recipe = Recipe.model_validate(
            settings(folder / "dataset") | question | {"resources": {"executor": "processes"}}
        )
        storage = Storage(recipe.dataset)
        units = build.as_scored(recipe, storage, registry.scorers(recipe), build._found(recipe, storage))
        old = [unit for unit in units if unit.unit.startswith("0000")]
        decisions, job, ledger = decide(recipe, storage, old), WriteLedger(recipe, storage, []), list[LedgerEntry]()
        for unit in job.handed_over(job.units(decisions), decisions):
            ((facts),) = job.prepare(unit)
            ledger.append(LedgerEntry(name=facts["name"], rows=facts["rows"], sha256=facts["sha256"]))
        job.forget()
        manifest = Manifest(ledger=ledger)
        kept_runs.cover(recipe, storage, manifest, old, progress=False)
        found = {}
        for how in ("all compared again", "kept rows met"):
            before, start = time.process_time(), time.perf_counter()
            if how == "kept rows met":
                kept = KeptRows(recipe, storage, manifest, units, progress=False)
                made = decide(recipe, storage, units[len(old) :], earlier=kept)
            else:
                made = decide(recipe, storage, units)
            WriteLedger(recipe, storage, []).units(made)
            figures = f"{time.perf_counter() - start:>9.2f}{time.process_time() - before:>8.2f}"
            columns = made.columns(len(made.step) - new, len(made.step))
            found[how] = [columns[name].to_pylist() for name in ("outcome", "reason", "detail")]
            print(f"  {name + ': ' + how:<46}{figures}{found[how][0].count('duplicate'):>17,}", flush=True)
        assert found["all compared again"] == found["kept rows met"]


def write_ledger(dataset: Path, rows: int, new: int = 0) -> None:
    """Write what a build of `rows` rows leaves, except images; and then one of `new` rows."""
    recipe = Recipe.model_validate(settings(dataset))
    storage, scorers = Storage(str(dataset)), registry.scorers(recipe)
    job, random = Ingest(recipe, storage), np.random.default_rng(0)
    batches = [[min(UNIT_ROWS, of - start) for start in range(0, of, UNIT_ROWS)] for of in (rows, new) if of]
    staged: dict[str, Any] = {}
    scored: dict[str, Any] = {}
    for batch, number, count in [(b, n, c) for b, sizes in enumerate(batches) for n, c in enumerate(sizes)]:
        units = len(batches[batch])
        unit = f"{batch:04d}-{number:06d}"
        staged_rows = unit_table(random, unit, number / units, (number + 1) / units, count)
        data = parquet_bytes(staged_rows)
        table = f"staged/{unit}-{sha256_of(data)[:16]}.parquet"
        storage.write(table, data)
        files = {scorer.id: file_name(scorer.id, table) for scorer in scorers}
        for scorer in scorers:
            measures = [measure_column(random, field, count) for field in scorer.columns]
            arrays = [staged_rows["key"], *measures, pa.repeat("", count)]
            storage.write(files[scorer.id], parquet_bytes(pa.table(arrays, schema=schema(scorer))))
        staged[unit] = {"table": table, "tar": f"staged/{unit}.tar", "rows": count, "failed": 0}
        scored[unit] = {"table": table, "files": files, "scored": count, "unscored": 0}
    storage.write(f"state/{job.name}/log.json", json.dumps(staged).encode())
    storage.write("state/score/log.json", json.dumps(scored).encode())
    for batch, sizes in enumerate(batches):
        planned = json.dumps({"batch": batch, "units": sizes}).encode()
        storage.write(f"state/plan/batch-{batch:04d}/batch.json", planned)


def unit_table(random: np.random.Generator, unit: str, low: float, high: float, count: int) -> pa.Table:
    """Return a STAGED_SCHEMA table: rows with keys in [low, high) of their range, sorted."""
    first = np.sort(random.integers(int(low * 2**63), int(high * 2**63), count)).astype(">u8")
    keys = [f"{a:016x}{b:016x}" for a, b in zip(first.tolist(), random.integers(0, 2**62, count).tolist(), strict=True)]
    image = random.integers(0, 2**63, count, dtype=np.uint64)
    image[random.random(count) < 0.02] = random.integers(0, 1000)  # the same image elsewhere
    side = random.integers(100, 2000, (2, count))
    failed = random.random(count) < 0.2
    number = pa.array(random.integers(0, 50_000, count)).cast(pa.string())
    columns: dict[str, Any] = {
        "key": keys,
        "url": pc.binary_join_element_wise("https://images.site-", number, ".org/photos/large/", number, ".jpg", ""),
        "caption": pc.binary_join_element_wise("A photograph of number", number, "on a wooden table", " "),
        "reason": np.where(failed, "timeout", ""),
        "detail": pa.repeat("", count),
        "sha256": ["" if bad else f"{p:016x}" * 4 for p, bad in zip(image.tolist(), failed.tolist(), strict=True)],
        "phash": image,
        "colours": [base64.b64encode(p.to_bytes(8) * 6).decode() for p in image.tolist()],  # equal if the hash is
        "extra": pa.repeat('{"licence":"cc0"}', count),
        "unit": pa.repeat(unit, count),
        "width": side[0] // 2,
        "height": side[1] // 2,
        "original_width": side[0],
        "original_height": side[1],
    }
    zeros = np.zeros(count, np.int64)
    return pa.table([pa.array(columns.get(f.name, zeros)).cast(f.type) for f in STAGED_SCHEMA], schema=STAGED_SCHEMA)


def measure_column(random: np.random.Generator, field: pa.Field, count: int) -> pa.Array:
    if pa.types.is_boolean(field.type):
        return pa.array(random.random(count) < 0.05)
    if pa.types.is_string(field.type):
        return pa.repeat("latin", count)
    if pa.types.is_integer(field.type):
        return pa.array(random.integers(1, 40, count)).cast(field.type)
    return pa.array(random.random(count) * 500).cast(field.type)


if __name__ == "__main__":
    main()
