"""Prompts → images by the product's diffusers pipeline, and a grid (`capstan sample`)

Images are what `DiffusionPipeline.from_pretrained` generates anywhere else: no sampling code of our own.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from capstan.pipeline.config import validate
from capstan.pipeline.errors import CapstanError, RecipeError
from capstan.recaption.config import RecaptionConfig
from capstan.recaption.upsample import PAPER, Style, expand, text_engine
from capstan.training.models.diffusion.schedulers import SamplerName, check_steps, set_sampler
from capstan.training.models.diffusion.unet import chunked_encoders
from capstan.training.models.precision import FiniteChecks, frozen_outside_autocast
from capstan.training.product import find_product, kind_of, quieten, read_facts

logger = logging.getLogger(__name__)

Size = tuple[int, int]  # width and height, pixels

_CELL: Final = 224  # smallest side of an image in the grid, pixels
_FONT: Final = 14  # pixels
_MARGIN: Final = 12  # pixels
# PixArt's pipelines would generate another size and crop to the requested one, and rewrite prompts if beautifulsoup4
# is installed. Training does neither.
_AS_TRAINED: Final = ("use_resolution_binning", "clean_caption")


def sample(
    run: str | Path,
    prompts: Sequence[str],
    out: str | Path,
    *,
    seeds: Sequence[int] | None = None,
    negative: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: SamplerName | None = None,
    size: Size | None = None,
    batch: int = 16,
    columns: int | None = None,
    upsampler: RecaptionConfig | None = None,
) -> dict[str, Any]:
    """Generate one image per prompt and write the labelled grid `out` (PNG); return a summary.

    `run` is a run folder, a product or an exported pipeline. `seeds` (default 0, 1, …) are one per prompt, or any
    number for a single prompt. `steps`, `guidance` and `sampler` default to the run's recipe, `size` to that of its
    images. An `upsampler` expands the prompts first: the summary has the expanded prompts, the grid is labelled with
    the originals.
    """
    originals = prompts
    if upsampler is not None:
        prompts = expand(text_engine(upsampler), originals, style_of(run))
        for before, after in zip(originals, prompts, strict=True):
            logger.info("sample: %s → %s", before, after)
    expanded = {} if upsampler is None else {"upsampled": list(prompts)}
    prompts, seeds = paired(prompts, seeds)
    labels = list(originals) if len(originals) == len(prompts) else list(originals) * len(prompts)
    opened = open_sampler(run, sampler=sampler)
    images = opened.draw(prompts, seeds, negative=negative, steps=steps, guidance=guidance, size=size, batch=batch)
    path = Path(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        grid(images, labels, columns=columns).save(path, format="PNG")
    except OSError as error:
        raise RecipeError("-o", f"cannot write {path} ({error})", "name a writable PNG file") from None
    logger.info("sample: %d images in %s", len(images), path)
    drawn = list(images.shape[1:3])
    return {"grid": str(path), "pictures": len(images), "size": drawn, "seeds": list(seeds), **expanded}


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


@dataclass(frozen=True)
class Sampler:
    """A diffusers pipeline and its default sampling settings."""

    pipeline: Any
    steps: int
    guidance: float
    chunks: int = 1  # in which the text encoders read a prompt

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        negative: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        size: Size | None = None,
        batch: int = 16,
    ) -> np.ndarray:
        """Return uint8 images [N, H, W, 3], one per prompt; each one's noise depends on its seed, not on its batch."""
        import torch

        count = self.steps if steps is None else steps
        check_steps(self.pipeline.scheduler, count, "--steps")
        accepted = inspect.signature(self.pipeline.__call__).parameters
        options: dict[str, Any] = {name: False for name in _AS_TRAINED if name in accepted}
        if size is not None:
            options |= {"width": size[0], "height": size[1]}
            self._check(size)
        images = []
        for start in range(0, len(prompts), batch):
            part = list(prompts[start : start + batch])
            checks = FiniteChecks()
            with frozen_outside_autocast(self.pipeline), checks.watching(self.pipeline):
                result = self.pipeline(
                    **self._prompts(part, negative),
                    num_inference_steps=count,
                    guidance_scale=self.guidance if guidance is None else guidance,
                    generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds[start : start + batch]],
                    output_type="np",
                    **options,
                )
            if (bad := checks.first_bad()) is not None or not np.isfinite(result.images).all():
                source = bad or "image processor"
                problem = f"sample: the images are not finite; the first values that are not came from the {source}"
                raise CapstanError(f"{problem}. Fix: use weights in fp32 or bf16, or an earlier state of the run")
            images.append(result.images)
        return (np.concatenate(images) * 255).round().astype(np.uint8)

    def _prompts(self, prompts: list[str], negative: str | None) -> dict[str, Any]:
        """Return the pipeline's arguments for prompts: their texts, or their states if they are read in chunks."""
        import torch

        if self.chunks == 1:
            return {"prompt": prompts} | ({} if negative is None else {"negative_prompt": [negative] * len(prompts)})
        encoders = chunked_encoders(self.pipeline, self.chunks)
        options = {}
        for sign, texts in (("", prompts), ("negative_", [negative or ""] * len(prompts))):
            states = encoders(texts)
            slots = [one.slot for one in encoders.encoders]
            options[f"{sign}prompt_embeds"] = torch.cat([states[slot.states] for slot in slots], dim=-1)
            for slot in slots:
                if slot.projected:
                    options[f"{sign}pooled_prompt_embeds"] = states[slot.pooled]
        return options

    def _check(self, size: Size) -> None:
        """Raise RecipeError if a side does not divide into latents and patches, or by 8 as the pipelines require."""
        network = getattr(self.pipeline, "transformer", None)
        unit = math.lcm(8, self.pipeline.vae_scale_factor * (network.config.patch_size if network else 1))
        if any(side <= 0 or side % unit for side in size):
            problem = f"{size[0]}x{size[1]} pixels do not divide by {unit}"
            raise RecipeError("--size", problem, f"use multiples of {unit}, e.g. {unit * 8}x{unit * 6}")


