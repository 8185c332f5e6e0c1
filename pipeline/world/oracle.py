"""Image → the things in it, and how well they match a prompt's scene.

The oracle measures with the known palette and shapes of the captioned world; nothing in it is learned. It also handles
generated images, which are soft: colours are judged in the cores of things, shapes by overlap with templates.
`accuracy_on_clean` measures how far it can be trusted; `chance` is the score of images unrelated to the prompt.

    image → background → pieces that stand out from it → colour, outline, shape, size, texture of each
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np

from capstan.pipeline.world.captions import overlap
from capstan.pipeline.world.render import INK, outline, render
from capstan.pipeline.world.scene import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing, Vocabulary, draw_scene, relation

MEASURES: Final = ("background", "colours", "count", "colour_shape", "relation")
_TITLES: Final = {"colour_shape": "colour + shape"}

_WORK: Final = 96  # images are judged at this side, pixels
_BORDER: Final = 0.06  # share of the side that is taken as background
_SHADES: Final = (1.0, (1 + INK) / 2, INK)  # a thing shows its colour, its ink, and blends of the two
_CONTRAST: Final = 0.5  # of the way from the background to a thing's colour: from here on a pixel belongs to the thing
_NEAR: Final = 9  # side of the window in which pixels are compared, pixels
_CORE: Final = 0.85  # of the window's greatest distance from the background
_LEAST_AREA: Final = 0.008  # of the image; the smallest thing covers 0.025
_TEMPLATE: Final = 48  # side of the normalised masks that are compared, pixels
_BLURS: Final = (0.0, 0.12, 0.22)  # standard deviations of the templates' softness, in radii
_SMALL_BELOW: Final = 0.208  # radius between small and large things; softness makes things look larger
_SPREAD: Final = 0.2  # standard deviation along colour (0) … ink (1) above which a thing is not plain
_STRIPED: Final = 0.5  # share of that variance that is between columns


@dataclass(frozen=True)
class Parsed:
    """A parsed image; things from left to right."""

    background: str
    things: tuple[Thing, ...]


def parse(image: np.ndarray) -> Parsed:
    """Find background and things of a square image: uint8 RGB [side, side, 3].

    Raises: ValueError for another shape or type.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected uint8 [height, width, 3], found {image.dtype} {image.shape}")
    method = cv2.INTER_AREA if min(image.shape[:2]) > _WORK else cv2.INTER_LINEAR
    pixels = cv2.resize(image, (_WORK, _WORK), interpolation=method).astype(np.float32)
    background, tint = _background(pixels)
    shades = _nearest(pixels, _palette())
    far = np.linalg.norm(pixels - tint, axis=-1)
    contrast = np.linalg.norm(_palette() - tint, axis=-1)
    standing_out = far > _CONTRAST * contrast[shades]
    # A soft rim that blends with the background shows other colours; the farthest pixels nearby show the true one.
    around = cv2.dilate(far, np.ones((_NEAR, _NEAR), np.uint8))
    core = standing_out & (far > _CORE * around)
    things = []
    for piece, colour in _pieces(standing_out, core, shades // len(_SHADES)):
        name = list(COLOURS)[colour]
        texture = _texture(pixels, piece, name)
        own = piece & (shades // len(_SHADES) == colour) if texture != "plain" else np.zeros_like(piece)
        mask = _filled(piece & (far > _CONTRAST * around) | own)
        if mask.mean() >= _LEAST_AREA:
            things.append(_thing(mask, name, texture))
    things.sort(key=lambda thing: (thing.cell[1], thing.cell[0]))
    return Parsed(background, tuple(things))


def _background(pixels: np.ndarray) -> tuple[str, np.ndarray]:
    """Return (name, actual colour) of the background that most of the border shows."""
    width = round(_BORDER * _WORK)
    border = np.ones(pixels.shape[:2], bool)
    border[width:-width, width:-width] = False
    ring = pixels[border]
    nearest = _nearest(ring, np.array(list(BACKGROUNDS.values()), np.float32))
    most = int(np.bincount(nearest).argmax())
    return list(BACKGROUNDS)[most], np.median(ring[nearest == most], axis=0)


@functools.cache
def _palette() -> np.ndarray:
    """Return every colour in all its shades, one colour after the other: float32 RGB [colours × shades, 3]."""
    colours = np.array(list(COLOURS.values()), np.float32)
    return (colours[:, None, :] * np.array(_SHADES, np.float32)[:, None]).reshape(-1, 3)


def _nearest(pixels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Return the index of the palette colour nearest to each pixel: [..., 3], [n, 3] → int [...]."""
    # |p − c|² without |p|², which is the same for every c.
    distances: np.ndarray = (palette**2).sum(axis=-1) - 2 * pixels.reshape(-1, 3) @ palette.T
    return distances.argmin(axis=-1).reshape(pixels.shape[:-1])


def _pieces(mask: np.ndarray, cores: np.ndarray, colours: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """Return (mask, colour index) of each connected piece; a piece with large areas of two colours is split."""
    number, components = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    pieces: list[tuple[np.ndarray, int]] = []
    for component in range(1, number):
        piece = components == component
        if piece.mean() < _LEAST_AREA:
            continue
        core = piece & cores
        votes = np.bincount(colours[core], minlength=len(COLOURS))
        main = int(votes.argmax())
        blobs = {int(c): _blob(core & (colours == c)) for c in np.flatnonzero(votes >= 0.2 * core.sum())}
        strong = [colour for colour, blob in blobs.items() if blob.any()]
        if len(strong) < 2:
            pieces.append((piece, main))
            continue
        # Each pixel goes to the nearest blob of a strong colour.
        distances = [cv2.distanceTransform((~blobs[c]).astype(np.uint8), cv2.DIST_L2, 3) for c in strong]
        owner = np.argmin(distances, axis=0)
        pieces.extend((piece & (owner == i), colour) for i, colour in enumerate(strong))
    return pieces


def _blob(mask: np.ndarray) -> np.ndarray:
    """Return the mask's largest connected part after opening if it is large enough for a thing, else an empty mask."""
    opened = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, np.ones((5, 5), np.uint8))
    _, components, stats, _ = cv2.connectedComponentsWithStats(opened, connectivity=4)
    areas = stats[1:, cv2.CC_STAT_AREA]
    if not len(areas) or areas.max() < 0.6 * _LEAST_AREA * mask.size:
        return np.zeros_like(mask)
    return components == 1 + areas.argmax()


def _filled(mask: np.ndarray) -> np.ndarray:
    """Fill the mask's holes, which dots leave if their ink resembles the background."""
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(np.zeros(mask.shape, np.uint8), outlines, -1, 1, thickness=cv2.FILLED).astype(bool)


def _thing(mask: np.ndarray, colour: str, texture: str) -> Thing:
    ys, xs = np.nonzero(mask)
    x, y = float(xs.mean() + 0.5) / _WORK, float(ys.mean() + 0.5) / _WORK
    template = _matching(mask)
    r = math.sqrt(mask.mean() / template.area)
    size = "small" if r < _SMALL_BELOW else "large"
    return Thing(colour, template.shape, size, texture, x, y, r)


@dataclass(frozen=True)
class _Template:
    """A shape of circumradius 1, blurred and thresholded at one half."""

    shape: str
    area: float  # of the mask, at circumradius 1
    mask: np.ndarray  # normalised


def _matching(mask: np.ndarray) -> _Template:
    """Return the template with the largest overlap (intersection over union) at equal centroid and area."""
    normal = _normalised(mask)

    def overlapping(template: _Template) -> float:
        return float(np.minimum(normal, template.mask).sum() / np.maximum(normal, template.mask).sum())

    return max(_templates(), key=overlapping)


def _normalised(mask: np.ndarray) -> np.ndarray:
    """Move and scale the mask to a common centroid and area: float32 [_TEMPLATE, _TEMPLATE] in [0, 1]."""
    ys, xs = np.nonzero(mask)
    scale = 0.5 * _TEMPLATE / math.sqrt(len(xs))
    middle = (_TEMPLATE - 1) / 2
    move = np.array([[scale, 0, middle - scale * xs.mean()], [0, scale, middle - scale * ys.mean()]])
    return cv2.warpAffine(mask.astype(np.float32), move, (_TEMPLATE, _TEMPLATE), flags=cv2.INTER_LINEAR)


@functools.cache
def _templates() -> tuple[_Template, ...]:
    """Return each shape sharp and in two degrees of softness."""
    radius = 60.0
    side = round(3 * radius)
    templates = []
    for shape in SHAPES:
        sharp = np.zeros((side, side), np.float32)
        cv2.fillPoly(sharp, [np.round(outline(shape) * radius + side / 2).astype(np.int32)], 1.0)
        for blur in _BLURS:
            soft = cv2.GaussianBlur(sharp, (0, 0), blur * radius) if blur else sharp
            mask = soft > 0.5
            templates.append(_Template(shape, float(mask.sum()) / radius**2, _normalised(mask)))
    return tuple(templates)


def _texture(pixels: np.ndarray, mask: np.ndarray, colour: str) -> str:
    """Classify how brightness varies inside the thing, between its colour (0) and its ink (1)."""
    thin = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8), iterations=2, borderValue=0).astype(bool)
    core = thin if thin.sum() >= mask.sum() / 3 else mask
    plain = np.array(COLOURS[colour], np.float32)
    axis = plain * INK - plain
    along = np.where(core, (pixels - plain) @ axis / (axis @ axis), 0)
    total = along[core].var()
    if math.sqrt(total) < _SPREAD:
        return "plain"
    heights = core.sum(axis=0)
    columns = along.sum(axis=0)[heights > 0] / heights[heights > 0]
    between = np.average((columns - along[core].mean()) ** 2, weights=heights[heights > 0])
    return "striped" if between > _STRIPED * total else "dotted"


