"""verify finds whatever is wrong with a dataset, and names the file."""

import io
import json
import random
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capstan.pipeline.dataset import energon
from capstan.pipeline.dataset.shards import Manifest, read_manifest, sha256_of, write_manifest
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.pack.verify import verify
from capstan.pipeline.storage import Storage

pytestmark = pytest.mark.integration

TAR, TABLE = "shards/shard-000001.tar", "shards/shard-000001.parquet"
INDEXES = ["sizes.json", "shards/sizes.json", "wids.json", "croissant.json", TAR + ".idx", *energon.NAMES]


@pytest.fixture(scope="module")
def dataset(odd_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what readers see of a dataset."""
    copy = tmp_path_factory.mktemp("verify") / "dataset"
    shutil.copytree(odd_dataset, copy, ignore=shutil.ignore_patterns("staged", "state"))
    return copy


@pytest.fixture
def storage(dataset: Path) -> Iterator[Storage]:
    """The dataset, to be damaged: it is whole again afterwards."""
    storage = Storage(str(dataset))
    good = {name: storage.read(name) for name in storage.names()}
    yield storage
    for name in storage.names():
        if name not in good:
            storage.delete(name)
    for name, data in good.items():
        storage.write(name, data)


def files(dataset: Path) -> list[str]:
    return sorted(str(path.relative_to(dataset)) for path in dataset.rglob("*") if path.is_file())


def test_a_whole_dataset_has_no_problem(dataset: Path) -> None:
    assert verify(Storage(str(dataset))) == []
    assert {"dataset.json", TAR, TABLE, *INDEXES} <= set(files(dataset))


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_flipped_bit_anywhere_names_its_file(dataset: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(files(dataset)))
    path = dataset / name
    good = path.read_bytes()
    position = data.draw(st.integers(0, len(good) - 1))
    bad = bytearray(good)
    bad[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(bad)
    try:
        problems = verify(Storage(str(dataset)))
    finally:
        path.write_bytes(good)
    assert any(problem.startswith(f"{name}:") for problem in problems), problems


def member_at(tar: bytes, suffix: str) -> tarfile.TarInfo:
    """The third sample's member with this suffix."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as file:
        return [member for member in file if member.name.endswith(suffix)][2]


@pytest.mark.parametrize(
    ("suffix", "where", "problem"),
    [
        (".jpg", "middle", "its SHA-256"),
        (".jpg", "start", "is not a JPEG"),
        (".json", "middle", ".json does not match the table"),
        (".txt", "start", ".txt does not match the table"),
        (".jpg", "name", "is missing (found"),
        (".txt", "checksum", "has a damaged header"),
        (".json", "padding", ".json is not followed by zeros"),
    ],
)
def test_where_in_a_tar(storage: Storage, suffix: str, where: str, problem: str) -> None:
    tar = bytearray(storage.read(TAR))
    member = member_at(tar, suffix)
    start, size = member.offset_data, member.size
    places = {"start": 0, "middle": size // 2, "padding": size + 1, "name": -512, "checksum": -512 + 150}
    tar[start + places[where]] ^= 1
    storage.write(TAR, bytes(tar))
    problems = verify(storage)
    assert all(problem.startswith(f"{TAR}:") for problem in problems)
    assert any(problem in line for line in problems), problems
    if where != "middle" or suffix != ".jpg":
        assert any(member.name in problem for problem in problems), problems


def test_more_and_less_of_a_tar(storage: Storage) -> None:
    good = storage.read(TAR)
    member = member_at(good, ".json")

    def problems_of(tar: bytes) -> str:
        storage.write(TAR, tar)
        return "\n".join(verify(storage))

    assert "does not end after the table's last sample" in problems_of(good + b"x")
    assert f"{TAR}: {len(good) + 512} bytes" in problems_of(good + bytes(512))
    assert f"ends within {member.name}" in problems_of(good[: member.offset_data + 5])
    assert f"{member.name} is missing (found the end of the file)" in problems_of(good[: member.offset])
    end = member.offset_data + -(-member.size // 512) * 512
    assert f"{member.name} is missing (found {member.name[:-5]}.txt)" in problems_of(good[: member.offset] + good[end:])
    assert f"{TAR}: 0 bytes" in problems_of(b"")
    storage.delete(TAR)
    assert f"{TAR}: missing" in verify(storage)


def replaced(storage: Storage, table: pa.Table) -> list[str]:
    """Problems with `table` as the second shard's, its sum in the manifest: as if it had been written wrongly."""
    data = io.BytesIO()
    pq.write_table(table, data)
    storage.write(TABLE, data.getvalue())
    manifest = read_manifest(storage)
    assert manifest is not None
    shards = list(manifest.shards)
    shards[1] = shards[1].model_copy(update={"table_sha256": sha256_of(data.getvalue())})
    write_manifest(storage, manifest.model_copy(update={"shards": shards}))
    return verify(storage)


def changed(table: pa.Table, column: str, row: int, value: object) -> pa.Table:
    rows = table.to_pylist()
    rows[row][column] = value
    return pa.Table.from_pylist(rows, table.schema)


def test_a_table_that_was_written_wrongly(storage: Storage) -> None:
    table = storage.read_table(TABLE)
    keys = table["key"].to_pylist()
    offset = table["offset"][3].as_py()

    problems = replaced(storage, changed(table, "offset", 3, offset + 512))
    assert f"{TAR}: {keys[3]}.jpg is at {offset}, the table says {offset + 512}" in problems
    assert f"{TAR}.idx: does not match {TABLE}" in problems
    assert f"{energon.INDEX}: does not match the shards' tables" in problems

    size = table["size"][3].as_py()
    assert any(
        f"{keys[3]}.jpg has a damaged header" in p for p in replaced(storage, changed(table, "size", 3, size - 1))
    )
    short = next(row for row, text in enumerate(table["caption"].to_pylist()) if text in (" ", ".", "null", "0.25"))
    problems = replaced(storage, changed(table, "caption", short, "x" * len(table["caption"][short].as_py())))
    assert f"{TAR}: {keys[short]}.txt does not match the table" in problems
    assert any(f"{keys[2]}.json" in p for p in replaced(storage, changed(table, "width", 2, 49)))

    elsewhere = storage.read_table("shards/shard-000000.parquet")["key"][0].as_py()
    problems = replaced(storage, changed(table, "key", 0, elsewhere))
    assert f"{TABLE}: key {elsewhere} is also in shards/shard-000000.parquet" in problems
    assert "ledger: the rows kept in shard-000001 are not those of its table" in problems
    assert any(problem.startswith(f"{TAR}: {elsewhere}.jpg is missing (found {keys[0]}.jpg)") for problem in problems)


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_that_is_missing_or_of_another_dataset(storage: Storage, name: str) -> None:
    good = storage.read(name)
    storage.write(name, good.replace(b"0", b"1", 1) if b"0" in good else good + b"\n")
    assert any(problem.startswith(f"{name}: ") for problem in verify(storage))
    storage.delete(name)
    assert f"{name}: missing" in verify(storage)


def test_files_that_nothing_lists_and_tables_that_are_gone(storage: Storage) -> None:
    ledger = next(name for name in storage.names("ledger"))
    storage.write("shards/shard-000099.tar", b"x")
    storage.write("ledger/old.parquet", b"x")
    storage.delete(ledger)
    storage.delete(TABLE)
    storage.write(".nv-meta/my-split.yaml", b"")  # Energon's users keep their own beside ours
    problems = verify(storage)
    assert "shards/shard-000099.tar: not listed in dataset.json" in problems
    assert "ledger/old.parquet: not listed in dataset.json" in problems
    assert f"{ledger}: missing" in problems
    assert f"{TABLE}: missing" in problems
    assert not any("my-split" in problem for problem in problems)


def test_a_manifest_that_says_something_else(storage: Storage) -> None:
    good = storage.read("dataset.json")
    fields = json.loads(good)
    fields["counts"]["failed"] += 1
    storage.write("dataset.json", json.dumps(fields, indent=1).encode())
    problems = verify(storage)
    assert "dataset.json: does not match its own seal: damaged, or edited by hand" in problems
    assert any(problem.startswith("ledger: 0 rows failed, dataset.json says 1") for problem in problems)
    storage.write("dataset.json", good[:-20])
    assert verify(storage)[0].startswith("dataset.json: ")
    write_manifest(storage, Manifest(format_version=1))
    assert "is too old for this version" in verify(storage)[0]
    storage.delete("dataset.json")
    with pytest.raises(RecipeError, match="no dataset"):
        verify(storage)


def test_many_problems_are_listed_in_the_order_of_the_shards(storage: Storage) -> None:
    for name in random.Random(0).sample([n for n in storage.names("shards") if n.endswith(".tar")], 3):
        storage.write(name, storage.read(name)[:700])
    named = [problem.partition(":")[0] for problem in verify(storage)]
    assert named == sorted(named)
