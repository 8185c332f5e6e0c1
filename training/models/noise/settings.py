"""Settings of noise processes: rectified flow and DDPM."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from capstan.pipeline.config import Section

Positive = Annotated[int, Field(ge=1)]


def check_sampler(objective: str, sampler: str | None) -> None:
    """Raise ValueError (for pydantic) if a sampler is for another objective."""
    if sampler in {"flow": ("ddim", "ddpm"), "ddpm": ("euler",)}[objective]:
        hint = "dpm++ or euler" if objective == "flow" else "ddim, ddpm or dpm++"
        raise ValueError(f"sampling.sampler {sampler} is not for objective {objective}; use {hint}")


class FlowSettings(Section):
    """Rectified flow (`objective: flow`)."""

    times: Literal["logit_normal", "uniform"] = "logit_normal"
    """How times are drawn in training: concentrated in the middle (logit-normal), or uniformly."""
    mean: float = 0.0
    """Mean of the logit of the time: above 0, noisier times are drawn more often."""
    std: Annotated[float, Field(gt=0)] = 1.0
    """Standard deviation of the logit of the time."""
    shift: Annotated[float, Field(gt=0)] = 1.0
    """Shift of the times: above 1, noisier ones in training and sampling, for large images."""
    base: Positive | None = None
    """Pixels per side for which shift is meant: it is multiplied by size / base (SD3: 256); null: as it is."""


class DdpmSettings(Section):
    """DDPM (`objective: ddpm`), with the noise schedule of Stable Diffusion."""

    prediction: Literal["epsilon", "v_prediction", "sample"] = "v_prediction"
    """What the network predicts: the noise (epsilon), v, or the image (sample)."""
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 0.00085
    """Noise variance of the first timestep."""
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.012
    """Noise variance of the last timestep."""
    zero_terminal_snr: bool = True
    """Whether the last step is pure noise, as at the start of sampling."""
    min_snr: Annotated[float, Field(gt=0)] | None = None
    """Γ of min-SNR weighting, e.g. 5, which needs zero_terminal_snr: false; null: off."""
    offset_noise: Annotated[float, Field(ge=0)] = 0.0
    """Strength of offset noise, which helps very dark and very bright images; 0: off."""

    @model_validator(mode="after")
    def _can_be_sampled(self) -> DdpmSettings:
        if self.prediction == "epsilon" and self.zero_terminal_snr:
            raise ValueError(
                "prediction epsilon has no information where there is only noise; "
                "use zero_terminal_snr: false, or prediction: v_prediction"
            )
        # Min-SNR weights x0's error by min(SNR, γ) (Hang et al. 2023, §3.4), and sampling starts at an SNR of 0 (Lin et
        # al. 2023, §3.3). No paper has a floor of 1 there: the neighbouring step's weight is a millionth of that.
        if self.min_snr is not None and self.zero_terminal_snr:
            raise ValueError(
                "min_snr leaves the pure-noise step untrained, at which sampling starts; "
                "use zero_terminal_snr: false, or remove min_snr"
            )
        return self