def score(prompt_scene: Scene, image: np.ndarray) -> dict[str, float]:
    """Score how well an image matches the scene that its prompt describes; each of `MEASURES` in [0, 1].

    `background` and `count` are right or wrong. `colours` and `colour_shape` are the shares of the scene's colours and
    (colour, shape) pairs that are found, each counted as often as requested. `relation` is whether the scene's first
    two things, identified by their colours, are in the requested relation (nan for a scene of one thing).
    """
    return _score(prompt_scene, parse(image))


def _score(scene: Scene, seen: Parsed) -> dict[str, float]:
    return {
        "background": float(seen.background == scene.background),
        "colours": overlap([t.colour for t in seen.things], [t.colour for t in scene.things]),
        "count": float(len(seen.things) == len(scene.things)),
        "colour_shape": overlap(
            [f"{t.colour} {t.shape}" for t in seen.things], [f"{t.colour} {t.shape}" for t in scene.things]
        ),
        "relation": math.nan if len(scene.things) < 2 else float(_related(scene, seen)),
    }


def _related(scene: Scene, seen: Parsed) -> bool:
    """Return whether things of the right colours are related as the scene's first two; right shapes are preferred."""
    a, b = scene.things[:2]
    found_a, found_b = _named(a, seen.things), _named(b, seen.things)
    if a.colour == b.colour and found_a is found_b:
        rest = [thing for thing in seen.things if thing is not found_a]
        if found_a is not None and found_a.shape == a.shape:
            found_b = _named(b, rest)
        else:
            found_a = _named(a, rest)
    return found_a is not None and found_b is not None and relation(found_a, found_b) == relation(a, b)


