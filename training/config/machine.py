"""GPUs and CPUs → how many workers a run gets, and what each of them has"""

from __future__ import annotations

import os
from collections.abc import Sequence

from capstan.pipeline.config import Resources
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.gpus import check_gpus, check_precision, on_cluster, this_machine_has, usable_gpus
from capstan.training.config import TrainConfig


def check_machine(train: TrainConfig, resources: Resources) -> None:
    """Raise RecipeError if this machine lacks the GPUs or CPUs that a run needs, or cannot compute in its precision.

    Of a cluster (RAY_ADDRESS) nothing is known before the run starts there.
    """
    check_gpus(resources)
    check_precision(train.precision, "train.precision", resources)
    gpus, sizes = usable_gpus(resources), train.world_sizes()
    if gpus is None:
        return
    if train.engine.launcher == "local":
        if 0 < gpus < sizes[0]:
            hint = f"set engine.workers to at most {gpus}, or run on a cluster (capstan submit)"
            raise RecipeError("train.engine.workers", f"is {sizes[0]}, but {this_machine_has(gpus)}", hint)
    elif not on_cluster():
        cpus = [resources.cpus or len(os.sched_getaffinity(0))]
        if placement(sizes, gpus if resources.gpus is None else resources.gpus, cpus, train.engine.threads) is None:
            raise too_few(sizes, gpus, cpus)


def placement(
    sizes: Sequence[int], gpus: int, cpus: Sequence[int], threads: int | None
) -> tuple[int, dict[str, float]] | None:
    """Return the first of `sizes` that fits on nodes with these CPUs, and the resources of each worker.

    >>> placement([4, 2], 3, [16], None), placement([4, 2, 1], 0, [2], None), placement([4], 0, [2], None)
    ((2, {'CPU': 1, 'GPU': 1}), (2, {'CPU': 1}), None)
    """
    for workers in sizes:
        if gpus >= workers:
            return workers, {"CPU": 1, "GPU": 1}
        if not gpus and (each := cpus_per_worker(cpus, workers, threads)):
            return workers, {"CPU": each}
    return None


def cpus_per_worker(cpus: Sequence[int], workers: int, threads: int | None) -> int:
    """Return the CPUs for each worker, the most that fit on nodes with `cpus`, or `threads`; 0 if they do not fit.

    >>> [cpus_per_worker(cpus, 2, None) for cpus in ([2], [4, 2], [1, 0])], cpus_per_worker([8, 8], 2, 3)
    ([1, 2, 0], 3)
    """
    wanted = [threads] if threads else range(sum(cpus) // workers, 0, -1)
    return next((each for each in wanted if sum(cpu // each for cpu in cpus) >= workers), 0)


def too_few(sizes: Sequence[int], gpus: int, cpus: Sequence[int]) -> RecipeError:
    """Return the error for a run of which not even the smallest of `sizes` fits."""
    have = f"{gpus} GPUs" if gpus else f"{sum(cpus)} CPUs"
    hint = f"set engine.workers to at most {gpus or sum(cpus)}, or resources.cpus to {sizes[-1]}"
    return RecipeError("train.engine.workers", f"is {sizes[-1]}, but there are {have}", hint)
