"""Where commands can run: kind → its file."""

from typing import Final

from cluster.targets.aws import Aws
from cluster.targets.base import Target
from cluster.targets.kuberay import KubeRay
from cluster.targets.local import Local
from cluster.targets.ray_jobs import RayJobs
from cluster.targets.slurm import Slurm

KINDS: Final[dict[str, type[Target]]] = {
    "local": Local,
    "ray": RayJobs,
    "kuberay": KubeRay,
    "slurm": Slurm,
    "aws": Aws,
}
