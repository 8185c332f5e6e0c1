"""Clips and sounds of finished runs on the page: drawn once, playable, next to what was measured."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from capstan.pipeline.config import validate
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.html import page
from capstan.pipeline.storage import Storage
from capstan.training.drawing.drawer import Continued, Drawer, Drawn, Kind
from capstan.training.experiment.measure import Measurements
from capstan.training.lecture import media
from capstan.training.lecture.config import LectureConfig
from capstan.training.lecture.page import write_page
from capstan.training.lecture.results import Found

PROMPTS = ["a <red> circle enters", "a blue square"]


class FilmDrawer(Drawer):
    """Draws a square that moves, with a tone."""

    calls: ClassVar[list[list[str]]] = []
    kind: ClassVar[Kind] = "film"

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], *, batch: int = 16, **options: Any) -> Drawn:
        self.calls.append(list(prompts))
        frames = np.zeros((len(prompts), 4, 16, 16, 3), np.uint8)
        for number in range(4):
            frames[:, number, 4:8, 2 * number : 2 * number + 4] = 255
        tone = np.sin(np.arange(3000) * 0.9)[None, :, None].repeat(len(prompts), 0).astype(np.float32)
        if self.kind == "sound":
            return Drawn("sound", tone, rate=3000)
        return Drawn("film", frames, fps=4.0, rate=3000, sounds=tone)


class SoundDrawer(FilmDrawer):
    kind: ClassVar[Kind] = "sound"


class Continuing(FilmDrawer):
    """Draws clips of a single image each, the one that it is given."""

    continues = Continued(4, 4.0, 16)

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], *, batch: int = 16, **options: Any) -> Drawn:
        self.calls.append([str(seed) for seed in seeds])
        return Drawn("clip", np.repeat(options["first_frames"][:, None], 4, axis=1), fps=4.0)


def family(drawer: type[FilmDrawer], draws: str) -> Any:
    return type("Fake", (), {"draws": draws, "open": staticmethod(lambda product, device: drawer())})


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run that draws films."""
    (tmp_path / "run/product").mkdir(parents=True)
    (tmp_path / "run/product/capstan.json").write_text("{}")
    measures = {"in_time": {"value": 0.6, "chance": 0.11, "ceiling": 1.0}}
    (tmp_path / "run/evaluation.json").write_text(json.dumps({"measures": measures}))
    monkeypatch.setattr(media, "family_of", lambda product: family(FilmDrawer, "film"))
    FilmDrawer.calls.clear()
    return tmp_path / "run"


def config(run: Path, *names: str, prompts: Sequence[str] = PROMPTS) -> LectureConfig:
    played = [{"name": name, "run": str(run), "prompts": list(prompts), "paper": "Ruan et al."} for name in names]
    systems = [{"name": "one", "run": "elsewhere"}]
    return validate(LectureConfig, {"run": str(run.parent / "lecture"), "systems": systems, "media": played}, "lecture")


def page_of(lecture: LectureConfig) -> str:
    storage, none = Storage(lecture.run), list[Found]()
    write_page(storage, lecture, none, [], Measurements(storage))
    return storage.read("index.html").decode()


def embedded(html: str, tag: str) -> list[bytes]:
    return [base64.b64decode(data) for data in re.findall(rf"<{tag} [^>]*src=\"data:[^,]*,([^\"]*)\"", html)]


def test_films_are_drawn_once_and_played_with_what_was_measured(run: Path) -> None:
    lecture = config(run, "films")
    storage = Storage(lecture.run)
    for _ in range(2):
        media.draw_media(storage, lecture.media[0])
    assert FilmDrawer.calls == [PROMPTS]
    html = page_of(lecture)
    clips = embedded(html, "video")
    assert len(clips) == 2
    assert all(clip[4:8] == b"ftyp" for clip in clips)
    assert clips[0] == storage.read("played/films/000.mp4")
    assert len(embedded(html, "img")) == 2
    assert "media-src data:;" in html
    assert "a &lt;red&gt; circle enters" in html
    assert "<red>" not in html
    assert all(text in html for text in ("in_time", "0.11", "Ruan et al."))
    media.draw_media(storage, config(run, "films", prompts=["another"]).media[0])
    assert FilmDrawer.calls[1:] == [["another"]]
    (run / "product/capstan.json").write_text('{"trained": "further"}')
    media.draw_media(storage, config(run, "films", prompts=["another"]).media[0])
    assert len(FilmDrawer.calls) == 3


