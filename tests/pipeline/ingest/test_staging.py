"""`keep_staged: false`: staged images are freed once they are packed, and nothing is lost by it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capstan.pipeline import build as stages
from capstan.pipeline.config import Recipe, Resources
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.pack.verify import verify
from capstan.pipeline.storage import Storage

pytestmark = pytest.mark.integration

Make = Callable[..., Recipe]


@pytest.fixture
def make(tmp_path: Path, site: Any, two_cpus: Resources) -> Make:
    """A recipe over the site's first `count` images that keeps those whose number is at least `least`."""

    def recipe(count: int = 20, least: int = 0, *, keep: bool = False, name: str = "ds", **sections: Any) -> Recipe:
        table = tmp_path / "urls.jsonl"
        table.write_text("\n".join(json.dumps({"url": site.url(n), "caption": str(n)}) for n in range(count)))
        settings = {
            "dataset": str(tmp_path / name),
            "source": {"path": str(table)},
            "fetch": {"allow_private": True, "retries": 0},
            "image": {"size": 64},
            "select": [{"name": "least", "where": f"caption::int >= {least}"}],
            "dedup": {"perceptual": None},
            "unit": {"rows": 6},
            "shards": {"samples": 4},
            "keep_staged": keep,
        }
        return Recipe.model_validate(settings | sections)

    return recipe


def build(recipe: Recipe, **options: Any) -> dict[str, Any]:
    return stages.build(recipe, progress=False, **options)


def shards(recipe: Recipe) -> dict[str, bytes]:
    storage = Storage(recipe.dataset)
    assert verify(storage) == []
    return {name: storage.read(name) for name in storage.names("shards")}


def tars(recipe: Recipe, folder: str) -> list[str]:
    return [name for name in Storage(recipe.dataset).names(folder) if name.endswith(".tar")]


def test_fewer_rows_are_packed_from_the_shards_and_more_must_be_fetched_again(make: Make, site: Any) -> None:
    build(make())
    assert tars(make(), "staged") == []
    whole = shards(make())
    assert len(site.new_asked()) == 20
    assert build(make())["counts"]["kept"] == 20
    assert site.new_asked() == []

    # Fewer: from the packed shards, the same bytes as if all were still staged.
    assert stages.select(make(least=7), progress=False)["counts"]["kept"] == 13
    assert site.new_asked() == []
    fewer = shards(make(least=7))
    build(make(least=7, keep=True, name="other"))
    assert fewer == shards(make(least=7, keep=True, name="other"))
    assert tars(make(), "shelf") == []
    site.new_asked()

    # More: reported before anything is changed; fetched on request, and nothing else is.
    for run in (stages.select, stages.build):
        with pytest.raises(
            RecipeError, match=r"select: 4 of the kept rows .*keep_staged: false.*build RECIPE --retry freed"
        ):
            run(make(least=3), progress=False)
    assert shards(make(least=7)) == fewer
    assert site.new_asked() == []
    summary = build(make(least=3), retry="freed")
    assert (summary["counts"]["kept"], summary["retried"]) == (17, 4)
    assert site.new_asked() == [f"/{n}.jpg" for n in range(3, 7)]
    assert tars(make(), "staged") == []
    build(make(least=0), retry="freed")
    assert site.new_asked() == [f"/{n}.jpg" for n in range(3)]
    assert shards(make()) == whole


def test_new_rows_and_rows_tried_again_need_no_old_images(make: Make, site: Any) -> None:
    site.broken = {"/1.jpg": 503}
    build(make(8))
    before = shards(make(8))
    build(make(12))
    assert {name: data for name, data in before.items() if name.endswith("0.tar")}.items() <= shards(make(12)).items()
    site.broken = {}
    site.new_asked()
    assert build(make(12), retry="failed")["counts"]["kept"] == 12
    assert site.new_asked() == ["/1.jpg"]
    build(make(12, keep=True, name="other"))
    assert Dataset(Storage(make(12).dataset)).ledger().num_rows == 12
    numbers = [row["caption"] for row in Dataset(Storage(make(12).dataset)).ledger().to_pylist()]
    assert sorted(map(int, numbers)) == list(range(12))


def test_scores_are_added_from_the_shards(make: Make, site: Any) -> None:
    build(make(20, 5))
    before = shards(make(20, 5))
    site.new_asked()
    stages.score(make(20, 5, score={"image": {}}), progress=False)
    assert site.new_asked() == []
    after = shards(make(20, 5))
    assert {name: data for name, data in before.items() if name.endswith(".tar")}.items() <= after.items()
    for row in Dataset(Storage(make().dataset)).ledger().to_pylist():
        assert (row["image_entropy"] is not None) == (row["outcome"] == "kept")
        assert row["score_error"] == ("" if row["outcome"] == "kept" else "image: " + FREED)


FREED = "freed: keep_staged: false removed its image"


def test_an_interrupted_repack_loses_nothing(make: Make, site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if killed after every old shard was replaced by the new one of its name: only the copies can restore it."""
    build(make())
    with monkeypatch.context() as patch:
        patch.setattr("capstan.pipeline.pack.job.write_indexes", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            stages.select(make(least=3), progress=False)  # three rows less: each shard of four has one that is needed
    site.new_asked()
    assert stages.select(make(least=2), progress=False)["counts"]["kept"] == 18
    assert site.new_asked() == []
    build(make(least=2, keep=True, name="other"))
    assert shards(make(least=2)) == shards(make(least=2, keep=True, name="other"))