def open_sampler(run: str | Path, device: str | None = None, sampler: SamplerName | None = None) -> Sampler:
    """Open the pipeline of a run, a product or an exported folder, on the GPU if there is one. Raises RecipeError.

    `sampler` replaces the folder's own by another one of the same noise schedule.
    """
    import torch
    from diffusers import DiffusionPipeline

    product = find_product(run)
    if kind_of(product) != "diffusion":
        kind = kind_of(product) or "unknown format"
        raise RecipeError("RUN", f"{product} is not a text-to-image model ({kind})", "name a run of train.diffusion")
    quieten()
    pipeline = DiffusionPipeline.from_pretrained(product, torch_dtype=torch.float32, trust_remote_code=False)
    pipeline.set_progress_bar_config(disable=True)
    if sampler is not None:
        set_sampler(pipeline, sampler)
    pipeline.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    facts = read_facts(product)
    sampling = {"steps": 25, "guidance": 5.0} | facts.get("sampling", {})
    return Sampler(pipeline, **sampling, chunks=int(facts.get("text_chunks", 1)))


def grid(images: np.ndarray, labels: Sequence[str], *, columns: int | None = None, cell: int = _CELL) -> Any:
    """Return a PIL image: every image enlarged to `cell` pixels or more, with its label wrapped below it."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = images.shape[1:3]
    scale = max(1, -(-cell // max(height, width)))
    across = columns or min(len(images), 4 if len(images) % 4 == 0 or len(images) > 6 else 3)
    down = -(-len(images) // across)
    font = ImageFont.load_default(size=_FONT)
    letters = int(width * scale / font.getlength("n"))
    wrapped = [textwrap.wrap(label, letters) or [""] for label in labels]
    line = _FONT + 4
    box = (width * scale + _MARGIN, height * scale + line * max(map(len, wrapped)) + 2 * _MARGIN)
    sheet = Image.new("RGB", (across * box[0] + _MARGIN, down * box[1] + _MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        x, y = _MARGIN + index % across * box[0], _MARGIN + index // across * box[1]
        enlarged = Image.fromarray(image).resize((width * scale, height * scale), Image.Resampling.LANCZOS)
        sheet.paste(enlarged, (x, y))
        pen.text((x, y + height * scale + 4), "\n".join(lines), fill="black", font=font, spacing=4)
    return sheet


def paired(prompts: Sequence[str], seeds: Sequence[int] | None) -> tuple[list[str], list[int]]:
    """Return prompts and seeds of equal length: a single prompt is repeated for each seed."""
    if not prompts:
        raise RecipeError("-p", "is missing", 'add one or more, e.g. -p "a red circle"')
    if seeds is None:
        return list(prompts), list(range(len(prompts)))
    if len(prompts) == 1:
        return list(prompts) * len(seeds), list(seeds)
    if len(seeds) != len(prompts):
        raise RecipeError("--seed", f"{len(seeds)} seeds for {len(prompts)} prompts", "use one seed per prompt")
    return list(prompts), list(seeds)
