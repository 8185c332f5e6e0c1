"""What one row, image, unit or shard costs, and where each figure comes from"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Basis = Literal["measured", "published", "extrapolated", "assumed", "yours"]


@dataclass(frozen=True)
class Law:
    """One figure of the plan: its unit and its source."""

    value: float
    unit: str
    basis: Basis
    source: str


_BUILDING: Final = "docs/benchmarks.md, Building"
_PLANNING: Final = "docs/benchmarks.md, Planning"
_DRIVER: Final = "docs/benchmarks.md, The driver"
_SELECTION: Final = "docs/benchmarks.md, Selection and duplicates"
_OPERATIONS: Final = "docs/benchmarks.md, Operations"
_SD2: Final = "MosaicML's training of Stable Diffusion 2, on A100"

# Figures that --rate replaces. Those of a GPU are per GPU, those of a core are of the machine of docs/benchmarks.md.
RATES: Final[dict[str, Law]] = {
    "kept": Law(0.6, "of rows with a URL", "assumed", "many URLs of the web are dead, and images too small"),
    "build_256": Law(1 / 3.58e-3, "images/s a core at 256 px", "measured", _BUILDING),
    "build_512": Law(1 / 5.83e-3, "images/s a core at 512 px", "measured", _BUILDING),
    "build_copied": Law(1 / 0.49e-3, "images/s a core, check: header", "measured", _BUILDING),
    "decode": Law(284, "images/s a core", "measured", "docs/benchmarks.md, Captions"),
    "clip": Law(1500, "images/s a GPU", "published", "clip-retrieval, ViT-B/32"),
    "captions": Law(8, "images/s a GPU", "assumed", "a captioner of 7 to 8 billion parameters: 5 to 10"),
    "latents": Law(1e9 / (1300 * 3600), "images/s a GPU", "published", _SD2),
    "mfu": Law(0.4, "of the GPU's peak", "assumed", "docs/benchmarks-gpu.md has the goal"),
    "peak_tflops": Law(989, "TFLOP/s a GPU, bf16", "published", "NVIDIA's data sheet of the H100"),
}
# What cores do, whatever is on GPUs.
PLAN: Final = Law(5.4e-6, "core s a row", "measured", _PLANNING)
# What one process, the driver, does for all.
PLAN_DRIVER: Final = Law(6e-8, "s a row", "measured", _PLANNING)
UNIT: Final = Law(2.7e-3, "s a unit", "measured", _DRIVER)
SELECT: Final = Law(1.0e-6, "s a row", "measured", _SELECTION)
SELECT_BYTES: Final = Law(210, "bytes a row on the scratch disk", "measured", _SELECTION)
DUPLICATES: Final = Law(1.1e-6, "s a row", "measured", _SELECTION)
# Storage. A unit's share of the shards is left out: they have lines of their own.
UNIT_OBJECTS: Final = Law(4, "objects a unit", "measured", _OPERATIONS)
SHARD_OBJECTS: Final = Law(3, "objects a shard", "measured", _OPERATIONS)
UNIT_READS: Final = Law(14.2, "reads a unit of a build", "measured", _OPERATIONS)
PART_BYTES: Final = Law(50e6, "bytes a part of an upload", "assumed", "what s3fs sends at once")

PRICES: Final[dict[str, Law]] = {
    "core_hour": Law(0.0446, "$ a core hour", "published", "AWS c7i on demand, us-east-1"),
    "gpu_hour": Law(6.88, "$ a GPU hour", "published", "AWS p5 (H100) on demand, us-east-1"),
    "gb_month": Law(0.023, "$ a GB and month", "published", "S3 Standard, us-east-1"),
    "put_1000": Law(0.005, "$ for 1,000 writes", "published", "S3 Standard, us-east-1"),
    "get_1000": Law(0.0004, "$ for 1,000 reads", "published", "S3 Standard, us-east-1"),
}
