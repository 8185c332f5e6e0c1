"""Targets on which commands can run: kind → class"""

from typing import Final

from capstan.cluster.targets.aws import Aws
from capstan.cluster.targets.base import Target
from capstan.cluster.targets.kuberay import KubeRay
from capstan.cluster.targets.local import Local
from capstan.cluster.targets.ray_jobs import RayJobs
from capstan.cluster.targets.slurm import Slurm

KINDS: Final[dict[str, type[Target]]] = {
    "local": Local,
    "ray": RayJobs,
    "kuberay": KubeRay,
    "slurm": Slurm,
    "aws": Aws,
}
