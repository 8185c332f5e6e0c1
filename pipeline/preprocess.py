"""Decoded image → the uint8 pixels that a vision tower expects

Equals open_clip's evaluation transform up to its scaling to floats, on the CPU and without torch. So decoding workers
stay light, and the arrays sent to the model are a quarter of the size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from PIL import Image

FILTERS: Final = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
MODES: Final = ("shortest", "longest", "squash")

CLIP_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Final = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocessing:
    """The input format of a vision tower; names and defaults are open_clip's (`PreprocessCfg`)."""

    height: int
    width: int
    mode: str = "shortest"  # shortest: fill and crop; longest: fit and pad with `fill`; squash: change the proportions
    interpolation: str = "bicubic"
    fill: int = 0
    mean: tuple[float, ...] = CLIP_MEAN  # of RGB in [0, 1]
    std: tuple[float, ...] = CLIP_STD

    @classmethod
    def of(cls, size: int | list[int] | tuple[int, int], config: Mapping[str, Any]) -> Preprocessing:
        """Return the preprocessing for a tower's image size (pixels: one side, or height and width) and open_clip's
        `preprocess_cfg`. Raises ValueError for settings that are not supported.
        """
        height, width = (size, size) if isinstance(size, int) else size
        fill = config.get("fill_color", 0)
        if not isinstance(fill, int) or config.get("resize_mode", "shortest") not in MODES:
            raise ValueError(f"preprocessing {dict(config)} is not supported")
        if config.get("interpolation", "bicubic") not in FILTERS:
            raise ValueError(f"interpolation {config['interpolation']} is not supported")
        return cls(
            height=height,
            width=width,
            mode=config.get("resize_mode", "shortest"),
            interpolation=config.get("interpolation", "bicubic"),
            fill=fill,
            mean=tuple(config.get("mean", CLIP_MEAN)),
            std=tuple(config.get("std", CLIP_STD)),
        )


def fit(image: Image.Image, how: Preprocessing) -> Image.Image:
    """Resize an RGB image, then crop or pad it to exactly `how.width` × `how.height` pixels."""
    target = (how.width, how.height)
    resample = FILTERS[how.interpolation]
    if how.mode == "squash":
        return image.resize(target, resample)
    ratios = target[0] / image.width, target[1] / image.height
    if how.mode == "longest":
        scale = min(ratios)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    elif target[0] == target[1]:  # torchvision's Resize(int), which truncates
        side, shorter = target[0], min(image.size)
        size = (int(side * image.width / shorter), int(side * image.height / shorter))
    else:
        scale = max(ratios)
        size = (round(image.width * scale), round(image.height * scale))
    if image.size != size:
        image = image.resize(size, resample)
    return _centre(image, target, how.fill)


def _centre(image: Image.Image, size: tuple[int, int], fill: int) -> Image.Image:
    """Crop the centre `size` of an image, padding with `fill` if it is smaller; rounds as open_clip does."""
    if image.size == size:
        return image
    left, top = (
        round((have - want) / 2) if have >= want else -((want - have) // 2)
        for have, want in zip(image.size, size, strict=True)
    )
    if left >= 0 and top >= 0:
        return image.crop((left, top, left + size[0], top + size[1]))
    ground = Image.new("RGB", size, (fill, fill, fill))
    ground.paste(image, (-left, -top))
    return ground
