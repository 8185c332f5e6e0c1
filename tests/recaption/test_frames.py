"""Captions of clips: what a server sees of them, when they are captioned again, and what is refused."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chat_server
import moving_clips
import numpy as np
import pytest
from chat_server import Body, ChatServer
from moving_clips import FRAMES, SIDE, scene, write_clips
from PIL import Image
from small_captioner import write_captioner
from sounding import write_sounds

from capstan.pipeline.config import Recipe, validate
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage import Storage
from capstan.pipeline.world.moving.render import frames_of
from capstan.recaption import store
from capstan.recaption.config import RecaptionConfig
from capstan.recaption.job import plan, recaption


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image, and three clips."""
    return write_clips(tmp_path_factory.mktemp("clips") / "ds", [4], images=1)


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with chat_server.serving() as running:
        yield running


def recipe(dataset: Path, server: ChatServer, **section: Any) -> Recipe:
    chat = {"engine": "openai", "model": "m", "server": {"url": server.url}, "slots": ["short"]}
    resources = {"cpus": 1, "model_workers": 1}
    return Recipe.model_validate({"dataset": str(dataset), "resources": resources, "recaption": chat | section})


def seen(body: Body) -> tuple[list[np.ndarray], str]:
    """The images and the text of a request."""
    *images, text = body["messages"][-1]["content"]
    files = [base64.b64decode(image["image_url"]["url"].partition(",")[2]) for image in images]
    return [np.asarray(Image.open(io.BytesIO(file))) for file in files], text["text"]


def by_first_frame(server: ChatServer) -> dict[int, tuple[list[np.ndarray], str]]:
    """The requests by the number of the scene whose clip, or middle frame, they show first."""
    found = {}
    for body in server.bodies:
        images, text = seen(body)
        first = images[0][:SIDE, :SIDE].astype(int)
        starts = [frames_of(scene(n), SIDE)[(FRAMES - 1) // 2 if n == 0 else 0] for n in range(4)]
        found[min(range(4), key=lambda n: np.abs(first - starts[n]).mean())] = images, text
    return found


def close(image: np.ndarray, frame: np.ndarray) -> bool:
    return bool(np.abs(image.astype(int) - frame).mean() < 8)


def test_a_server_sees_the_frames_in_the_order_of_time(clips: Path, server: ChatServer) -> None:
    summary = recaption(recipe(clips, server, frames={"count": 3, "show": "list"}), progress=False)
    assert (summary["images"], summary["captions"]) == (4, 4)
    found = by_first_frame(server)
    assert sorted(found) == [0, 1, 2, 3]
    for number in (1, 2, 3):
        images, text = found[number]
        true = frames_of(scene(number), SIDE)
        assert [close(image, true[at]) for image, at in zip(images, (0, 2, 5), strict=True)] == [True] * 3
        assert text.startswith("The 3 pictures are frames of one video clip, in the order of time.")
    assert len(found[0][0]) == 1  # the image has no clip
    rows = store.read_rows(Storage(str(clips)), summary["layer"], "shard-000000", ["key", "slot", "text"]).to_pylist()
    assert all(row["text"] for row in rows)


def test_a_sheet_is_one_image_that_any_engine_sees(clips: Path, server: ChatServer) -> None:
    layer = recaption(recipe(clips, server, frames={}), progress=False)["layer"]
    images, text = by_first_frame(server)[2]
    true = frames_of(scene(2), SIDE)
    (sheet,) = images
    assert sheet.shape == (2 * SIDE + 2, 2 * SIDE + 2, 3)
    for place, at in enumerate((0, 2, 3, 5)):
        top, left = place // 2 * (SIDE + 2), place % 2 * (SIDE + 2)
        assert close(sheet[top : top + SIDE, left : left + SIDE], true[at])
    assert text.startswith("The picture shows 4 frames of one video clip")
    again = recaption(recipe(clips, server, frames={}), progress=False)
    assert (again["layer"], again["new"]) == (layer, 0)
    others = [plan(recipe(clips, server, **more))["layer"] for more in ({}, {"frames": {"count": 5}})]
    assert len({layer, *others}) == 3
    assert store.layer_recipe(Storage(str(clips)), layer)["engine"]["frames"]["count"] == 4


def test_a_captioner_on_this_machine_sees_the_sheet(clips: Path, tmp_path: Path) -> None:
    section = {"engine": "coca", "model": str(write_captioner(tmp_path / "coca")), "slots": ["short"]}
    texts = []
    for frames in ({}, {"frames": {"count": 4, "show": "sheet"}}):
        own = Recipe.model_validate({"dataset": str(clips), "recaption": section | frames})
        layer = recaption(own, progress=False)["layer"]
        rows = store.read_rows(Storage(str(clips)), layer, "shard-000000", ["key", "raw"]).to_pylist()
        texts.append({row["key"]: row["raw"] for row in rows})
    middle, sheet = texts
    assert len(middle) == len(sheet) == 4
    assert len([key for key in middle if middle[key] != sheet[key]]) == 3  # the clips; the image is as it was


def test_clips_with_the_same_middle_frame_have_captions_of_their_own(
    tmp_path: Path, server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = moving_clips.encode_jpeg(np.full((SIDE, SIDE, 3), 128, np.uint8))
    monkeypatch.setattr(moving_clips, "encode_jpeg", lambda frame: same)
    dataset = write_clips(tmp_path / "ds", [2, 2])
    assert recaption(recipe(dataset, server, frames={}), progress=False)["new"] == 4
    assert len(server.bodies) == 4
    assert recaption(recipe(dataset, server), progress=False)["new"] == 1
    assert len(server.bodies) == 5


def test_a_clip_that_cannot_be_decoded_is_a_flagged_row(
    tmp_path: Path, server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moving_clips, "mp4_of", lambda frames: b"\0\0\0\x08ftypnothing")
    dataset = write_clips(tmp_path / "ds", [2], images=1)
    summary = recaption(recipe(dataset, server, frames={}), progress=False)
    assert (summary["unreadable"], summary["captions"]) == (1, 1)


def test_wrong_settings_are_named(tmp_path: Path, server: ChatServer) -> None:
    with pytest.raises(RecipeError, match=r"^recaption: frames\.show list needs a server"):
        validate(RecaptionConfig, {"engine": "coca", "frames": {"show": "list"}}, "recaption")
    with pytest.raises(RecipeError, match=r"^recaption\.frames\.count"):
        validate(RecaptionConfig, {"frames": {"count": 1}}, "recaption")
    dataset = write_sounds(tmp_path / "ds", [1])
    with pytest.raises(RecipeError, match=r"^recaption\.frames: the dataset has no clips.*source\.parts: \[mp4\]"):
        recaption(recipe(dataset, server, frames={}), progress=False)
