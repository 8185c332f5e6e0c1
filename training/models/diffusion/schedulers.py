"""A path from noise to data and a sampler's name → the diffusers scheduler that walks it.

ddim    DDPM's path, deterministic (Song et al. 2021, DDIM, eq. 12 with σ = 0)
dpm++   either path, DPM-Solver++ (2M) (Lu et al. 2022, alg. 2)
euler   rectified flow's path, in straight steps along the velocity (Liu et al. 2022, §2.1)
"""

from __future__ import annotations

from typing import Any, Final, Literal

from capstan.pipeline.errors import RecipeError

SamplerName = Literal["ddim", "dpm++", "euler"]

STEPS: Final = 1000  # the timesteps 0 … 999 that the model is told are thousandths of the way to noise


def flow_scheduler(sampler: SamplerName | None, shift: float, *, exact: bool) -> Any:
    """For rectified flow (default dpm++, or euler if `exact`), with the times shifted by `shift`.

    `exact`: the pipeline takes FlowMatchEulerDiscreteScheduler, which tells the model exact times and not whole
    thousandths. Where it does not, euler is DPM-Solver++ of order 1, which on a straight path is the same step.
    """
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

    sampler = sampler or ("euler" if exact else "dpm++")
    if sampler == "ddim":
        raise RecipeError("--sampler", "ddim does not walk a flow's path", "use dpm++ or euler")
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
        steps_offset=1,  # of no effect here; StableDiffusionPipeline warns of another value
    )


def ddpm_scheduler(sampler: SamplerName | None, **schedule: Any) -> Any:
    """For DDPM's path (default ddim); `schedule` is its noise schedule and prediction, in diffusers' names."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    if sampler == "euler":
        raise RecipeError("--sampler", "euler walks a flow's path, and this model learnt DDPM's", "use ddim or dpm++")
    common = {
        **schedule,
        "num_train_timesteps": STEPS,
        "timestep_spacing": "trailing",  # begin at the last timestep, as Lin et al. 2023 §3.3 ask
        "steps_offset": 1,
    }
    if sampler == "dpm++":
        return DPMSolverMultistepScheduler(**common, algorithm_type="dpmsolver++", solver_order=2)
    return DDIMScheduler(**common, clip_sample=False)


def switch(pipeline: Any, sampler: SamplerName) -> None:
    """Let `pipeline` draw with another sampler, along the path that its own scheduler walks. Raises RecipeError."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = pipeline.scheduler.config
    if config.get("use_flow_sigmas") or isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
        shift = config.get("flow_shift", config.get("shift", 1.0))
        exact = type(pipeline).__name__ == "StableDiffusion3Pipeline"
        pipeline.scheduler = flow_scheduler(sampler, shift, exact=exact)
        return
    names = ("beta_start", "beta_end", "beta_schedule", "prediction_type", "rescale_betas_zero_snr")
    pipeline.scheduler = ddpm_scheduler(sampler, **{name: config[name] for name in names if name in config})
