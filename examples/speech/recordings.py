"""Asterisk's recordings and their transcripts → a folder of WAVs with metadata.jsonl, for `capstan cut`

    apt-get download asterisk-core-sounds-en asterisk-core-sounds-en-wav
    for package in asterisk-core-sounds-en*.deb; do dpkg -x $package asterisk; done
    python examples/speech/recordings.py asterisk out/recordings

A line of metadata.jsonl has `file_name`, `caption` (the transcript) and `speech`, which is false for tones and silence.
Allison Smith speaks; recordings and transcripts are under CC BY-SA 3.0.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

TEXTS = "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
SOUNDS = "usr/share/asterisk/sounds/en_US_f_Allison"
# What is heard but not said stands in brackets: "[ascending tones]"; and how it is written: "at [@]".
BRACKETS = re.compile(r"\[[^]]*\]|\([^)]*\)|<[^>]*>")


def transcripts(text: str) -> dict[str, str]:
    """Return name → transcript, of lines `name: transcript`; others are comments."""
    lines = (line.partition(":") for line in text.splitlines() if not line.startswith(";"))
    return {name.strip(): said.strip() for name, colon, said in lines if colon and said.strip()}


def described(transcript: str) -> tuple[str, bool]:
    """Return the caption of a transcript, and whether anything is said.

    >>> described("at [@]"), described("[ascending tones]")
    (('at', True), ('ascending tones', False))
    """
    said = " ".join(BRACKETS.sub(" ", transcript).split())
    return (said, True) if said else (transcript.strip("[]()<> ").removeprefix("this is "), False)


def rows(sounds: Path, texts: dict[str, str]) -> Iterator[tuple[dict[str, Any], Path]]:
    """Yield (line of metadata.jsonl, WAV) of the recordings that have a transcript, by name."""
    for file in sorted(sounds.rglob("*.wav")):
        name = file.relative_to(sounds).with_suffix("").as_posix()
        if name in texts:
            caption, speech = described(texts[name])
            yield {"file_name": f"{name}.wav", "caption": caption, "speech": speech}, file


def write(folder: Path, lines: Iterable[tuple[dict[str, Any], Path]]) -> int:
    """Copy the recordings and write, last and at once, metadata.jsonl; return the number of recordings."""
    written = []
    for line, file in lines:
        place = folder / line["file_name"]
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
        written.append(json.dumps(line, ensure_ascii=False) + "\n")
    unfinished = folder / "metadata.jsonl.part"
    unfinished.write_text("".join(written), encoding="utf-8")
    unfinished.replace(folder / "metadata.jsonl")
    return len(written)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("packages", type=Path, help="Folder into which both packages were unpacked.")
    parser.add_argument("folder", type=Path)
    chosen = parser.parse_args()
    texts, sounds = chosen.packages / TEXTS, chosen.packages / SOUNDS
    for needed in (texts, sounds):
        if not needed.exists():
            sys.exit(f"{needed} is not there. Fix: unpack asterisk-core-sounds-en and asterisk-core-sounds-en-wav")
    said = transcripts(gzip.decompress(texts.read_bytes()).decode("utf-8"))
    count = write(chosen.folder, rows(sounds, said))
    print(f"{chosen.folder}: {count:,} recordings, {len(said):,} transcripts")


if __name__ == "__main__":
    main()
