"""The source's licences become a column of ledger, shard tables and JSON, conditions use it, and they are counted."""

import functools
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rows_recipe import build, published, rows_recipe, sound

from capstan.pipeline.config import Recipe
from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.report.report import write_report
from capstan.pipeline.storage import Storage

WRITTEN = ["CC BY 4.0", "https://creativecommons.org/publicdomain/zero/1.0/", None, "© Acme"]
MEANT = ["CC-BY-4.0", "CC0-1.0", "NOASSERTION", "LicenseRef-Acme"]


@pytest.fixture
def licensed(tmp_path: Path, draw: Callable[[int], bytes]) -> Callable[..., Recipe]:
    """A recipe over twelve images with four licences."""
    rows = [{"image": draw(n), "caption": f"{n}", "rights": WRITTEN[n % 4]} for n in range(12)]
    path = tmp_path / "licensed.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)

    def recipe(license_: Any = "rights", *, columns: list[str] | None = None, **sections: Any) -> Recipe:
        source = {"path": str(path), "image": "image", "license": license_, "columns": columns}
        settings: dict[str, Any] = {"select": [], "source": source}
        return rows_recipe(tmp_path, draw, 1, **(settings | sections))

    return recipe


def test_the_column_is_in_ledger_tables_and_json_and_is_counted(licensed: Callable[..., Recipe]) -> None:
    recipe = licensed()
    summary = build(recipe)
    assert summary["licenses"] == dict.fromkeys(sorted(MEANT), 3)
    assert sound(recipe)
    dataset = Dataset(Storage(recipe.dataset))
    expected = {str(n): MEANT[n % 4] for n in range(12)}
    ledger = dataset.ledger()
    assert dict(zip(ledger["caption"].to_pylist(), ledger["license"].to_pylist(), strict=True)) == expected
    found = {}
    for entry in dataset.manifest.shards:
        table = dataset.table(entry.name)
        found |= dict(zip(table["caption"].to_pylist(), table["license"].to_pylist(), strict=True))
        with tarfile.open(Path(recipe.dataset) / entry.tar) as tar:
            for member in (name for name in tar.getnames() if name.endswith(".json")):
                fields = json.load(tar.extractfile(member))  # type: ignore[arg-type]
                assert fields["license"] == expected[fields["caption"]]
    assert found == expected
    assert "LicenseRef-Acme" in Path(write_report(dataset.storage)).read_text()


def test_conditions_name_it_also_where_the_column_is_not_carried_otherwise(licensed: Callable[..., Recipe]) -> None:
    free = [{"name": "free", "where": "license LIKE 'CC%'"}]
    summary = build(licensed(select=free, columns=[]))
    assert summary["counts"]["kept"] == 6
    assert set(summary["licenses"]) == {"CC-BY-4.0", "CC0-1.0"}


def test_naming_the_licences_later_fetches_nothing_and_one_licence_may_be_given_for_all(
    licensed: Callable[..., Recipe],
) -> None:
    before = licensed(None)
    assert "licenses" not in build(before)
    staged = set(Storage(before.dataset).names("staged"))
    plain = published(before)
    assert all(b'"license":' not in data for name, data in plain.items() if name.endswith(".tar"))

    after = licensed({"all": "cc0"})
    assert build(after)["licenses"] == {"CC0-1.0": 12}
    assert set(Storage(after.dataset).names("staged")) == staged
    assert sound(after)

    build(before)
    assert published(before) == plain


def test_a_column_that_is_not_there_is_named_before_a_row_is_read(licensed: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match=r"source\.license: no column 'right' .*did you mean rights"):
        build(licensed("right", columns=[]))
    with pytest.raises(RecipeError, match=r"no column 'license'.*set source\.license"):
        build(licensed(None, select=[{"name": "free", "where": "license = 'MIT'"}]))


def test_a_recipe_without_licences_keeps_its_hash(licensed: Callable[..., Recipe]) -> None:
    assert "license" not in licensed(None).model_dump(mode="json")["source"]
    assert functools.reduce(dict.get, ["source", "license"], licensed().model_dump(mode="json")) == "rights"
