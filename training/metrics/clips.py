"""Whether clips show the things, colours and moves that their prompts state: the oracle of the moving world

Frames are parsed one by one and things followed by their colour (pipeline.world.moving.oracle); nothing is learnt. What
shall be seen is read from the prompts, so that any dataset whose captions name things as the moving world's do can be
judged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, ClassVar, Final

import numpy as np
import torch

from capstan.pipeline.errors import RecipeError
from capstan.pipeline.world.moving.captions import read
from capstan.pipeline.world.moving.oracle import FRAME_MEASURES, score_stated, watch
from capstan.training.data.transforms import psnr, to_signed
from capstan.training.drawing.drawer import ClipCodec, Drawn, Kind
from capstan.training.drawing.grid import sheet
from capstan.training.metrics.metric import Means, single_worker
from capstan.training.metrics.samples import EvalSet

_SHOWN: Final = 4  # clips in a sheet of before and after


def check_things(eval_set: EvalSet, field: str, verb: str, world: str) -> None:
    """Raise RecipeError if a prompt does not say what shall be seen, or heard."""
    for prompt in eval_set.prompts(range(len(eval_set))):
        if not read(prompt).things:
            problem = f"oracle reads from prompts what shall {verb}, and {prompt[:80]!r} names no coloured shape"
            raise RecipeError(field, problem, f"remove oracle, or train on the {world} world")


class ClipOracle(Means):
    """The mean of each measure of clips: background, colours, count, colour with shape, move, and steadiness."""

    name: ClassVar[str] = "oracle"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"clip"})
    measures: ClassVar[Sequence[str]] = FRAME_MEASURES

    def check(self, eval_set: EvalSet) -> None:
        check_things(eval_set, self.field, "be seen", "moving")

    def seen(self, drawn: Drawn) -> np.ndarray:
        return drawn.arrays

    def add(self, eval_set: EvalSet, numbers: Sequence[int], images: np.ndarray) -> None:
        """Add clips, uint8 [N, frames, H, W, 3], for the prompts `numbers`."""
        for prompt, frames in zip(eval_set.prompts(numbers), images, strict=True):
            self.count(score_stated(read(prompt), watch(frames)))


def measure_clips(codec: ClipCodec, subjects: EvalSet, *, batch: int) -> tuple[dict[str, Any], Any]:
    """Return what is left of true clips after a first stage, with chance levels, and a sheet of before and after.

    `psnr` of the frames in dB; chance: each clip's mean colour. The oracle's measures, where the captions state what is
    seen; chance: clips of other captions.
    """
    numbers = range(len(subjects))
    true = subjects.clips(numbers, codec.frames, codec.fps, codec.size)
    made = codec.reconstruct(true, batch)
    flat = np.broadcast_to(true.mean((1, 2, 3), keepdims=True).round().astype(np.uint8), true.shape)
    measures = {"psnr": {"value": _psnr(true, made), "chance": _psnr(true, flat)}}
    judge = ClipOracle("--measures")
    with contextlib.suppress(RecipeError):
        judge.check(subjects)
        value, chance = (_judged(judge, subjects, [(n + shift) % len(made) for n in numbers], made) for shift in (0, 1))
        measures |= {name: {"value": round(value[name], 4), "chance": round(chance[name], 4)} for name in value}
    shown = np.stack([true, made], axis=1).reshape(-1, *true.shape[1:])[: 2 * _SHOWN]
    labels = ["original", "decoded"] * (len(shown) // 2)
    return {"measures": measures}, sheet(Drawn("clip", shown, fps=codec.fps), labels)


def _judged(judge: ClipOracle, subjects: EvalSet, numbers: Sequence[int], clips: np.ndarray) -> dict[str, float]:
    with judge.ready(torch.device("cpu")):
        judge.add(subjects, numbers, clips)
        return judge.result(single_worker)


def _psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Return the mean PSNR in dB of clips, uint8 [N, frames, H, W, 3], over their frames."""
    sides = (to_signed(torch.from_numpy(np.ascontiguousarray(side)).flatten(0, 1)) for side in (a, b))
    return round(float(psnr(*sides).mean()), 3)
