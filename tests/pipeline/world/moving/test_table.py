"""The moving world as a source: clips that `capstan cut` makes of it, and truth that goes with them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moving import shown

from capstan.pipeline.build import build
from capstan.pipeline.clips.cut import cut
from capstan.pipeline.config import Recipe, WorldSource, validate
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.world.moving.captions import read
from capstan.pipeline.world.moving.oracle import watch
from capstan.pipeline.world.moving.table import rows
from capstan.pipeline.world.table import url_of

WORLD: dict[str, Any] = {
    **{"scenes": 6, "size": 32, "captions": "descriptive", "defects": False, "textures": ["plain"]},
    **{"shapes": ["circle", "square", "triangle"], "moving": {"frames": 8, "fps": 8}},
}
CUT = {"by": "none", "seconds": [0.5, 4], "fps": 8, "size": 32, "min_size": 16, "chroma": "444", "crf": 10}


def recipe(folder: Path, **world: Any) -> Recipe:
    source = {"format": "world", "world": WORLD | world}
    made = {"dataset": str(folder / "clips"), "source": source, "cut": CUT | {"sound": "drop"}}
    return Recipe.model_validate(made | {"resources": {"cpus": 1}})


def test_the_clips_show_what_their_captions_and_truth_say(tmp_path: Path) -> None:
    assert cut(recipe(tmp_path), progress=False)["counts"] == {"videos": 6, "failed": 0, "clips": 6, "seconds": 6.0}
    (tar,) = (tmp_path / "clips/shards").glob("*.tar")
    with tarfile.open(fileobj=io.BytesIO(tar.read_bytes())) as opened:
        files = {member.name: opened.extractfile(member).read() for member in opened}  # type: ignore[union-attr]
    keys = {name.partition(".")[0] for name in files}
    assert len(keys) == 6
    for key in keys:
        fields = json.loads(files[f"{key}.json"])
        truth, stated = json.loads(fields["extra"]), read(files[f"{key}.txt"].decode())
        seen = watch(np.stack(shown(files[f"{key}.mp4"])))
        wanted = {(thing.colour, thing.shape, thing.move) for thing in stated.things}
        assert {(thing.colour, thing.shape, thing.move) for thing in seen.things} == wanted
        assert {(one["colour"], one["label"], one["move"]) for one in truth["objects"]} == wanted
        assert seen.background == stated.background == truth["background"]
        assert (fields["frames"], fields["fps"], fields["width"]) == (8, 8.0, 32)


def test_the_same_world_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        cut(recipe(tmp_path / name), progress=False)
    first, second = (sorted((tmp_path / name / "clips/shards").glob("*.tar")) for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_a_world_without_clips_keeps_its_urls() -> None:
    assert url_of(WorldSource(), 3) == "http://world.capstan.test/seed0-256px-6bd22ed0/00000003.jpg"
    assert "moving" not in WorldSource().model_dump()
    moving = validate(WorldSource, WORLD)
    assert next(rows(moving))["url"] == url_of(moving, 0)
    assert url_of(moving, 0).endswith("/00000000.mp4")


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ({"captions": "alt"}, "set captions: short, defects: false"),
        ({"defects": True}, "set captions: short, defects: false"),
        ({"moving": {"frames": 1}}, r"moving\.frames"),
    ],
)
def test_a_wrong_setting_is_named(section: dict[str, Any], field: str) -> None:
    with pytest.raises(RecipeError, match=field):
        validate(WorldSource, WORLD | section, "source.world")


def test_each_command_says_which_world_it_takes(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^source\.world\.moving: .*make its clips with `capstan cut`"):
        build(recipe(tmp_path))
    with pytest.raises(RecipeError, match=r"^source\.format: the captioned world has images.*source\.world\.moving"):
        cut(recipe(tmp_path, moving=None))
