"""All measurements, the newest risk first: what has never run on a GPU, then the figures that have goals."""

from __future__ import annotations

from benchmarks.gpu import captions, latents, marked_tests, scoring, steps, vlm
from benchmarks.gpu.results import Measurement, Results, Row

_steps = steps.measurements()
_best = 2 * len(steps.NETWORKS)  # bf16, and everything ahead: the steps that have goals
MEASUREMENTS: list[Measurement] = [
    *marked_tests.MEASUREMENTS,
    *_steps[:_best],
    *scoring.MEASUREMENTS,
    *captions.MEASUREMENTS,
    *latents.MEASUREMENTS,
    *vlm.MEASUREMENTS,
    *_steps[_best:],
]


def derived(results: Results) -> list[Row]:
    """Return the figures that compare measurements."""
    return steps.derived(results)
