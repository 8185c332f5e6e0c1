"""How many samples a second one GPU trains on: said by the user, logged by a run, or from the FLOPs of a sample"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from capstan.cluster.cost.laws import Law
from capstan.cluster.doctor.estimates import parameters
from capstan.pipeline.config import Recipe
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage import Storage
from capstan.training.config import TrainConfig
from capstan.training.monitoring.run_files import RunFiles, is_run

_UNET_SHARE: Final = 0.114  # of 6 × parameters × positions: deeper levels see fewer. Stable Diffusion's, counted
_FACTOR: Final = 8  # pixels a latent, along a side


def samples_per_s(recipe: Recipe, train: TrainConfig, rates: Mapping[str, Law]) -> tuple[float, dict[str, Law]]:
    """Return the rate of one GPU and the figures that it rests on.

    `--rate train=` wins; then the log of the run, if it says an MFU; then the FLOPs of a sample (from the log, or for
    diffusion about 6 × parameters × positions: Kaplan et al. 2020) at the assumed MFU. Raises RecipeError if nothing
    is known.
    """
    if (stated := rates.get("train")) is not None:
        return stated.value, {"train": stated}
    flops = _logged(train)
    if flops is None:
        flops = _counted(recipe, train)
    if flops is None:
        hint = "train a few steps first (--set train.steps=50), or give --rate train=SAMPLES_PER_S_AND_GPU"
        raise RecipeError("train.model", f"nothing tells the work of a sample of {train.model}", hint)
    if flops.unit == "samples/s a GPU":
        return flops.value, {"train": flops}
    mfu, peak = rates["mfu"], rates["peak_tflops"]
    return mfu.value * peak.value * 1e12 / flops.value, {"flops": flops, "mfu": mfu, "peak_tflops": peak}


def _logged(train: TrainConfig) -> Law | None:
    """Return what the run's log says: the rate per GPU if it knows the GPU, else the FLOPs of a sample."""
    storage = Storage(train.run, field="train.run")
    if not is_run(storage):
        return None
    run = RunFiles(storage, train.run)
    rate, flops = run.last_of("samples_per_s"), run.last_of("flops_per_s")
    source = f"{train.run}/log.jsonl"
    if rate and run.last_of("mfu") is not None:
        return Law(rate / train.engine.most, "samples/s a GPU", "measured", source)
    return Law(flops / rate, "FLOPs a sample", "measured", source) if rate and flops else None


def _counted(recipe: Recipe, train: TrainConfig) -> Law | None:
    if train.model != "diffusion" or (count := parameters(train)) is None:
        return None
    settings = train.settings
    side = (settings.size or recipe.image.size) // _FACTOR
    config = settings.config if isinstance(settings.config, dict) else {}
    is_unet = "unet" in settings.model_fields_set or (settings.preset is None and not config)
    positions = side**2 * _UNET_SHARE if is_unet else (side / config.get("patch_size", 2)) ** 2
    source = f"6 × {count / 1e6:,.0f} million parameters × {positions:,.0f} positions"
    return Law(6 * count * positions, "FLOPs a sample", "extrapolated", source)
