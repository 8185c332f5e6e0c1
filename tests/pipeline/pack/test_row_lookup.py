"""The index of rows: it leads to every unit that has a URL, a domain or a sum, whatever it covers or whatever broke."""

from pathlib import Path

import pyarrow as pa
import pytest
from in_process import run_here

from capstan.pipeline import units
from capstan.pipeline.config import Resources
from capstan.pipeline.dataset.shards import sha256_of
from capstan.pipeline.pack import row_lookup
from capstan.pipeline.pack.row_lookup import cover, follow, units_with
from capstan.pipeline.source.blocklist import Blocklist, domain_digest, url_digest
from capstan.pipeline.storage import Storage


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """A storage in whose index few tables make a run, and few rows a file of it."""
    monkeypatch.setattr(units, "run", run_here)
    monkeypatch.setattr(row_lookup, "LEAST", 2)
    monkeypatch.setattr(row_lookup, "_GROUP", 3)
    monkeypatch.setattr(row_lookup, "_PART_ROWS", 20)
    return Storage(str(tmp_path))


def url(unit: int, row: int) -> str:
    return f"https://pics.site{unit % 3}.org/{unit}-{row}.jpg"


def tables(storage: Storage, units: range) -> dict[str, str]:
    """Write a staged table of two rows for each unit."""
    names = {}
    for unit in units:
        name = f"staged/{unit}.parquet"
        urls, sums = [url(unit, row) for row in range(2)], [sha256_of(url(unit, 0).encode()), ""]
        storage.write_table(name, pa.table({"url": urls, "sha256": sums}))
        names[name] = str(unit)
    return names


def found(storage: Storage, names: dict[str, str]) -> list[set[str]]:
    """The units that one URL, one sum and one domain lead to."""
    asked = {
        "urls": url_digest(url(4, 1)),
        "sha256": sha256_of(url(1, 0).encode()),
        "domains": domain_digest("site2.org"),
    }
    return [units_with(storage, names, Blocklist(**{kind: frozenset([digest])})) for kind, digest in asked.items()]


def runs(storage: Storage) -> list[int]:
    return [one["rows"] for one in storage.read_json("state/lookup/index.json", "")["runs"]]


def test_every_unit_is_found_as_tables_come(storage: Storage) -> None:
    names: dict[str, str] = {}
    for stop in (5, 6, 8, 12, 13, 20):
        names |= tables(storage, range(len(names), stop))
        cover(storage, names, Resources(), progress=False)
        of_url, of_sum, of_domain = found(storage, names)
        uncovered = {"5"} if stop == 6 else {"12"} if stop == 13 else set()
        assert of_url == {"4"} | uncovered
        assert of_sum == {"1"} | uncovered
        assert of_domain == {str(unit) for unit in range(2, stop, 3)} | uncovered
    # Runs are larger than those after them, and there are no files but theirs.
    assert runs(storage) == sorted(runs(storage), reverse=True)
    parts = [part for one in storage.read_json("state/lookup/index.json", "")["runs"] for part in one["parts"]]
    assert storage.names("state/lookup") == sorted([*parts, "state/lookup/index.json"])
    assert len(parts) > len(runs(storage))


def test_a_table_that_was_written_again_is_still_covered(storage: Storage) -> None:
    names = tables(storage, range(5))
    cover(storage, names, Resources(), progress=False)
    names["staged/new.parquet"] = names.pop("staged/4.parquet")
    assert found(storage, names)[1] == {"1", "4"}  # not known to hold less than before
    follow(storage, {"staged/4.parquet": "staged/new.parquet"})
    assert found(storage, names)[1] == {"1"}


@pytest.mark.parametrize("what", ["index.json", "part", "lost part"])
def test_a_broken_index_leads_to_all_units(storage: Storage, what: str) -> None:
    names = tables(storage, range(5))
    cover(storage, names, Resources(), progress=False)
    part = next(name for name in storage.names("state/lookup") if name.endswith(".parquet"))
    if what == "lost part":
        storage.delete(part)
    else:
        storage.write("state/lookup/index.json" if what == "index.json" else part, b"{")
    assert found(storage, names) == [set(names.values())] * 3


def test_units_that_are_no_more_are_not_named(storage: Storage) -> None:
    names = tables(storage, range(5))
    cover(storage, names, Resources(), progress=False)
    del names["staged/4.parquet"]
    assert found(storage, names)[0] == set()
