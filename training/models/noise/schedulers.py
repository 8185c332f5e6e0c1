"""Objective and sampler name → the diffusers scheduler.

ddim    DDPM's path, deterministic (Song et al. 2021, DDIM, eq. 12 with σ = 0)
ddpm    DDPM's path, with new noise in each step (Ho et al. 2020, alg. 2)
dpm++   either path, DPM-Solver++ (2M) (Lu et al. 2022, alg. 2)
euler   rectified flow's path, in straight steps along the velocity (Liu et al. 2022, §2.1)
"""

from __future__ import annotations

import bisect
import copy
from typing import Any, Final, Literal

from capstan.pipeline.errors import RecipeError
from capstan.training.config import TrainConfig
from capstan.training.config.families import traits_of

SamplerName = Literal["ddim", "ddpm", "dpm++", "euler"]

STEPS: Final = 1000  # timesteps 0 … 999 are thousandths of the way from data to noise
_LARGEST: Final = 1000.0  # s of dynamic thresholding is not limited in the paper, and must be in diffusers
# The first step of sampling is at the last timestep (Lin et al. 2023, §3.3).
_SPACING: Final = {"num_train_timesteps": STEPS, "timestep_spacing": "trailing"}


def flow_scheduler(sampler: str | None, shift: float, *, exact: bool) -> Any:
    """Return the scheduler for rectified flow (default dpm++, or euler if `exact`), with times shifted by `shift`.

    `exact`: the pipeline takes FlowMatchEulerDiscreteScheduler, which passes exact times to the model, not whole
    thousandths. Otherwise euler is DPM-Solver++ of order 1, which is the same step on a straight path.

    Raises RecipeError for ddim and ddpm.
    """
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

    sampler = sampler or ("euler" if exact else "dpm++")
    if sampler in ("ddim", "ddpm"):
        raise RecipeError("--sampler", f"{sampler} is not for flow models", "use dpm++ or euler")
    if sampler == "euler" and exact:
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=STEPS, shift=shift)
    return DPMSolverMultistepScheduler(
        num_train_timesteps=STEPS,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
        algorithm_type="dpmsolver++",
        solver_order=1 if sampler == "euler" else 2,
        final_sigmas_type="zero",
        steps_offset=1,  # no effect here; StableDiffusionPipeline warns about other values
    )


def ddpm_scheduler(sampler: str | None, **schedule: Any) -> Any:
    """Return the scheduler for DDPM (default ddim); `schedule` is its noise schedule and prediction type.

    Raises RecipeError for euler.
    """
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

    if sampler == "euler":
        raise RecipeError("--sampler", "euler is for flow models, and this is a DDPM model", "use ddim, ddpm or dpm++")
    if sampler == "ddpm":
        return DDPMScheduler(**(schedule | _SPACING), variance_type="fixed_large", clip_sample=False)
    common = {
        **schedule,
        **_SPACING,
        "steps_offset": 1,
    }
    if sampler == "dpm++":
        return DPMSolverMultistepScheduler(**common, algorithm_type="dpmsolver++", solver_order=2)
    return DDIMScheduler(**common, clip_sample=False)


def pixel_scheduler(sampler: str, *, variance: str, threshold: float | None = None, **schedule: Any) -> Any:
    """Return the scheduler for DDPM on images in −1 … 1, to which every predicted x0 is clipped.

    `variance` is that of ddpm's new noise: fixed_small (β̃), fixed_large (β), or learned. `threshold` is the percentile
    p of dynamic thresholding: x0 is clipped to −s … s and divided by s, where s ≥ 1 is the p-th percentile of its
    absolute values (Saharia et al. 2022, Imagen, §2.3).
    """
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

    common = {**schedule, **_SPACING}
    clipping = {} if threshold is None else _thresholding(threshold, _LARGEST)
    if sampler == "ddpm":
        kind = {"learned": "learned_range"}.get(variance, variance)
        return DDPMScheduler(**common, **clipping, variance_type=kind, clip_sample=threshold is None)
    if sampler == "dpm++":
        if threshold is None:  # it can clip by this alone: s is 1
            clipping = _thresholding(1.0, 1.0)
        return DPMSolverMultistepScheduler(**common, **clipping, algorithm_type="dpmsolver++", solver_order=2)
    return DDIMScheduler(**common, **clipping, clip_sample=threshold is None)


def _thresholding(percentile: float, most: float) -> dict[str, Any]:
    """Return diffusers' keys for dynamic thresholding; s is at most `most`, by default 1, which would turn it off."""
    return {"thresholding": True, "dynamic_thresholding_ratio": percentile, "sample_max_value": most}


def check_steps(scheduler: Any, steps: int, field: str) -> None:
    """Raise RecipeError naming `field` if `scheduler` cannot sample in `steps` steps."""
    most = most_steps(scheduler)
    if steps > most:
        raise RecipeError(field, f"the schedule of this model has no {steps} steps", f"use {most} or fewer")


def check_all_steps(train: TrainConfig, scheduler: Any) -> None:
    """Raise RecipeError if a number of sampling steps of the recipe is more than the schedule has."""
    section = traits_of(train.model).name
    check_steps(scheduler, train.settings.sampling.steps, f"train.{section}.sampling.steps")
    for name, watched in (("samples", train.watch.samples), ("evaluate", train.watch.evaluate)):
        if watched is not None and watched.steps is not None:
            check_steps(scheduler, watched.steps, f"train.watch.{name}.steps")


def most_steps(scheduler: Any) -> int:
    """Return the largest number of steps that a diffusers scheduler can sample in.

    It is the number of its timesteps; fewer if whole timesteps are so dense at the start (a flow with a shift) that the
    first one occurs twice. Schedulers look up their position by the first timestep, and then run past the end.
    """
    timesteps = int(scheduler.config.get("num_train_timesteps", STEPS))
    if scheduler.config.get("use_dynamic_shifting"):  # its timesteps also depend on the image's size, and are exact
        return timesteps

    def repeats(steps: int) -> bool:
        trial = copy.deepcopy(scheduler)
        trial.set_timesteps(steps)
        return int((trial.timesteps == trial.timesteps[0]).sum()) > getattr(trial, "order", 1)

    return bisect.bisect_left(range(1, timesteps + 1), True, key=repeats)


def set_sampler(pipeline: Any, sampler: str) -> None:
    """Set another sampler on `pipeline`. Raises RecipeError if it is not for the pipeline's objective."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = pipeline.scheduler.config
    if config.get("use_flow_sigmas") or isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
        shift = config.get("flow_shift", config.get("shift", 1.0))
        exact = type(pipeline).__name__ == "StableDiffusion3Pipeline"
        pipeline.scheduler = flow_scheduler(sampler, shift, exact=exact)
        return
    names = ("beta_start", "beta_end", "beta_schedule", "prediction_type", "rescale_betas_zero_snr")
    pipeline.scheduler = ddpm_scheduler(sampler, **{name: config[name] for name in names if name in config})
