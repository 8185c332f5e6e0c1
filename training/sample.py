"""Prompts → images by the model's own family, and a grid (`capstan sample`)"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from capstan.pipeline import extras
from capstan.pipeline.config import validate
from capstan.pipeline.errors import RecipeError
from capstan.recaption.config import RecaptionConfig
from capstan.recaption.upsample import PAPER, Style, expand, text_engine
from capstan.training.data.transforms import fitted
from capstan.training.drawing.clips import gif_of, mp4_of
from capstan.training.drawing.drawer import Drawer, Drawn, Options, Size
from capstan.training.drawing.grid import sheet
from capstan.training.drawing.sounds import wav_of
from capstan.training.product import family_of, find_product, kind_of, read_facts

logger = logging.getLogger(__name__)


def sample(
    run: str | Path,
    prompts: Sequence[str],
    out: str | Path,
    *,
    seeds: Sequence[int] | None = None,
    negative: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    level: float | None = None,
    size: Size | None = None,
    batch: int = 16,
    columns: int | None = None,
    upsampler: RecaptionConfig | None = None,
    images: Sequence[str | Path] = (),
    motion: int | None = None,
) -> dict[str, Any]:
    """Generate one image, clip or sound per prompt and write the labelled grid `out` (PNG); return a summary.

    Clips are MP4 and GIF files next to the grid, which shows their frames; sounds are WAV files, and it shows their
    spectrograms; films are all of these, and their MP4 has the sound.

    `run` is a run folder, a product or an exported pipeline. `seeds` (default 0, 1, …) are one per prompt, or any
    number for a single prompt. `steps`, `guidance`, `sampler` and `level` (of the noise on a cascade's small images)
    default to the run's recipe, `size` to that of its images. An `upsampler` expands the prompts first: the summary has
    the expanded prompts, the grid is labelled with the originals.

    A model that continues images draws one clip per file of `images`, or per seed of a single one, with as much
    `motion` (0 to 255) as is set.
    """
    originals = prompts
    if upsampler is not None:
        prompts = expand(text_engine(upsampler), originals, style_of(run))
        for before, after in zip(originals, prompts, strict=True):
            logger.info("sample: %s → %s", before, after)
    expanded = {} if upsampler is None else {"upsampled": list(prompts)}
    opened = open_sampler(run, sampler=sampler, level=level, motion=motion)
    if opened.kind in ("clip", "film"):
        extras.require(extras.VIDEO, "sample")
    given: Options = {"negative": negative, "steps": steps, "guidance": guidance, "size": size}
    if images or opened.continues is not None:
        given["first_frames"], labels, seeds = continued(opened, images, seeds)
    prompts, seeds = paired(prompts, seeds, prompted=opened.prompted)
    if opened.continues is None:
        labels = list(originals) if len(originals) == len(prompts) else list(originals) * len(prompts)
        labels = labels if opened.prompted else [f"seed {seed}" for seed in seeds]
    drawn = opened.draw(prompts, seeds, batch=batch, **given)
    path = Path(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet(drawn, labels, columns=columns).save(path, format="PNG")
        files = write_scenes(drawn, prompts, seeds, path) | write_sounds(drawn, path) | write_clips(drawn, path)
    except OSError as error:
        raise RecipeError("-o", f"cannot write {path} ({error})", "name a writable PNG file") from None
    logger.info("sample: %d %ss in %s", len(drawn), "image" if drawn.kind == "scene" else drawn.kind, path)
    shape = {} if drawn.kind == "sound" else {"size": list(drawn.images.shape[-3:-1])}
    return {"grid": str(path), "pictures": len(drawn), **shape, "seeds": list(seeds), **files, **expanded}


def continued(
    drawer: Drawer, files: Sequence[str | Path], seeds: Sequence[int] | None, *, field: str = "--image"
) -> tuple[np.ndarray, list[str], list[int]]:
    """Return the images to continue, uint8 [N, side, side, 3], their labels and seeds.

    Raises RecipeError naming `field`, which lists the files, if the model or a file is not fit for that.
    """
    if drawer.continues is None:
        raise RecipeError(field, "this model continues no image", "remove it")
    if not files:
        raise RecipeError(field, "is missing: this model continues images", "add one or more image files")
    chosen = list(range(len(files))) if seeds is None else list(seeds)
    if len(files) not in (1, len(chosen)):
        raise RecipeError("--seed", f"{len(chosen)} seeds for {len(files)} images", "use one seed per image")
    side = drawer.continues.side
    images = [_squared(Path(file), side, field) for file in files]
    labels = [Path(file).name for file in files]
    if len(files) == 1:
        images, labels = images * len(chosen), [f"{labels[0]}, seed {seed}" for seed in chosen]
    return np.stack(images), labels, chosen


def _squared(file: Path, side: int, field: str) -> np.ndarray:
    """Return an image file as uint8 RGB [side, side, 3], cut to its middle. Raises RecipeError if it is none."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            pixels = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise RecipeError(field, f"cannot read {file} ({error})", "name a PNG or JPEG file") from None
    return fitted(pixels, (side, side))


def write_sounds(drawn: Drawn, grid: Path) -> dict[str, Any]:
    """Write each sound next to the grid of their spectrograms, as a WAV file; return their names, for the summary."""
    if drawn.kind not in ("sound", "film"):
        return {}
    files = [grid.with_name(f"{grid.stem}-{number}.wav") for number in range(len(drawn))]
    for number, file in enumerate(files):
        file.write_bytes(wav_of(drawn, number))
    assert drawn.rate is not None, "sounds have a rate"
    values = (drawn.arrays if drawn.sounds is None else drawn.sounds).shape[1]
    return {"wav": [str(file) for file in files], "rate": drawn.rate, "seconds": values / drawn.rate}


def write_clips(drawn: Drawn, grid: Path) -> dict[str, Any]:
    """Write each clip next to the grid of their frames, as MP4 and GIF; return their names, for the summary."""
    if drawn.kind not in ("clip", "film"):
        return {}
    files = {}
    for suffix, made in (("mp4", mp4_of), ("gif", gif_of)):
        files[suffix] = [grid.with_name(f"{grid.stem}-{number}.{suffix}") for number in range(len(drawn))]
        for number, file in enumerate(files[suffix]):
            file.write_bytes(made(drawn, number))
    names = {suffix: [str(file) for file in listed] for suffix, listed in files.items()}
    return {**names, "frames": drawn.arrays.shape[1], "fps": drawn.fps}


def write_scenes(drawn: Drawn, prompts: Sequence[str], seeds: Sequence[int], grid: Path) -> dict[str, Any]:
    """Write scenes next to their grid: all in one JSON file, and an SVG each; return their names, for the summary."""
    if drawn.kind != "scene" or drawn.svgs is None:
        return {}
    svgs = [grid.with_name(f"{grid.stem}-{number}.svg") for number in range(len(drawn))]
    for file, svg in zip(svgs, drawn.svgs, strict=True):
        file.write_text(svg, encoding="utf-8")
    rows = [
        {"prompt": prompt, "seed": seed, **scene, "svg": file.name}
        for prompt, seed, scene, file in zip(prompts, seeds, drawn.arrays, svgs, strict=True)
    ]
    listed = grid.with_suffix(".json")
    listed.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return {"scenes": str(listed), "svg": [str(file) for file in svgs]}


def style_of(run: str | Path) -> Style:
    """Return the style of a model's training captions; by default the DALL-E 3 paper's lengths."""
    style = read_facts(find_product(run)).get("style")
    if style is None:
        logger.info(
            "sample: %s does not record the style of its captions; using %d to %d words", run, *PAPER.words[::2]
        )
    return PAPER if style is None else Style.read(style)


def upsampler_of(run: str | Path) -> RecaptionConfig:
    """Return the caption engine of a run's own recipe. Raises RecipeError if that engine cannot write text."""
    file = Path(run) / "recipe.json"
    section = json.loads(file.read_text(encoding="utf-8"))["recipe"].get("recaption") if file.is_file() else None
    config = None if section is None else validate(RecaptionConfig, section, "recaption")
    if config is None or config.engine == "coca":
        problem = f"the recipe of {run} has no engine that writes text"
        hint = "add --upsampler RECIPE, a recipe with recaption engine transformers or openai"
        raise RecipeError("--upsample", problem, hint)
    if config.engine == "openai":  # the run may be somebody else's: it must not choose where prompts and keys go
        problem = f"the recipe of {run} names a server, and only your own recipe may"
        hint = "add --upsampler RECIPE, your own recipe with recaption engine openai"
        raise RecipeError("--upsample", problem, hint)
    return config


def open_sampler(
    run: str | Path,
    device: str | None = None,
    sampler: str | None = None,
    level: float | None = None,
    motion: int | None = None,
) -> Drawer:
    """Open the model of a run, a product or an exported folder, on the GPU if there is one. Raises RecipeError.

    The family that trained it opens it. `sampler` replaces the model's own by another one of the same noise schedule,
    `level` the noise on a cascade's small images or on the images that are continued, `motion` their motion bucket.
    """
    import torch

    product = find_product(run)
    family = family_of(product)
    if family is None or family.draws is None:
        kind = kind_of(product) or "unknown format"
        hint = "name a run of a model that draws, e.g. model: diffusion"
        raise RecipeError("RUN", f"{product} is not a text-to-image model ({kind})", hint)
    drawer = family.open(product, torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    if sampler is not None:
        drawer.use_sampler(sampler)
    if level is not None:
        drawer.use_level(level)
    if motion is not None:
        drawer.use_motion(motion)
    return drawer


def paired(
    prompts: Sequence[str], seeds: Sequence[int] | None, *, prompted: bool = True
) -> tuple[list[str], list[int]]:
    """Return prompts and seeds of equal length: a single prompt is repeated for each seed.

    A model that takes no prompts has empty ones, one per seed.
    """
    if not prompted:
        if any(prompts):
            raise RecipeError("-p", "this model takes no prompts", "remove it, and set --seed, once per image")
        chosen = list(seeds) if seeds is not None else list(range(max(1, len(prompts))))
        return [""] * len(chosen), chosen
    if not prompts:
        raise RecipeError("-p", "is missing", 'add one or more, e.g. -p "a red circle"')
    if seeds is None:
        return list(prompts), list(range(len(prompts)))
    if len(prompts) == 1:
        return list(prompts) * len(seeds), list(seeds)
    if len(seeds) != len(prompts):
        raise RecipeError("--seed", f"{len(seeds)} seeds for {len(prompts)} prompts", "use one seed per prompt")
    return list(prompts), list(seeds)
