"""Edited copies of photographs: which of them near-duplicate hashes find.

    python benchmarks/copies.py [--model sscd.onnx --threshold 0.75 --size 320]

Photographs that come with scikit-image and scikit-learn are decoded by Capstan as a build does (256 pixels), and so is
each edited copy. Shares are of copies within the distance of their original: the 64-bit pHash at 4 bits, the same with
the colours that `dedup` compares, PDQ at 31 of 256 bits (Meta's threshold), if pdqhash is installed, and `dedup.copies`
with open_nsfw's features or the network of an ONNX file. The last columns are the largest distance of pHashes and the
smallest cosine of descriptors. False matches are pairs of different photographs; for them, the last columns are the
smallest distance and the largest cosine.
"""

from __future__ import annotations

import argparse
import base64
import importlib.util
import io
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from capstan.pipeline import config  # noqa: E402
from capstan.pipeline.image.decode import StoredImage, decode  # noqa: E402
from capstan.pipeline.score.descriptors import Descriptor  # noqa: E402
from capstan.pipeline.select.hash_pairs import colours_agree  # noqa: E402

DISTANCE = 4
PDQ_DISTANCE = 31
SETTINGS = config.Image(size=256, min_size=8)
TOLERANCE = config.Dedup().colours or 0
NAMES = (
    "astronaut brick camera chelsea coffee coins grass gravel hubble_deep_field ihc moon motorcycle_left retina rocket"
)


def crop(share: float) -> Callable[[Image.Image], Image.Image]:
    """Return an edit that cuts `share` of width and height, half of it at each side."""
    return lambda image: ImageOps.crop(
        image, tuple(round(side * share / 2) for side in (image.width, image.height) * 2)
    )


def with_caption_bar(image: Image.Image) -> Image.Image:
    bar = max(16, image.height // 8)
    out = ImageOps.expand(image, (0, 0, 0, bar), "black")
    ImageDraw.Draw(out).text((8, image.height + 2), "a caption under the picture", "white")
    return out


def rotated(image: Image.Image) -> Image.Image:
    """Rotate by 10°, and cut to the largest upright part of the same aspect without corners."""
    turned = image.rotate(10, Image.Resampling.BICUBIC)
    return crop(0.3)(turned)


EDITS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "saved as JPEG, quality 30": lambda image: image,
    "half size": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS),
    "odd size, 61%": lambda image: image.resize((image.width * 61 // 100 | 1, image.height * 61 // 100 | 1)),
    "grey": lambda image: image.convert("L").convert("RGB"),
    "20% brighter": lambda image: image.point(lambda level: min(255, round(level * 1.2))),
    "crop 2%": crop(0.02),
    "crop 10%": crop(0.1),
    "crop 40%": crop(0.4),
    "mirrored": ImageOps.mirror,
    "white border of 5%": lambda image: ImageOps.expand(image, max(image.size) // 20, "white"),
    "caption bar": with_caption_bar,
    "rotated by 10°": rotated,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="open_nsfw", help="ONNX file of a descriptor")
    parser.add_argument("--threshold", type=float, default=0.75)
    parser.add_argument("--size", type=int, help="of prepared images; default: the network's, or 320")
    arguments = parser.parse_args()
    copies = config.CopyDetection(**vars(arguments))
    pdq = importlib.util.find_spec("pdqhash") is not None
    measure = Measure(pdq, Descriptor(copies), copies.threshold)
    photos = photographs()
    originals = [measure.hashed(image, 95) for image in photos]
    print(f"{len(photos)} photographs; copies: {copies.model} at {copies.threshold}")
    print("| edit | pHash | pHash and colours | PDQ | copies | pHash distance | cosine |")
    print("|---|---|---|---|---|---|---|")
    for name, edit in EDITS.items():
        edited = [measure.hashed(edit(image), 30 if "quality 30" in name else 90) for image in photos]
        pairs = list(zip(originals, edited, strict=True))
        print(f"| {name} | {measure.shares(pairs)} | {max(map(distance, pairs))} | {min(map(cosine, pairs)):.2f} |")
    pairs = list(itertools.combinations(originals, 2))
    print(f"| false matches | {measure.shares(pairs)} | {min(map(distance, pairs))} | {max(map(cosine, pairs)):.2f} |")


Hashes = tuple[StoredImage, np.ndarray | None, np.ndarray]  # what Capstan stores, PDQ, descriptor


@dataclass(frozen=True)
class Measure:
    """How two images are compared."""

    pdq: bool
    descriptor: Descriptor
    threshold: float

    def hashed(self, image: Image.Image, quality: int) -> Hashes:
        """Return what Capstan stores of the image saved as JPEG, its PDQ hash and its descriptor."""
        out = io.BytesIO()
        image.save(out, "jpeg", quality=quality)
        stored = decode(out.getvalue(), SETTINGS)
        assert isinstance(stored, StoredImage), stored
        pixels = np.asarray(Image.open(io.BytesIO(stored.jpeg)).convert("RGB"))
        described = self.descriptor(pixels)
        if not self.pdq:
            return stored, None, described
        import pdqhash

        return stored, pdqhash.compute(pixels)[0], described

    def shares(self, pairs: list[tuple[Hashes, Hashes]]) -> str:
        """Return the shares of pairs that match, as cells of the table."""
        near = [distance(pair) <= DISTANCE for pair in pairs]
        both = [hit and agree(pair) for hit, pair in zip(near, pairs, strict=True)]
        by_pdq = [int((a[1] != b[1]).sum()) <= PDQ_DISTANCE for a, b in pairs] if self.pdq else []
        copies = [cosine(pair) >= self.threshold for pair in pairs]
        return " | ".join(f"{np.mean(hits):.2f}" if hits else "–" for hits in (near, both, by_pdq, copies))


def cosine(pair: tuple[Hashes, Hashes]) -> float:
    return float(pair[0][2] @ pair[1][2])


def distance(pair: tuple[Hashes, Hashes]) -> int:
    return (pair[0][0].phash ^ pair[1][0].phash).bit_count()


def agree(pair: tuple[Hashes, Hashes]) -> bool:
    one, other = (np.frombuffer(base64.b64decode(stored.colours), np.uint8).reshape(1, -1) for stored, *_ in pair)
    return bool(colours_agree(one, other, TOLERANCE)[0])


def photographs() -> list[Image.Image]:
    """Return the photographs of the installed packages, as RGB."""
    import skimage
    import sklearn.datasets

    folder = Path(skimage.__file__).parent / "data"
    paths = [path for name in NAMES.split() for path in folder.glob(f"{name}.*")]
    images = [Image.open(path).convert("RGB") for path in paths]
    return images + [Image.fromarray(pixels) for pixels in sklearn.datasets.load_sample_images().images]


if __name__ == "__main__":
    main()
