"""examples/animated_emoji: films of animated pictures drawn here, in place of those of the package."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import duckdb
import numpy as np
import pytest
from PIL import Image, ImageDraw
from repo import ROOT

import capstan
from capstan.pipeline.clips.cut import cut as cut_clips
from capstan.pipeline.media.codec import clip_frames

FOLDER = ROOT / "examples/animated_emoji"
SIDE = 96


def module() -> ModuleType:
    """Return the script of the example, imported without running it."""
    spec = importlib.util.spec_from_file_location("animated_emoji_clips", FOLDER / "clips.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


clips = module()


def drawn(folder: Path, name: str, colour: str, count: int = 36, moving: bool = True) -> Path:
    """Write an animated WebP of a disc that crosses a transparent picture; return its path."""
    folder.mkdir(exist_ok=True)
    pictures = []
    for number in range(count):
        picture = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0))
        left = number * 2 if moving else 20 + number % 2  # a still picture is stored once
        ImageDraw.Draw(picture).ellipse((left, 30, left + (30 if moving else 3), 60), colour)
        pictures.append(picture)
    file = folder / f"{name}.webp"
    pictures[0].save(file, save_all=True, append_images=pictures[1:], duration=42, lossless=True)
    return file


def test_names_of_files_are_code_points() -> None:
    assert clips.points(Path("1f385-1f3fb.webp")) == ["1F385", "1F3FB"]
    assert clips.points(Path("1f3f4-e0067_e0062.webp")) == ["1F3F4", "E0067", "E0062"]
    assert [clips.tone(code.split("-")) for code in ("1F385-1F3FB", "1F385", "1F91D-1F3FB-1F3FF")] == [
        "light",
        "none",
        "two",
    ]


def test_a_film_lasts_as_long_as_the_animation_and_is_on_white(tmp_path: Path) -> None:
    frames, fps = clip_frames(clips.film(drawn(tmp_path, "1f600", "red"), 48, 24), 48)
    assert (fps, len(frames), frames[0].shape) == (24, 37, (48, 48, 3))  # 36 frames of 42 ms
    assert np.abs(frames[0][2, -2].astype(int) - 255).max() < 4
    red = [np.flatnonzero(frame[22, :, 1] < 128).mean() for frame in frames]
    assert red[0] < 10 < 35 < red[-1]
    assert (np.diff(red) >= -0.01).all()
    assert len(clip_frames(clips.film(drawn(tmp_path, "1f601", "red", count=1), 48, 24), 48)[0]) == 1


@pytest.mark.integration
def test_the_recipes_keep_what_moves_and_say_why_the_rest_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = [
        drawn(tmp_path / "assets", "1f600", "gold"),
        drawn(tmp_path / "assets", "1f385", "red"),
        drawn(tmp_path / "assets", "1f385-1f3fb", "blue"),
        drawn(tmp_path / "assets", "1f601", "gold", moving=False),
        drawn(tmp_path / "assets", "1f602", "gold", count=1),
        drawn(tmp_path / "assets", "1f603", "gold"),
        drawn(tmp_path / "assets", "1f600-fe0f", "green"),
    ]
    names = {"1F600": "grinning face", "1F385": "Santa Claus", "1F385-1F3FB": "Santa Claus light skin tone"}
    names |= {"1F601": "beaming face", "1F602": "face with tears of joy"}
    made = clips.films(files, lambda code: names.get("-".join(code)))
    assert clips.write(Path("out/emoji-films"), made) == 5
    overrides = {"resources": {"cpus": 1}}
    made_clips = cut_clips(capstan.load_recipe(FOLDER / "cut.yaml", overrides), progress=False)
    assert (made_clips["counts"]["clips"], made_clips["failed"]) == (4, {"no_clip": 1})
    summary = capstan.build(capstan.load_recipe(FOLDER / "recipe.yaml", overrides), progress=False)
    assert summary.licenses == {"MIT": 2}
    rows = duckdb.sql("select caption, outcome, reason from 'out/animated-emoji/ledger/*.parquet' order by all")
    assert rows.fetchall() == [
        ("Santa Claus", "kept", ""),
        ("Santa Claus light skin tone", "rejected", "tone"),
        ("beaming face", "rejected", "moves"),
        ("grinning face", "kept", ""),
    ]


def test_without_the_package_the_script_says_so(tmp_path: Path) -> None:
    def run(assets: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(FOLDER / "clips.py"), str(assets), str(tmp_path / "out")]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert "no WebP file. Fix: unpack" in run(tmp_path).stderr
    drawn(tmp_path, "1f600", "gold", count=2)
    done = run(tmp_path)
    if importlib.util.find_spec("emoji") is None:
        assert done.returncode == 1
        assert "Fix: pip install" in done.stderr
        pytest.skip("not installed: emoji; see examples/animated_emoji/README.md")
    assert done.returncode == 0, done.stderr
    (line,) = map(json.loads, (tmp_path / "out/metadata.jsonl").read_text().splitlines())
    assert line == {"file_name": "1F600.mp4", "caption": "grinning face", "code": "1F600", "tone": "none"}
