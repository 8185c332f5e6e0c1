"""Finished runs that draw clips or sounds → files that the page plays; each is drawn once

played/<name>/000.mp4 or .wav    of the first prompt or image; and 000.png, its frames, its spectrogram, or both
played/<name>/facts.json         {kind, prompts, images, product}; written last
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import torch

from capstan.pipeline import extras
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.html import page
from capstan.pipeline.html.page import Html
from capstan.pipeline.storage import Storage
from capstan.training.drawing.clips import mp4_of
from capstan.training.drawing.drawer import Drawer, Drawn
from capstan.training.drawing.grid import sheet
from capstan.training.drawing.sounds import wav_of
from capstan.training.lecture.config import Played
from capstan.training.metrics.metric import random_state_kept
from capstan.training.product import family_of, find_product
from capstan.training.sample import continued

logger = logging.getLogger(__name__)

FOLDER: Final = "played"
_BATCH: Final = 8


def draw_media(storage: Storage, one: Played) -> None:
    """Draw the prompts of a run, unless that was done. Raises RecipeError for a run that draws neither."""
    field = f"lecture.media.{one.name}.run"
    product = find_product(one.run, field)
    facts = {"prompts": one.prompts, "product": _digest(product)}
    if one.images:
        facts["images"] = _digests_of(one)
    if (before := _facts(storage, one)) is not None and facts.items() <= before.items():
        return
    family = family_of(product)
    if family is None or family.draws not in ("clip", "sound", "film"):
        raise RecipeError(field, f"{product} draws no clips or sounds", "name a run that does, e.g. of video")
    extras.require(extras.VIDEO, "experiment")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with random_state_kept(device):
        drawer = family.open(product, device)
        drawn = _drawn(drawer, one)
    for number in range(len(drawn)):
        name = f"{FOLDER}/{one.name}/{number:03d}"
        if drawn.kind == "sound":
            storage.write(f"{name}.wav", wav_of(drawn, number))
        else:
            storage.write(f"{name}.mp4", mp4_of(drawn, number))
        sheet(drawn.only(number), [""]).save(png := io.BytesIO(), format="PNG")
        storage.write(f"{name}.png", png.getvalue())
    content = facts | {"kind": drawn.kind, "settings": drawer.settings()}
    storage.write(f"{FOLDER}/{one.name}/facts.json", json.dumps(content, ensure_ascii=False).encode() + b"\n")
    logger.info("lecture: %s drew %d %ss", one.name, len(drawn), drawn.kind)


def _drawn(drawer: Drawer, one: Played) -> Drawn:
    """Return what a model makes of the prompts or images. Raises RecipeError if it starts from the other."""
    if drawer.continues is None and one.prompts:
        return drawer.draw(one.prompts, list(range(len(one.prompts))), batch=_BATCH)
    images, _, seeds = continued(drawer, one.images, list(range(len(one.images))), field=_images(one))
    return drawer.draw([""] * len(seeds), seeds, batch=_BATCH, first_frames=images)


def _images(one: Played) -> str:
    return f"lecture.media.{one.name}.images"


def _digests_of(one: Played) -> list[str]:
    """Return a hash of each image file. Raises RecipeError."""
    try:
        return [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in one.images]
    except OSError as error:
        problem = f"cannot read {error.filename} ({error.strerror})"
        raise RecipeError(_images(one), problem, "name image files") from None


def _facts(storage: Storage, one: Played) -> dict[str, Any] | None:
    name = f"{FOLDER}/{one.name}/facts.json"
    return dict(json.loads(storage.read(name))) if storage.exists(name) else None


def _digest(product: Path) -> str:
    """Return a hash of a product's files."""
    digest = hashlib.sha256()
    for file in sorted(path for path in product.rglob("*") if path.is_file()):
        digest.update(f"{file.relative_to(product)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def rows(storage: Storage, media: Iterable[Played]) -> Iterable[Html]:
    """Yield the blocks of the page's section: players with their prompts, and what `capstan evaluate` measured."""
    for one in media:
        if (facts := _facts(storage, one)) is None:
            continue
        yield page.heading(one.name)
        if one.paper or one.claim:
            yield page.note(": ".join(text for text in (one.paper, one.claim) if text))
        suffix = "wav" if facts["kind"] == "sound" else "mp4"
        starts = facts["prompts"] or [Path(file).name for file in one.images]
        names = [f"{FOLDER}/{one.name}/{number:03d}" for number in range(len(starts))]
        players = [
            page.player(storage.read(f"{name}.{suffix}"), storage.read(f"{name}.png"), prompt)
            for name, prompt in zip(names, starts, strict=True)
        ]
        yield page.gallery(players, wide=True)
        if measures := _measured(one):
            header = ["measure", "value", "chance", "ceiling"]
            yield page.table(header, [[name, *(row.get(key) for key in header[1:])] for name, row in measures.items()])
        else:
            yield page.note("Not measured: run `capstan evaluate` on it.")


def _measured(one: Played) -> dict[str, dict[str, Any]]:
    """Return the measures of the run's last evaluation; empty if there is none."""
    file = Path(one.run) / "evaluation.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))["measures"]) if file.is_file() else {}