def _named(wanted: Thing, things: Sequence[Thing]) -> Thing | None:
    """Return the thing of the wanted colour, preferably of the wanted shape."""
    same = [thing for thing in things if thing.colour == wanted.colour]
    return next((thing for thing in same if thing.shape == wanted.shape), same[0] if same else None)


def title(measure: str) -> str:
    """Return a measure's name for people: the same in every page and line."""
    return _TITLES.get(measure, measure.replace("_", " "))


def aggregate(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each measure over all images for which it is defined (nan if there are none)."""
    means = {}
    for name in scores[0] if scores else MEASURES:
        defined = [row[name] for row in scores if not math.isnan(row[name])]
        means[name] = sum(defined) / len(defined) if defined else math.nan
    return means


def chance(scenes: Sequence[Scene], images: Sequence[np.ndarray] | None = None, rounds: int = 5) -> dict[str, float]:
    """Return the mean scores of images (default: drawings of the scenes) against scenes other than their own.

    Raises: ValueError for fewer than two scenes, or if the number of images differs.
    """
    if len(scenes) < 2 or (images is not None and len(images) != len(scenes)):
        raise ValueError("chance needs two scenes or more, and an image for each")
    seen = [parse(image) for image in (images if images is not None else (render(scene, 64) for scene in scenes))]
    shifts = range(1, min(rounds, len(scenes) - 1) + 1)
    return aggregate([_score(scenes[i - shift], found) for shift in shifts for i, found in enumerate(seen)])


def accuracy_on_clean(
    size: int, vocab: Vocabulary | None = None, scenes: int = 300, seed: int = 1_000_003, blur: float = 0.0
) -> dict[str, float]:
    """Return the oracle's accuracy on drawings of `size` pixels, optionally blurred (sigma in pixels of that size).

    Besides `MEASURES`: `colour`, `shape`, `size`, `texture` and `place` of the thing seen at each true thing's
    position.
    """
    rows: list[dict[str, float]] = []
    matched: list[tuple[Thing, Thing | None]] = []
    for index in range(scenes):
        scene = draw_scene(seed, index, vocab or Vocabulary())
        image = render(scene, size)
        if blur:
            image = cv2.GaussianBlur(image, (0, 0), blur)
        seen = parse(image)
        rows.append(_score(scene, seen))
        matched.extend((thing, _at(thing, seen.things)) for thing in scene.things)
    means = aggregate(rows)
    for name in ("colour", "shape", "size", "texture", "place"):
        right = [found is not None and getattr(found, name) == getattr(thing, name) for thing, found in matched]
        means[name] = sum(right) / len(right)
    return means


def _at(thing: Thing, things: Sequence[Thing]) -> Thing | None:
    """Return the thing seen at the position of `thing`."""
    near = [found for found in things if math.hypot(found.x - thing.x, found.y - thing.y) < thing.r / 2]
    return near[0] if near else None
