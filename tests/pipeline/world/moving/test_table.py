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
from capstan.pipeline.media.codec import decode_flac
from capstan.pipeline.world.moving.captions import heard, read
from capstan.pipeline.world.moving.oracle import in_time, listen, score_heard, watch
from capstan.pipeline.world.moving.render import samples_of
from capstan.pipeline.world.moving.table import rows, scene_at
from capstan.pipeline.world.scene import vocabulary
from capstan.pipeline.world.table import url_of

WORLD: dict[str, Any] = {
    **{"scenes": 6, "size": 32, "captions": "descriptive", "defects": False, "textures": ["plain"]},
    **{"shapes": ["circle", "square", "triangle"], "moving": {"frames": 8, "fps": 8}},
}
CUT = {"by": "none", "seconds": [0.5, 4], "fps": 8, "size": 32, "min_size": 16, "chroma": "444", "crf": 10}


SOUNDING: dict[str, Any] = {"max_objects": 2, "moving": {"frames": 8, "fps": 4, "entries": True, "sound": 4000}}


def recipe(folder: Path, sound: str = "drop", **world: Any) -> Recipe:
    source = {"format": "world", "world": WORLD | world}
    fps = (source["world"]["moving"] or WORLD["moving"])["fps"]
    made = {"dataset": str(folder / "clips"), "source": source, "cut": CUT | {"sound": sound, "fps": fps}}
    return Recipe.model_validate(made | {"resources": {"cpus": 1}})


def stored(folder: Path) -> dict[str, bytes]:
    (tar,) = (folder / "clips/shards").glob("*.tar")
    with tarfile.open(fileobj=io.BytesIO(tar.read_bytes())) as opened:
        return {member.name: opened.extractfile(member).read() for member in opened}  # type: ignore[union-attr]


def test_the_clips_show_what_their_captions_and_truth_say(tmp_path: Path) -> None:
    assert cut(recipe(tmp_path), progress=False)["counts"] == {"videos": 6, "failed": 0, "clips": 6, "seconds": 6.0}
    files = stored(tmp_path)
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


def test_clips_sound_as_things_enter(tmp_path: Path) -> None:
    made = recipe(tmp_path, "keep", **SOUNDING)
    cut(made, progress=False)
    assert made.source is not None
    world, files = made.source.world, stored(tmp_path)
    assert world is not None
    for key in {name.partition(".")[0] for name in files}:
        scene = scene_at(world, vocabulary(world), json.loads(json.loads(files[f"{key}.json"])["extra"])["world_index"])
        samples, rate = decode_flac(files[f"{key}.flac"])
        assert rate == 4000
        assert np.array_equal(samples, samples_of(scene, 4000))
        assert in_time(watch(np.stack(shown(files[f"{key}.mp4"]))), listen(samples, rate), 4) == 1


def test_a_world_of_sound_alone(tmp_path: Path) -> None:
    cut(recipe(tmp_path, "only", captions="heard", **SOUNDING), progress=False)
    files = stored(tmp_path)
    assert {name.partition(".")[2] for name in files} == {"jpg", "flac", "json", "txt"}
    for key in {name.partition(".")[0] for name in files}:
        stated = [(thing.colour, thing.shape) for thing in read(files[f"{key}.txt"].decode()).things]
        assert score_heard(stated, listen(*decode_flac(files[f"{key}.flac"])))["in_order"] == 1


def test_captions_say_what_is_heard() -> None:
    world = validate(WorldSource, WORLD | SOUNDING | {"captions": "heard"})
    assert [row["caption"] for row in rows(world)] == [heard(scene_at(world, vocabulary(world), n)) for n in range(6)]


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
    assert moving.model_dump()["moving"] == {"frames": 8, "fps": 8}


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ({"captions": "alt"}, "set captions: short, defects: false"),
        ({"defects": True}, "set captions: short, defects: false"),
        ({"moving": {"frames": 1}}, r"moving\.frames"),
        ({"captions": "heard"}, r"set moving\.sound"),
    ],
)
def test_a_wrong_setting_is_named(section: dict[str, Any], field: str) -> None:
    with pytest.raises(RecipeError, match=field):
        validate(WorldSource, WORLD | section, "source.world")


@pytest.mark.parametrize(
    ("moving", "field"),
    [
        ({"frames": 8, "fps": 4, "entries": True}, r"^source\.world\.moving\.frames: .*3 entries.*set 9 or more"),
        ({"sound": 2000}, r"^source\.world\.moving\.sound: .*highest pitch, 1327 Hz.*set more than 2655"),
    ],
)
def test_a_world_that_cannot_be_drawn_is_refused(moving: dict[str, Any], field: str) -> None:
    colours = ["red", "green", "blue", "yellow", "purple", "cyan"]
    with pytest.raises(RecipeError, match=field):
        next(rows(validate(WorldSource, WORLD | {"moving": moving, "colours": colours})))


def test_each_command_says_which_world_it_takes(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^source\.world\.moving: .*make its clips with `capstan cut`"):
        build(recipe(tmp_path))
    with pytest.raises(RecipeError, match=r"^source\.format: the captioned world has images.*source\.world\.moving"):
        cut(recipe(tmp_path, moving=None))
