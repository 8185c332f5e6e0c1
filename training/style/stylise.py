"""A content and a style image file → the stylised image, its distances, and a sheet over weights and steps."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import simplejpeg
import torch
from torch import nn

from capstan.pipeline.config import Image
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.image.decode import Failure, decode
from capstan.training.data.transforms import to_signed
from capstan.training.drawing.grid import grid
from capstan.training.style.features import open_encoder, open_vgg
from capstan.training.style.transfer import Goal, Stage, Weights, transfer

logger = logging.getLogger(__name__)

LEAST: Final = 32  # pixels; VGG16 halves a side four times before its last layer of style
_SHEET_WEIGHTS: Final = (0.1, 1.0, 10.0)  # of the content weight, by row of the sheet
_SHEET_STEPS: Final = (4, 2, 1)  # divisors of the steps, by column


@dataclass(frozen=True)
class Settings:
    """How an image is stylised."""

    vgg: str | None  # folder of vgg16-397923af.pth, or the file
    features: str | None  # a run whose encoder serves in place of VGG16
    size: int  # pixels, shorter side
    steps: int
    weights: Weights
    noise: float  # share of noise in the start image; the rest is the content image


def stylise(
    content: Path, style: Path, out: Path, settings: Settings, seeds: Sequence[int] = (0,), sheet: Path | None = None
) -> dict[str, Any]:
    """Write the content image in the style of the other as `out` (PNG), one file per seed; return a summary.

    `sheet` is a PNG of a tenth and ten times the content weight, and of a quarter and half of the steps, by the first
    seed. Raises RecipeError for files that cannot be read or written, and for a missing network.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if len(seeds) > 1 and settings.noise == 0:
        raise RecipeError("--seed", "makes no difference without noise", "add e.g. --noise 0.5, or name one seed")
    files = _outputs(out, seeds)
    for field, path in (("-o", out), ("--sheet", sheet)):
        if path is not None:
            _check_writable(path, field)
    network, name = _network(settings)
    network.to(device)
    shown = _read(content, "CONTENT", settings.size).to(device)
    styled = _read(style, "STYLE", settings.size).to(device)
    made = []
    for seed, file in zip(seeds, files, strict=True):
        start = _start(shown, settings.noise, seed)
        (stage,) = transfer(network, shown, styled, start, settings.weights, [settings.steps])
        _save(_pixels(stage), file, "-o")
        distances = {"content": round(stage.content, 6), "style": round(stage.style, 6)}
        made.append({"image": str(file), "seed": seed, **distances})
        logger.info("style: %s, content %g, style %g", file, *distances.values())
    with torch.no_grad():
        before = Goal(network, shown, styled).stage(0, shown)
    summary = {
        "features": name,
        "size": [shown.shape[3], shown.shape[2]],
        "steps": settings.steps,
        "content_weight": settings.weights.content,
        "style_weight": settings.weights.style,
        "style_of_content": round(before.style, 6),  # what the optimisation started from, if there was no noise
        "images": made,
    }
    if sheet is not None:
        _save(_sheet(network, shown, styled, settings, seeds[0]), sheet, "--sheet")
        summary["sheet"] = str(sheet)
    return summary


def _network(settings: Settings) -> tuple[nn.Module, str]:
    """Open the network that the settings name, and describe it. Raises RecipeError unless they name exactly one."""
    if (settings.vgg is None) == (settings.features is None):
        problem = "is missing" if settings.vgg is None else "cannot be combined with --features"
        hint = "name the folder of vgg16-397923af.pth, or a first stage of your own by --features RUN"
        raise RecipeError("--vgg", problem, hint)
    if settings.vgg is not None:
        return open_vgg(settings.vgg, "--vgg"), f"VGG16 of {settings.vgg}"
    assert settings.features is not None
    logger.info("style: no VGG16 is named; content and style are those of the encoder of %s", settings.features)
    return open_encoder(settings.features, "--features"), f"encoder of {settings.features}"


def _read(path: Path, field: str, size: int) -> torch.Tensor:
    """Read an image as `capstan build` would store it, its shorter side `size` at most: [1, 3, H, W] in −1 … 1."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecipeError(field, f"cannot read {path} ({error.strerror})", "name an image file") from None
    image = decode(data, Image(size=size, quality=100, min_size=LEAST))
    if isinstance(image, Failure):
        detail = f" ({image.detail})" if image.detail else ""
        raise RecipeError(field, f"{path}: {image.reason}{detail}", "name an image that `capstan build` would keep")
    pixels = torch.from_numpy(simplejpeg.decode_jpeg(image.jpeg, colorspace="RGB"))
    return to_signed(pixels.permute(2, 0, 1).contiguous())[None]


def _start(content: torch.Tensor, noise: float, seed: int) -> torch.Tensor:
    """Blend the content image with the seed's noise, which is the same on every device."""
    drawn = torch.rand(content.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return (1 - noise) * content + noise * drawn.to(content.device)


def _sheet(network: nn.Module, content: torch.Tensor, style: torch.Tensor, settings: Settings, seed: int) -> Any:
    """Return a labelled PIL image: content weights from top to bottom, steps from left to right."""
    steps = sorted({max(1, settings.steps // divisor) for divisor in _SHEET_STEPS})
    images, labels = [], []
    for factor in _SHEET_WEIGHTS:
        weights = settings.weights._replace(content=settings.weights.content * factor)
        for stage in transfer(network, content, style, _start(content, settings.noise, seed), weights, steps):
            images.append(_pixels(stage))
            labels.append(f"content weight {weights.content:g}, {stage.steps} steps, style {stage.style:.2g}")
    return grid(np.stack(images), labels, columns=len(steps))


def _pixels(stage: Stage) -> np.ndarray:
    """Return uint8 RGB [H, W, 3]."""
    return ((stage.image.permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()


def _outputs(out: Path, seeds: Sequence[int]) -> list[Path]:
    """Return a file per seed: `out` itself for a single one, else with the seed before its suffix."""
    if len(seeds) == 1:
        return [out]
    if len(set(seeds)) < len(seeds):
        raise RecipeError("--seed", "names a seed twice", "name each seed once")
    return [out.with_name(f"{out.stem}-{seed}{out.suffix}") for seed in seeds]


def _check_writable(path: Path, field: str) -> None:
    """Raise RecipeError before minutes of work if the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise RecipeError(field, f"cannot write {path} ({error.strerror})", "name a writable PNG file") from None


def _save(image: Any, path: Path, field: str) -> None:
    """Write pixels or a PIL image as PNG."""
    from PIL import Image as Pillow

    shown = Pillow.fromarray(image) if isinstance(image, np.ndarray) else image
    try:
        shown.save(path, format="PNG")
    except OSError as error:
        raise RecipeError(field, f"cannot write {path} ({error})", "name a writable PNG file") from None
