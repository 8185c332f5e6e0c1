"""examples/speech: transcripts, and the dataset that its recipes make of tones written here in place of speech."""

from __future__ import annotations

import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import duckdb
import numpy as np
import pytest
from moving import sound_file, tone
from repo import ROOT

import capstan
from capstan.pipeline.clips.cut import cut as cut_clips

FOLDER = ROOT / "examples/speech"


def module() -> ModuleType:
    """Return the script of the example, imported without running it."""
    spec = importlib.util.spec_from_file_location("speech_recordings", FOLDER / "recordings.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


recordings = module()
TRANSCRIPTS = """; Core sounds

activated: Activated.
digits/1: one
beep: [this is a simple beep tone]
silence/1: (1 second of silence)
long: Press 1: it is long.
short: Oh.
never: There is no such file.
"""
SECONDS = {"activated": 1.0, "digits/1": 0.5, "beep": 0.4, "silence/1": 1.0, "long": 13.0, "short": 0.2, "other": 1.0}


def packages(folder: Path) -> None:
    """Write the files of both packages as they unpack."""
    texts, sounds = folder / recordings.TEXTS, folder / recordings.SOUNDS
    texts.parent.mkdir(parents=True)
    texts.write_bytes(gzip.compress(TRANSCRIPTS.encode()))
    for number, (name, seconds) in enumerate(SECONDS.items()):
        file = sounds / f"{name}.wav"
        file.parent.mkdir(parents=True, exist_ok=True)
        samples = (tone(seconds) * (0.0 if name.startswith("silence") else 1 - number / 20)).astype(np.int16)
        file.write_bytes(sound_file(samples, "wav", "pcm_s16le", 8000))


def test_what_is_in_brackets_is_not_said() -> None:
    said = recordings.transcripts(TRANSCRIPTS)
    assert len(said) == 7
    assert said["long"] == "Press 1: it is long."
    assert recordings.described("Please leave your message. (simple tone sound plays)") == (
        "Please leave your message.",
        True,
    )
    assert recordings.described("space [ ]") == ("space", True)
    assert recordings.described("[this is a simple beep tone]") == ("a simple beep tone", False)
    assert recordings.described("<beep ascending>") == ("beep ascending", False)


@pytest.mark.integration
def test_the_recipes_keep_speech_and_say_why_the_rest_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    packages(tmp_path / "asterisk")
    command = [sys.executable, str(FOLDER / "recordings.py"), "asterisk", "out/recordings"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "out/recordings: 6 recordings, 7 transcripts\n", done.stderr
    overrides = {"resources": {"cpus": 1}}
    made_clips = cut_clips(capstan.load_recipe(FOLDER / "cut.yaml", overrides), progress=False)
    assert (made_clips["counts"]["clips"], made_clips["failed"]) == (4, {"no_clip": 1, "too_long": 1})
    summary = capstan.build(capstan.load_recipe(FOLDER / "recipe.yaml", overrides), progress=False)
    assert summary.licenses == {"CC-BY-SA-3.0": 2}
    rows = duckdb.sql("select caption, outcome, reason, end_s from 'out/speech/ledger/*.parquet' order by all")
    assert rows.fetchall() == [
        ("1 second of silence", "rejected", "heard", 1.0),
        ("Activated.", "kept", "", 1.0),
        ("a simple beep tone", "rejected", "speech", 0.4),
        ("one", "kept", "", 0.5),
    ]


def test_without_the_packages_the_script_says_so(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "recordings.py"), str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Fix: unpack asterisk-core-sounds-en" in done.stderr
    assert not (tmp_path / "out").exists()
    line = {"file_name": "a/b.wav", "caption": "b", "speech": True}
    (tmp_path / "b.wav").write_bytes(b"sound")
    assert recordings.write(tmp_path / "in", [(line, tmp_path / "b.wav")]) == 1
    assert json.loads((tmp_path / "in/metadata.jsonl").read_text()) == line
    assert (tmp_path / "in/a/b.wav").read_bytes() == b"sound"