def test_sounds_are_played_too(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "family_of", lambda product: family(SoundDrawer, "sound"))
    (run / "evaluation.json").unlink()
    lecture = config(run, "sounds")
    media.draw_media(Storage(lecture.run), lecture.media[0])
    html = page_of(lecture)
    assert [sound[:4] for sound in embedded(html, "audio")] == [b"RIFF", b"RIFF"]
    assert "Not measured" in html


def test_images_are_continued(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "family_of", lambda product: family(Continuing, "clip"))
    files = [run.parent / name for name in ("one.png", "two.png")]

    def paint(*colours: str) -> None:
        for file, colour in zip(files, colours, strict=True):
            Image.new("RGB", (16, 16), colour).save(file)

    def played(**start: Any) -> LectureConfig:
        one = {"name": "svd", "run": str(run), **start}
        folder = str(run.parent / "lecture")
        systems = [{"name": "one", "run": "elsewhere"}]
        return validate(LectureConfig, {"run": folder, "systems": systems, "media": [one]}, "lecture")

    paint("red", "blue")
    lecture = played(images=[str(file) for file in files])
    for _ in range(2):
        media.draw_media(Storage(lecture.run), lecture.media[0])
    assert FilmDrawer.calls == [["0", "1"]]
    html = page_of(lecture)
    assert len(embedded(html, "video")) == 2
    assert "two.png" in html
    paint("red", "green")  # another image under the same name
    media.draw_media(Storage(lecture.run), lecture.media[0])
    assert len(FilmDrawer.calls) == 2
    with pytest.raises(RecipeError, match=r"^lecture\.media\.svd\.images: is missing"):
        media.draw_media(Storage(lecture.run), played(prompts=PROMPTS).media[0])
    files[0].write_bytes(b"no image")
    with pytest.raises(RecipeError, match=r"^lecture\.media\.svd\.images: cannot read .*one\.png"):
        media.draw_media(Storage(lecture.run), lecture.media[0])
    files[0].unlink()
    with pytest.raises(RecipeError, match=r"^lecture\.media\.svd\.images: cannot read .*one\.png"):
        media.draw_media(Storage(lecture.run), lecture.media[0])
    with pytest.raises(RecipeError, match="svd needs either prompts or images"):
        played(prompts=PROMPTS, images=["one.png"])
    monkeypatch.setattr(media, "family_of", lambda product: family(FilmDrawer, "film"))
    with pytest.raises(RecipeError, match=r"^lecture\.media\.svd\.images: this model continues no image"):
        media.draw_media(Storage(lecture.run), played(images=[str(files[1])]).media[0])


def test_a_page_without_media_allows_none(run: Path) -> None:
    assert "media-src" not in page_of(config(run))
    assert "media-src" not in page.Page("x", page.note('class="player"')).html()


def test_what_draws_no_clips_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "family_of", lambda product: family(FilmDrawer, "image"))
    lecture = config(run, "films")
    with pytest.raises(RecipeError, match=r"^lecture\.media\.films\.run: .* draws no clips or sounds"):
        media.draw_media(Storage(lecture.run), lecture.media[0])
    with pytest.raises(RecipeError, match=r"^lecture: media has films twice"):
        config(run, "films", "films")
    with pytest.raises(RecipeError, match=r"^lecture\.media\.0\.prompts|^lecture\.media"):
        config(run, "films", prompts=[])
