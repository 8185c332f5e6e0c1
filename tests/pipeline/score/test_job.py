"""Scoring end to end, on images in a table: columns in the ledger, pinned and incremental; nothing is rebuilt."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import cloudpickle
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from onnx_file import write_colour_descriptor
from PIL import Image, ImageOps

from capstan.pipeline import build
from capstan.pipeline.config import Recipe, Resources
from capstan.pipeline.dataset.shards import Dataset, sha256_of
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.ingest.job import Ingest, staged
from capstan.pipeline.pack.verify import verify
from capstan.pipeline.score import registry
from capstan.pipeline.score.job import ScoreJob, scored
from capstan.pipeline.score.scorer import Sample, SampleScorer, Values
from capstan.pipeline.score.store import embeddings
from capstan.pipeline.storage import Storage
from capstan.pipeline.units import Unit

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import test modules

Make = Callable[..., Recipe]


@pytest.fixture
def make(tmp_path: Path, clip: Path, draw: Callable[[int], bytes], two_cpus: Resources) -> Make:
    """Return a recipe over `count` images, every tenth of them unreadable; `score` as given."""

    def recipe(count: int, score: dict[str, Any], **sections: Any) -> Recipe:
        images = [b"no image" if n % 10 == 9 else draw(n) for n in range(count)]
        captions = [f"image {n}" for n in range(count)]
        pq.write_table(pa.table({"image": images, "caption": captions}), tmp_path / "rows.parquet")
        settings = {
            "dataset": str(tmp_path / "dataset"),
            "source": {"path": str(tmp_path / "rows.parquet"), "image": "image"},
            "image": {"size": 64},
            "dedup": {"exact": True, "perceptual": None},
            "unit": {"rows": 8},
            "shards": {"samples": 10},
            "score": score,
        }
        return Recipe.model_validate(settings | sections)

    return recipe


def tars(folder: Path) -> dict[str, tuple[int, str]]:
    """Return name → (modification time, checksum) of every shard."""
    files = sorted((folder / "shards").glob("*.tar"))
    return {file.name: (file.stat().st_mtime_ns, sha256_of(file.read_bytes())) for file in files}


def tables(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for part in ("ledger", "shards") for p in (folder / part).glob("*.parquet")}


@pytest.mark.integration
def test_a_build_scores_what_it_stages_and_conditions_see_it(
    make: Make, tmp_path: Path, clip: Path, linear_head: Path
) -> None:
    score = {
        "clip": {"model": str(clip), "embeddings": True, "batch": 16},
        "aesthetic": {"weights": str(linear_head)},
        "caption": {},
        "image": {},
    }
    where = [{"name": "match", "where": "clip_score IS NOT NULL AND caption_words = 2 AND image_entropy > 1"}]
    recipe = make(30, score, select=where)
    summary = build.build(recipe, progress=False)
    assert summary["counts"] == {"rows": 30, "kept": 27, "rejected": 0, "duplicate": 0, "failed": 3, "shards": 3}
    assert verify(Storage(recipe.dataset)) == []

    ledger = Dataset(Storage(recipe.dataset)).ledger()
    names = [f.name for fields in registry.columns(recipe).values() for f in fields]
    assert ledger.column_names[-len(names) - 1 :] == [*names, "score_error"]
    for row in ledger.to_pylist():
        assert (row["outcome"] == "kept") == (row["clip_score"] is not None) == (row["aesthetic_score"] is not None)
        assert row["score_error"] == ""
    shard = Dataset(Storage(recipe.dataset)).table("shard-000000")
    of_ledger = {row["key"]: row["clip_score"] for row in ledger.to_pylist()}
    assert shard["clip_score"].to_pylist() == [of_ledger[key] for key in shard["key"].to_pylist()]

    # Pinned: the metadata of ledger and shards name the scorers, and the embeddings are those that were scored.
    pins = json.loads(pq.read_schema(next((tmp_path / "dataset" / "ledger").iterdir())).metadata[b"capstan.scores"])
    assert [pin["name"] for pin in pins] == ["clip", "aesthetic", "caption", "image"]
    assert list(pins[1]["weights"].values()) == [sha256_of(linear_head.read_bytes())]
    assert pins[0]["model"]["weights"] == sha256_of((clip / "open_clip_model.safetensors").read_bytes())
    storage, scorers = Storage(recipe.dataset), registry.scorers(recipe)
    units = list(staged(Ingest(recipe, storage).markers.read()).values())
    units = sorted(scored(ScoreJob(storage, scorers, 5, recipe.resources), scorers, units), key=lambda unit: unit.unit)
    vectors = embeddings(storage, units).astype(np.float32)
    length = np.linalg.norm(vectors, axis=1)
    assert length.tolist() == pytest.approx([float(r != "failed") for r in ledger["outcome"].to_pylist()], abs=1e-2)

    # Running it again does nothing; on one thread it writes the same bytes.
    before = tables(tmp_path / "dataset")
    files = {name: storage.read(name) for name in storage.names("scores")}
    storage.delete(*storage.names("scores"), *storage.names("state/score"))
    build.score(make(30, score, select=where, resources={"cpus": 1}), progress=False)
    assert {name: storage.read(name) for name in storage.names("scores")} == files
    assert tables(tmp_path / "dataset") == before


@pytest.mark.integration
def test_scorers_are_added_later_without_rebuilding(
    make: Make, tmp_path: Path, clip: Path, other_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = make(30, {})
    build.build(plain, progress=False)
    folder = tmp_path / "dataset"
    first, old = tars(folder), tables(folder)
    ingested = Path(folder / "staged").stat().st_mtime_ns
    measured = make(30, {"caption": {}})
    with pytest.raises(RecipeError, match=r"score.caption: 30 rows have not been scored.*capstan score"):
        build.select(measured, dry_run=True, progress=False)
    build.score(measured, progress=False)
    assert tars(folder) == first  # not even written again
    assert (folder / "staged").stat().st_mtime_ns == ingested
    assert verify(Storage(str(folder))) == []
    assert set(Dataset(Storage(str(folder))).ledger()["caption_words"].to_pylist()) == {2, None}

    # Another model writes other files; returning to the first model finds its files.
    score = {"caption": {}, "clip": {"model": str(clip)}}
    build.score(make(30, score), progress=False)
    with_clip = tables(folder)
    build.score(make(30, score | {"clip": {"model": str(other_clip)}}), progress=False)
    assert tables(folder) != with_clip
    assert len(list((folder / "scores").iterdir())) == 3
    monkeypatch.setattr(ScoreJob, "commit", lambda *_: pytest.fail("scored again"))
    build.score(make(30, score), progress=False)
    assert tables(folder) == with_clip
    build.build(plain, progress=False)
    assert tables(folder) == old
    assert tars(folder) == first
    assert verify(Storage(str(folder))) == []


@pytest.mark.integration
def test_new_rows_are_scored_and_no_others(make: Make, tmp_path: Path, draw: Callable[[int], bytes]) -> None:
    build.build(make(16, {"image": {}}), progress=False)
    storage = Storage(str(tmp_path / "dataset"))
    before = {name: storage.read(name) for name in storage.names("scores")}
    summary = build.build(make(24, {"image": {}}), progress=False)
    assert summary["counts"]["kept"] == 22
    after = {name: storage.read(name) for name in storage.names("scores")}
    assert before.items() <= after.items()
    assert len(after) == len(before) + 1
    assert Dataset(storage).ledger()["image_entropy"].null_count == 2


def test_a_bad_image_is_a_null_with_a_reason(
    storage: Storage, draw: Callable[[int], bytes], clip: Path, tmp_path: Path
) -> None:
    """In process: a staged JPEG that cannot be decoded, and one that was freed."""
    from capstan.pipeline.dataset.shards import Sample as Packed
    from capstan.pipeline.dataset.shards import write_tar
    from capstan.pipeline.ingest.job import STAGED_SCHEMA

    rows = [dict.fromkeys(STAGED_SCHEMA.names, "") for _ in range(4)]
    spans = write_tar(tmp_path / "x.tar", [Packed(f"k{n}", data) for n, data in enumerate([draw(1), b"\xff\xd8 cut"])])
    storage.put(tmp_path / "x.tar", "staged/u.tar")
    for number, row in enumerate(rows):
        numbers = {f.name: 0 for f in STAGED_SCHEMA if not pa.types.is_string(f.type)}
        offset, size = spans[number] if number < 2 else (0, 0)
        row |= {"key": f"k{number}", "caption": "a cat", **numbers, "offset": offset, "size": size, "crc32": None}
    rows[3]["reason"] = "timeout"
    storage.write_table("staged/u.parquet", pa.Table.from_pylist(rows, STAGED_SCHEMA))
    recipe = Recipe.model_validate(
        {"dataset": storage.url, "score": {"clip": {"model": str(clip)}, "caption": {}, "image": {}}}
    )
    scorers = registry.scorers(recipe)
    from capstan.pipeline.score.job import ModelScoreJob

    work = ModelScoreJob(storage, scorers, 2, recipe.resources)
    spec = {
        "table": "staged/u.parquet",
        "tar": "staged/u.tar",
        "missing": [s.id for s in scorers],
        "have": {},
        "before": {},
    }
    unit = Unit("u", spec)
    apply = work.model()
    facts = work.commit(unit, [apply(piece) for piece in work.prepare(unit)])
    assert (facts["scored"], facts["unscored"]) == (4, 2)
    of_clip, of_caption, of_image = (storage.read_table(facts["files"][scorer.id]).to_pydict() for scorer in scorers)
    assert [value is None for value in of_clip["clip_score"]] == [False, True, True, True]
    assert of_clip["error"][0] == of_clip["error"][3] == ""
    assert of_clip["error"][1].startswith("ValueError: ")
    assert of_clip["error"][2] == "freed: keep_staged: false removed its image"
    assert of_image["error"] == of_clip["error"]
    assert of_caption["caption_words"] == [2, 2, 2, None]
    assert of_caption["error"] == [""] * 4


class Moody(SampleScorer):
    """Fails on one caption, returns no number for another, and None for a third."""

    name: ClassVar[str] = "moody"
    sees_images: ClassVar[bool] = False
    columns: ClassVar[list[pa.Field]] = [pa.field("moody_score", pa.float32())]

    def score(self, samples: Any) -> dict[str, Values]:
        (sample,) = samples
        if sample.caption == "fail":
            raise LookupError("no word: caf\udce9")
        return {"moody_score": [{"nan": float("nan"), "none": None}.get(sample.caption, 1.0)]}


def test_a_sample_that_a_scorer_rejects_is_a_null_with_a_reason(storage: Storage) -> None:
    assert Moody().score([Sample("x")]) == {"moody_score": [1.0]}
    captions = ["fine", "fail", "nan", "none"]
    table = {"key": captions, "caption": captions, "reason": [""] * 4}
    storage.write_table("staged/u.parquet", pa.table(table))
    work = ScoreJob(storage, [Moody()], 64, Resources())
    unit = Unit("u", {"table": "staged/u.parquet", "tar": "", "missing": [Moody().id], "have": {}, "before": {}})
    facts = work.commit(unit, list(work.prepare(unit)))
    found = storage.read_table(facts["files"][Moody().id]).to_pydict()
    assert found["moody_score"] == [1.0, None, None, None]
    assert found["error"] == ["", "no word: caf?", "not_finite: the model gave no number", ""]


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ({"aesthetic": {"weights": "gone.pth"}}, r"score.aesthetic.model: no CLIP provides its embeddings"),
        ({"clip": {"model": "CLIP"}, "aesthetic": {"weights": "gone.pth"}}, r"aesthetic.weights: no file .*gone.pth"),
        ({"language": {"weights": "lid.176.bin"}}, r"score.language.weights: no file .*copy lid.176.bin"),
    ],
)
def test_missing_weights_are_reported_before_anything_is_fetched(
    score: dict[str, Any], message: str, clip: Path, tmp_path: Path
) -> None:
    if "clip" in score:
        score = score | {"clip": {"model": str(clip)}}
    source = {"path": str(tmp_path / "no such table.parquet")}
    recipe = Recipe.model_validate({"dataset": str(tmp_path / "ds"), "source": source, "score": score})
    with pytest.raises(RecipeError, match=message):
        build.build(recipe, progress=False)
    assert not list((tmp_path / "ds").rglob("*.parquet"))


@pytest.mark.integration
def test_copies_are_found_by_descriptors_also_in_rows_that_come_later(
    tmp_path: Path, draw: Callable[[int], bytes]
) -> None:
    network = write_colour_descriptor(tmp_path / "colours.onnx")

    def edited(number: int, edit: Callable[[Image.Image], Image.Image]) -> bytes:
        out = io.BytesIO()
        edit(Image.open(io.BytesIO(draw(number))).convert("RGB")).save(out, "JPEG", quality=90)
        return out.getvalue()

    def recipe(threshold: float | None = 0.9995) -> Recipe:
        files = [str(file) for file in sorted(tmp_path.glob("*.parquet"))]
        copies = None if threshold is None else {"model": str(network), "threshold": threshold, "size": 64}
        sections = {"image": {"size": 64}, "dedup": {"perceptual": 6, "copies": copies}, "unit": {"rows": 8}}
        source = {"path": files, "image": "image"}
        return Recipe.model_validate({"dataset": str(tmp_path / "dataset"), "source": source} | sections)

    def add(name: str, images: list[bytes]) -> None:
        captions = [f"{name} {number}" for number in range(len(images))]
        pq.write_table(pa.table({"image": images, "caption": captions}), tmp_path / f"{name}.parquet")

    def copies() -> dict[str, str]:
        ledger = Dataset(Storage(str(tmp_path / "dataset"))).ledger().to_pylist()
        caption = {row["key"]: row["caption"] for row in ledger}
        found = [row for row in ledger if row["reason"] == "copies"]
        assert all(row["outcome"] == "duplicate" for row in found)
        return {row["caption"]: caption[row["detail"]] for row in found}

    add("a", [draw(0), draw(1), draw(2), edited(0, ImageOps.mirror)])
    build.build(recipe(None), progress=False)
    with pytest.raises(RecipeError, match=r"dedup.copies: 4 rows have not been scored.*capstan score"):
        build.select(recipe(), dry_run=True, progress=False)
    summary = build.build(recipe(), progress=False)
    assert summary["counts"]["duplicate"] == 1
    assert {frozenset(pair) for pair in copies().items()} == {frozenset({"a 0", "a 3"})}
    assert [step["step"] for step in summary["funnel"]][-2:] == ["near duplicates", "edited copies"]

    shards = tars(tmp_path / "dataset")
    add("b", [edited(1, ImageOps.mirror), draw(4)])
    build.build(recipe(), progress=False)
    assert copies()["b 0"] == "a 1"
    assert {name: tars(tmp_path / "dataset")[name] for name in shards} == shards  # not even written again
    assert verify(Storage(str(tmp_path / "dataset"))) == []
    assert build.select(recipe(1.0), dry_run=True, progress=False)["counts"]["duplicate"] == 0
