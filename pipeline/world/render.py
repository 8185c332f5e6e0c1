"""Scene → pixels: anti-aliased images of any size, and their JPEG bytes."""

from __future__ import annotations

import math
from typing import Final

import cv2
import numpy as np

from capstan.pipeline.world.scene import BACKGROUNDS, COLOURS, Scene, Thing

OVERSAMPLE: Final = 4  # samples per pixel side, for textures
OVERSAMPLE_EDGES: Final = 8  # the same for outlines: OpenCV fills half a sample too much
INK: Final = 0.55  # brightness of stripes and dots, relative to the thing's colour
STRIPE: Final = 0.5  # period of the stripes, in radii
DOT: Final = 0.5  # distance between dots, in radii


def render(scene: Scene, size: int) -> np.ndarray:
    """Draw `scene`: uint8 RGB [size, size, 3]."""
    canvas = np.empty((size, size, 3), np.float32)
    canvas[:] = BACKGROUNDS[scene.background]
    for thing in scene.things:
        _paint(canvas, thing)
    return (canvas + 0.5).astype(np.uint8)


def encode_jpeg(image: np.ndarray, quality: int = 92) -> bytes:
    """Encode RGB [height, width, 3] as JPEG with full chroma resolution, so that small things keep their edges."""
    options = [
        cv2.IMWRITE_JPEG_QUALITY,
        quality,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    ]
    done, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)
    assert done
    return data.tobytes()


def ink(colour: str) -> tuple[float, float, float]:
    """Return the RGB of stripes and dots on a thing of this colour."""
    red, green, blue = COLOURS[colour]
    return red * INK, green * INK, blue * INK


def _paint(canvas: np.ndarray, thing: Thing) -> None:
    """Blend one thing over the canvas, which is float32 RGB [size, size, 3]."""
    size = canvas.shape[0]
    # Only the pixels around the thing: top left corner and side of a square window.
    left, top = math.floor((thing.x - thing.r) * size), math.floor((thing.y - thing.r) * size)
    side = math.ceil(2 * thing.r * size) + 1
    centre = (thing.x * size - left, thing.y * size - top)
    radius = thing.r * size
    body = _coverage(side, outline(thing.shape) * radius + centre)
    colour = np.broadcast_to(np.array(COLOURS[thing.colour], np.float32), (side, side, 3))
    if thing.texture != "plain":
        marks = _marks(thing.texture, side, centre, radius)[..., None]
        colour = colour * (1 - marks) + np.array(ink(thing.colour), np.float32) * marks
    height, width = min(side, size - top), min(side, size - left)
    window = canvas[top : top + height, left : left + width]
    alpha = body[:height, :width, None]
    window += alpha * (colour[:height, :width] - window)


def outline(shape: str) -> np.ndarray:
    """Return the corners of a shape inside the unit circle, y downward: float [corners, 2]."""
    if shape == "circle":
        return 0.92 * _on_circle(np.arange(48) / 48)
    if shape == "square":
        return _on_circle(np.arange(4) / 4 + 1 / 8)
    if shape == "triangle":
        return _on_circle(np.arange(3) / 3)
    if shape == "star":
        radii = np.where(np.arange(10) % 2, 0.42, 1.0)
        return radii[:, None] * _on_circle(np.arange(10) / 10)
    if shape == "cross":
        reach, half = 0.95, 0.29
        quarter = np.array([(-half, -reach), (half, -reach), (half, -half)])
        turns = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)]
        return np.concatenate([quarter @ np.array(turn).reshape(2, 2) for turn in turns])
    raise ValueError(f"unknown shape {shape!r}")


def _on_circle(turns: np.ndarray) -> np.ndarray:
    """Return points on the unit circle, given in turns from the topmost point."""
    return np.stack([np.sin(2 * np.pi * turns), -np.cos(2 * np.pi * turns)], axis=-1)


def _coverage(side: int, corners: np.ndarray) -> np.ndarray:
    """Return the share of each pixel that a polygon covers: float32 [side, side] in [0, 1]; corners in pixels."""
    fraction_bits = 8
    fine = np.zeros((side * OVERSAMPLE_EDGES, side * OVERSAMPLE_EDGES), np.uint8)
    points = (corners * OVERSAMPLE_EDGES - 0.5) * (1 << fraction_bits)  # OpenCV's integer coordinates are pixel centres
    cv2.fillPoly(fine, [np.round(points).astype(np.int32)], 255, lineType=cv2.LINE_8, shift=fraction_bits)
    return cv2.resize(fine, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def _marks(texture: str, side: int, centre: tuple[float, float], radius: float) -> np.ndarray:
    """Return the share of each pixel that is ink: float32 [side, side] in [0, 1]."""
    grid = (np.arange(side * OVERSAMPLE, dtype=np.float32) + 0.5) / OVERSAMPLE
    x, y = (grid - centre[0]) / radius, (grid - centre[1]) / radius
    if texture == "striped":  # vertical, with a stripe of ink in the middle
        row = (np.abs(x / STRIPE - np.round(x / STRIPE)) < 0.24).astype(np.float32)
        return np.broadcast_to(row.reshape(side, OVERSAMPLE).mean(axis=1), (side, side))
    if texture == "dotted":
        dx, dy = x / DOT - np.round(x / DOT), y / DOT - np.round(y / DOT)
        dots = (dx[None, :] ** 2 + dy[:, None] ** 2 < 0.33**2).astype(np.float32)
        return cv2.resize(dots, (side, side), interpolation=cv2.INTER_AREA)
    raise ValueError(f"unknown texture {texture!r}")
