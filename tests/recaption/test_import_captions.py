"""Captions that people wrote: a JSON Lines file becomes a layer, and what cannot become one is said with its line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from capstan.cluster.cli import run
from capstan.pipeline.lease import lease
from capstan.pipeline.records import make_key
from capstan.pipeline.storage import Storage
from capstan.recaption import edits, import_captions, store

Import = Callable[..., int]


@pytest.fixture
def dataset(build: Callable[..., Storage], tmp_path: Path) -> Storage:
    """Five images: two known by a file's path, two by one address, one by its key only."""
    storage = build([[0, 1, 2], [3, 4]])
    images = str(tmp_path / "pictures")
    addresses = [[f"{images}/0.jpg", f"{images}/more/1.jpg", "http://a.b/c.jpg"], ["http://a.b/c.jpg", ""]]
    for shard, urls in zip(("shards/shard-000000.parquet", "shards/shard-000001.parquet"), addresses, strict=True):
        table = storage.read_table(shard)
        place = table.schema.get_field_index("url")
        storage.write_table(shard, table.set_column(place, table.schema.field(place), pa.array([urls])[0].values))
    return storage


@pytest.fixture
def take_in(dataset: Storage, tmp_path: Path) -> Import:
    """Runs `captions import` over these lines; gives its exit code."""

    def make(*lines: Any, layer: str = "mine", options: tuple[str, ...] = ()) -> int:
        file = tmp_path / "pictures" / "captions.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        return run(["captions", "import", dataset.url, layer, str(file), *options, "--json"])

    return make


def read(storage: Storage, layer: str = "mine") -> dict[str, dict[str, str]]:
    shards = ("shard-000000", "shard-000001")
    return {key: texts for shard in shards for key, texts in store.read_layer(storage, layer, shard).items()}


def test_images_are_known_by_path_address_or_key(
    dataset: Storage, take_in: Import, capsys: pytest.CaptureFixture[str]
) -> None:
    first = {"short": "a dog", "descriptive": "a brown dog on grass.", "license": "cc0"}
    code = take_in(
        {"image": "0.jpg", **first},
        {"image": "more/../more/1.jpg", "short": "a cat", "descriptive": None},
        {"url": "http://a.b/c.jpg", "short": "two images of one address"},
        {"key": make_key("4"), "descriptive": "a grey bird."},
        {"image": "9.jpg", "short": "not in the dataset"},
    )
    assert code == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary == {"layer": "mine", "slots": ["descriptive", "short"], "lines": 5, "images": 5, "missing": 1}
    both = {"short": "two images of one address"}
    assert read(dataset) == {
        make_key("0"): {"short": "a dog", "descriptive": "a brown dog on grass."},
        make_key("1"): {"short": "a cat"},
        make_key("2"): both,
        make_key("3"): both,
        make_key("4"): {"descriptive": "a grey bird."},
    }
    assert store.latest_layer(dataset) == "mine"


def test_pairs_of_image_and_caption(dataset: Storage, take_in: Import) -> None:
    """What training from a JSON Lines file of (image, caption) starts from."""
    pairs = [{"image": "0.jpg", "caption": "a dog"}, {"image": "more/1.jpg", "caption": "a cat"}]
    assert take_in(*pairs, options=("--slot", "descriptive=caption")) == 0
    assert read(dataset) == {make_key("0"): {"descriptive": "a dog"}, make_key("1"): {"descriptive": "a cat"}}


def test_texts_stay_as_they_were_written(dataset: Storage, take_in: Import) -> None:
    text = "Bonjour , le monde ! 5 000"
    assert take_in({"image": "0.jpg", "short": text}) == 0
    assert read(dataset) == {make_key("0"): {"short": text}}


def test_what_is_wrong_is_said_with_its_line(take_in: Import, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"image": "0.jpg", "short": "a dog"}
    for lines, problem in (
        ([good, "{"], "captions.jsonl:3 is not a JSON object"),
        ([good, {"short": "a dog"}], ":3 does not name its image"),
        ([{**good, "key": "x"}], ":1 does not name its image"),
        ([good, good], "repeats the image"),
        ([good, {"image": "1.jpg", "caption": "a dog"}], ":3 has no text in short, descriptive"),
        ([{**good, "short": 7}], ":1 has no text"),
        ([{**good, "image": "7.jpg"}], "none of the images in"),
        ([""], "none of the images in"),
    ):
        assert take_in(*lines) == 2
        assert problem in capsys.readouterr().err
    for options, problem in (
        (("--slot", "Short"), "'Short' is not a valid slot"),
        (("--slot", "original"), "is not a valid slot"),
    ):
        assert take_in(good, options=options) == 2
        assert problem in capsys.readouterr().err
    assert take_in(good, layer="A B") == 2
    assert import_captions.fields([]) == import_captions.SLOTS


def test_a_layer_does_not_change_under_those_who_use_it(
    dataset: Storage, take_in: Import, capsys: pytest.CaptureFixture[str]
) -> None:
    assert take_in({"image": "0.jpg", "short": "a dgo"}) == 0
    assert take_in({"image": "0.jpg", "short": "a dog"}) == 0  # corrected
    assert read(dataset) == {make_key("0"): {"short": "a dog"}}
    assert take_in({"image": "0.jpg", "descriptive": "a dog."}) == 2
    assert "layer mine already exists and has other slots" in capsys.readouterr().err
    recipe = f"{store.ROOT}/mine/recipe.json"
    written = json.loads(dataset.read(recipe))
    dataset.write(recipe, json.dumps(written | {"engine": {"engine": "coca"}}).encode())
    assert take_in({"image": "0.jpg", "short": "a dog"}) == 2
    assert "was generated by a model" in capsys.readouterr().err


def test_captions_over_a_layer_leave_the_rest_as_it_is(
    dataset: Storage, take_in: Import, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [make_key(str(number)) for number in range(2)]
    assert take_in(*({"key": key, "short": "a dog", "descriptive": "a dog."} for key in keys), layer="whole") == 0
    correction = {"key": keys[0], "short": "a cat"}
    assert take_in(correction, options=("--over", "whole")) == 0
    assert take_in(correction, options=("--over", "whole")) == 0  # again, as a corrected file
    assert read(dataset) == {
        keys[0]: {"short": "a cat", "descriptive": "a dog."},
        keys[1]: {"short": "a dog", "descriptive": "a dog."},
    }
    for options, problem in (
        ((), "layer mine already exists and lies over layer whole"),
        (("--over", "nothing"), "no caption layer 'nothing'"),
        (("--over", "mine"), "layer mine lies over layer whole itself"),
    ):
        assert take_in(correction, options=options) == 2
        assert problem in capsys.readouterr().err
    edits.write_edits(dataset, "whole", edits.read_edits(dataset, "whole"))
    assert take_in(correction, layer="whole-edited", options=("--over", "whole")) == 2
    assert "holds edits made in `capstan view`" in capsys.readouterr().err


def test_nothing_is_imported_while_a_takedown_runs(dataset: Storage, take_in: Import) -> None:
    with lease(dataset, "remove"):
        before = dataset.names()
        assert take_in({"key": make_key("4"), "short": "a bird"}) == 1
        assert dataset.names() == before
    assert take_in({"key": make_key("4"), "short": "a bird"}) == 0
