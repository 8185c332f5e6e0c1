"""Duplicates at scale: seconds and peak memory, exactness, precision and recall on planted ones.

    python benchmarks/dedup.py [--rows 10000000] [--only random|crowded|exact|semantic|workers|world|photos]

Each part runs in a process of its own, which has its own peak memory.

random     random hashes, with near ones among them
crowded    also what the web holds: equal hashes, flat images, templates with other words in them
exact      the outcome against a comparison of every row with every kept one
semantic   a million embeddings, and what clusters miss
workers    the same embeddings as a build keeps them, by one process, and by two workers: what this process needs
world      the captioned world's planted duplicates
photos     photographs saved again, smaller, or with another brightness
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from capstan.pipeline import config  # noqa: E402
from capstan.pipeline.config import WorldSource  # noqa: E402
from capstan.pipeline.image.decode import StoredImage, decode  # noqa: E402
from capstan.pipeline.image.phash import COLOUR_BYTES, read_colours  # noqa: E402
from capstan.pipeline.ingest.job import Staged  # noqa: E402
from capstan.pipeline.score.store import embeddings  # noqa: E402
from capstan.pipeline.select import hash_pairs, near_duplicates  # noqa: E402
from capstan.pipeline.select.semantic.clusters import find_semantic, unit  # noqa: E402
from capstan.pipeline.select.semantic.on_workers import VectorFiles  # noqa: E402
from capstan.pipeline.storage import Storage  # noqa: E402

DISTANCE = 4
SETTINGS = config.Dedup()
TOLERANCE = SETTINGS.colours or 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--embeddings", type=int, default=1_000_000)
    parser.add_argument("--scenes", type=int, default=20_000)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        PARTS[arguments.part](arguments)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"  peak memory {peak:.2f} GiB")
        return
    print(f"{len(os.sched_getaffinity(0))} cores, numpy {np.__version__}")
    for part in [arguments.only] if arguments.only else PARTS:
        print(f"{part}:", flush=True)
        passed_on = ["--rows", "--embeddings", "--scenes"]
        values = [str(getattr(arguments, name[2:])) for name in passed_on]
        extra = [text for pair in zip(passed_on, values, strict=True) for text in pair]
        subprocess.run([sys.executable, __file__, "--part", part, *extra], check=True)


# Hashes --------------------------------------------------------------------------------------------------------------


def random_hashes(n: int, seed: int = 0) -> np.ndarray:
    """Return random hashes; a twentieth are at most 4 bits from another."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, n, dtype=np.uint64)
    near = rng.choice(n, n // 20, replace=False)
    hashes[near] = flipped(hashes[rng.integers(0, n, len(near))], rng, 4)
    return hashes


def flipped(hashes: np.ndarray, rng: np.random.Generator, bits: int, low: int = 0, high: int = 64) -> np.ndarray:
    """Return the hashes with up to `bits` of the bits [low, high) changed."""
    hashes = hashes.copy()
    for _ in range(bits):
        bit = rng.integers(low, high, len(hashes), dtype=np.uint64)
        hashes ^= rng.integers(0, 2, len(hashes), dtype=np.uint64) << bit
    return hashes


def crowded_hashes(n: int, seed: int = 0) -> np.ndarray:
    """Return hashes that crowd together.

    A tenth of the rows are flat images with hash 0, a tenth repeat one of 1,000 hashes, a tenth are one template with
    20 bits for the words in it, and a tenth are 200 templates with some bits changed.
    """
    rng = np.random.default_rng(seed)
    hashes, tenth = random_hashes(n, seed), n // 10
    hashes[:tenth] = 0
    hashes[tenth : 2 * tenth] = rng.integers(0, 2**64, 1000, dtype=np.uint64)[rng.integers(0, 1000, tenth)]
    hashes[2 * tenth : 3 * tenth] = (0xBEEF << 40) + rng.integers(0, 2**20, tenth, dtype=np.uint64)
    templates = rng.integers(0, 2**64, 200, dtype=np.uint64)[rng.integers(0, 200, tenth)]
    hashes[3 * tenth : 4 * tenth] = flipped(templates, rng, 8)
    return rng.permutation(hashes)


def some_colours(hashes: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return uint8 [n, COLOUR_BYTES] of 64 palettes, which near hashes may share."""
    rng = np.random.default_rng(seed)
    looks = rng.integers(0, 256, (64, COLOUR_BYTES), dtype=np.uint8)
    return looks[rng.integers(0, 64, len(hashes))]


def timed(hashes: np.ndarray, colours: np.ndarray | None, distance: int = DISTANCE) -> None:
    order, sums = np.arange(len(hashes)), np.arange(len(hashes), dtype=np.uint64).reshape(-1, 1)
    start = time.perf_counter()
    found = near_duplicates.find_duplicates(
        order, sums, hashes, exact=True, distance=distance, colours=colours, tolerance=TOLERANCE
    )
    seconds, kept = time.perf_counter() - start, int((found.kept < 0).sum())
    said = "with colours" if colours is not None else "hashes alone"
    print(f"  {len(hashes):,} rows, distance {distance}, {said}: {seconds:.1f} s, {kept:,} kept")


def random_part(arguments: argparse.Namespace) -> None:
    for distance in (DISTANCE, SETTINGS.perceptual or 0):
        timed(random_hashes(arguments.rows), None, distance)


def crowded_part(arguments: argparse.Namespace) -> None:
    hashes = crowded_hashes(arguments.rows)
    timed(hashes, None)
    timed(hashes, some_colours(hashes))


def exact_part(arguments: argparse.Namespace) -> None:
    n = min(100_000, arguments.rows)
    for name, hashes in {"random": random_hashes(n), "crowded": crowded_hashes(n)}.items():
        for colours in (None, some_colours(hashes)):
            order, sums = np.arange(n), np.arange(n, dtype=np.uint64).reshape(-1, 1)
            found = near_duplicates.find_duplicates(
                order, sums, hashes, exact=False, distance=DISTANCE, colours=colours, tolerance=TOLERANCE
            )
            same = np.array_equal(found.kept, brute_force(hashes, colours))
            print(f"  {name}, {n:,} rows, {'hashes' if colours is None else 'colours'}: {'equal' if same else 'WRONG'}")
            assert same


def brute_force(hashes: np.ndarray, colours: np.ndarray | None) -> np.ndarray:
    """Compare each row with every kept one before it."""
    near, kept, count = np.full(len(hashes), -1), np.zeros(len(hashes), np.int64), 0
    held = np.zeros_like(hashes)
    for row, own in enumerate(hashes):
        (close,) = np.nonzero(np.bitwise_count(held[:count] ^ own) <= DISTANCE)
        if colours is not None and len(close):
            other = np.broadcast_to(colours[row], (len(close), COLOUR_BYTES))
            close = close[hash_pairs.colours_agree(colours[kept[close]], other, TOLERANCE)]
        if len(close):
            near[row] = kept[close[0]]
        else:
            kept[count], held[count] = row, own
            count += 1
    return near


# Embeddings ----------------------------------------------------------------------------------------------------------


def semantic_part(arguments: argparse.Namespace) -> None:
    n, dim, threshold = arguments.embeddings, 512, 0.95
    with tempfile.TemporaryDirectory() as folder:
        rows = np.memmap(Path(folder) / "embeddings.f16", np.float16, "w+", shape=(n, dim))
        copies = _fill(rows)
        order = np.arange(n)
        start = time.perf_counter()
        near = find_semantic(rows, order, threshold, first=n)
        seconds = time.perf_counter() - start
        repeats = int((near >= 0).sum())
        print(f"  {n:,} x {dim} float16, cosine {threshold}: {seconds:.0f} s, {repeats:,} repeat another")
        sample = np.sort(np.random.default_rng(1).choice(copies, min(2000, len(copies)), replace=False))
        found, missed = int((near[sample] >= 0).sum()), 0
        left = sample[near[sample] < 0]
        (kept,) = np.nonzero(near < 0)
        for start_row in range(0, len(kept), 50_000):
            some = kept[start_row : start_row + 50_000]
            close = (unit(rows[left]) @ unit(rows[some]).T >= threshold) & (some[None, :] < left[:, None])
            missed += int(close.any(axis=1).sum())
        print(f"  recall {found / max(found + missed, 1):.4f} of rows near a kept row, on {len(sample):,} rows")


def _fill(rows: np.ndarray, topics: int = 5000) -> np.ndarray:
    """Return embeddings of `topics` kinds, and the tenth of the rows that repeat an earlier row with a little noise."""
    rng = np.random.default_rng(0)
    n, dim = rows.shape
    centres = rng.standard_normal((topics, dim), np.float32)
    for start in range(0, n, 50_000):
        count = min(50_000, n - start)
        rows[start : start + count] = centres[rng.integers(0, topics, count)] + rng.standard_normal((count, dim))
    copies = rng.choice(np.arange(1, n), n // 10, replace=False)
    for start in range(0, len(copies), 10_000):
        some = copies[start : start + 10_000]
        noise = rng.standard_normal((len(some), dim)) * 0.3
        rows[some] = rows[(rng.random(len(some)) * some).astype(np.int64)] + noise
    return copies


def workers_part(arguments: argparse.Namespace) -> None:
    n, dim, threshold, rows = arguments.embeddings, 512, 0.95, 10_000
    with tempfile.TemporaryDirectory() as folder:
        storage, units = Storage(folder), list[Staged]()
        vectors = np.memmap(Path(folder) / "embeddings.f16", np.float16, "w+", shape=(n, dim))
        _fill(vectors)
        for number, start in enumerate(range(0, n, rows)):
            own = vectors[start : start + rows]
            column = pa.FixedSizeListArray.from_arrays(pa.array(own.reshape(-1)), dim)
            name = f"scores/e/{number}.parquet"
            storage.write_table(name, pa.table({"embedding": column, "error": [""] * len(own)}))
            units.append(Staged(f"0000-{number:06d}", name, "", len(own), (("embeddings", name),)))
        files = VectorFiles(
            storage, units, "embeddings", config.Resources(executor="processes", cpus=2), progress=False
        )
        found = []
        for how in ("two workers", "one process"):  # the peak of a process never falls
            before, start = time.process_time(), time.perf_counter()
            if how == "one process":
                held = embeddings(storage, units, Path(folder))
                found.append(find_semantic(held, np.arange(n), threshold, first=n))
            else:
                found.append(files.find(np.arange(n), threshold, first=n))
            seconds, cpu = time.perf_counter() - start, time.process_time() - before
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(f"  {n:,} x {dim}, {how}: {seconds:.0f} s, {cpu:.1f} CPU s of this process, peak {peak:.2f} GiB")
        print(f"  {int((found[0] != found[1]).sum())} rows decided differently, {int((found[0] >= 0).sum()):,} repeats")


# Images ------------------------------------------------------------------------------------------------------------


def world_part(arguments: argparse.Namespace) -> None:
    world = WorldSource(scenes=arguments.scenes)
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        starts = range(0, world.scenes, 500)
        measured = [row for part in pool.map(_measure, [world] * len(starts), starts) for row in part]
    shown, sums, hashes, colours, area = zip(*measured, strict=True)
    order = near_duplicates.precedence(np.zeros(len(shown), np.int64), np.array(area))
    for tolerance in (None, TOLERANCE):
        found = near_duplicates.find_duplicates(
            order,
            np.array(sums, "S64"),
            np.array(hashes, np.uint64),
            exact=True,
            distance=SETTINGS.perceptual,
            colours=None if tolerance is None else _unpacked(colours),
            tolerance=tolerance or 0,
        )
        repeats = np.flatnonzero(found.kept >= 0)
        right = int((np.array(shown)[repeats] == np.array(shown)[found.kept[repeats]]).sum())
        planted = len(shown) - len(set(shown))
        said = "hashes alone" if tolerance is None else f"colours within {tolerance}"
        precision, recall = right / max(len(repeats), 1), right / planted
        print(f"  {len(shown):,} images, {planted:,} planted, {said}: precision {precision:.4f}, recall {recall:.4f}")


def _measure(world: WorldSource, start: int) -> list[tuple[int, str, int, str, int]]:
    from capstan.pipeline.world.defects import defect, shown_index
    from capstan.pipeline.world.scene import vocabulary
    from capstan.pipeline.world.server import file_bytes

    found, vocab = [], vocabulary(world)
    for index in range(start, min(start + 500, world.scenes)):
        if defect(world, index) not in ("missing", "html"):
            image = decode(file_bytes(world, vocab, index)[1], config.Image())
            if isinstance(image, StoredImage):
                area = image.original_width * image.original_height
                found.append((shown_index(world, index), image.sha256, image.phash, image.colours, area))
    return found


def photos_part(arguments: argparse.Namespace) -> None:
    """Measure how many changed photographs (and quarters of them) are found to be near their original."""
    from PIL import Image, ImageEnhance

    def changes(photo: Image.Image) -> dict[str, bytes]:
        def smaller(factor: float) -> Image.Image:
            return photo.resize((int(photo.width * factor), int(photo.height * factor)), Image.Resampling.LANCZOS)

        return {
            "quality 60": _saved(photo, "JPEG", 60),
            "quality 30": _saved(photo, "JPEG", 30),
            "WebP 75": _saved(photo, "WEBP", 75),
            "0.7 x": _saved(smaller(0.7), "JPEG", 90),
            "0.45 x": _saved(smaller(0.45), "JPEG", 85),
            "brightness + 5 %": _saved(ImageEnhance.Brightness(photo).enhance(1.05), "JPEG", 85),
            "brightness - 8 %": _saved(ImageEnhance.Brightness(photo).enhance(0.92), "JPEG", 85),
            "contrast + 10 %": _saved(ImageEnhance.Contrast(photo).enhance(1.1), "JPEG", 85),
        }

    near: dict[str, list[tuple[bool, bool]]] = {}
    photos = _photos()
    for photo in photos:
        first = _decoded(_saved(photo, "JPEG", 95))
        for change, data in changes(photo).items():
            other = _decoded(data)
            by_hash = (first.phash ^ other.phash).bit_count() <= (SETTINGS.perceptual or 0)
            agree = hash_pairs.colours_agree(_unpacked([first.colours]), _unpacked([other.colours]), TOLERANCE)[0]
            near.setdefault(change, []).append((by_hash, by_hash and bool(agree)))
    print(f"  {len(photos)} photographs, distance {SETTINGS.perceptual}; recall by hash, and by hash and colours")
    for change, hits in near.items():
        by_hash, both = np.array(hits).mean(axis=0)
        print(f"  {change:18} {by_hash:.3f} {both:.3f}")
    by_hash, both = np.array([hit for hits in near.values() for hit in hits]).mean(axis=0)
    print(f"  {'all':18} {by_hash:.3f} {both:.3f}")


def _photos() -> list:
    from PIL import Image
    from skimage import data
    from sklearn.datasets import load_sample_image

    names = ["astronaut", "chelsea", "coffee", "rocket", "retina", "hubble_deep_field", "camera", "coins", "moon"]
    names += ["immunohistochemistry", "brick", "grass", "gravel", "clock", "page", "text"]
    whole = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in names]
    whole += [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    halves = [(photo, photo.width // 2, photo.height // 2) for photo in whole if min(photo.size) >= 300]
    return whole + [p.crop((x, y, x + w, y + h)) for p, w, h in halves for x in (0, w) for y in (0, h)]


def _saved(photo, kind: str, quality: int) -> bytes:
    file = io.BytesIO()
    photo.save(file, kind, quality=quality)
    return file.getvalue()


def _decoded(data: bytes) -> StoredImage:
    image = decode(data, config.Image(min_size=16))
    assert isinstance(image, StoredImage)
    return image


def _unpacked(colours) -> np.ndarray:
    return read_colours(pa.chunked_array([pa.array(list(colours), pa.string())]))


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "random": random_part,
    "crowded": crowded_part,
    "exact": exact_part,
    "semantic": semantic_part,
    "workers": workers_part,
    "world": world_part,
    "photos": photos_part,
}

if __name__ == "__main__":
    main()
