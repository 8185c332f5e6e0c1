"""Target for AWS: machines started by Ray's cluster launcher, jobs through a tunnel

    FOLDER/<cluster>.yaml   the launcher's file; `ray down` on it ends the cluster and its costs

Nodes reach buckets by the role of their instance profile. The launcher copies Ray's token from this machine to the
nodes over ssh; no file written here holds it. The dashboard listens on the head's loopback.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import Field

from capstan.cluster.targets.base import Handle, JobSpec, Machine, State, Target, run_tool
from capstan.cluster.targets.ray_jobs import RayJobs
from capstan.cluster.user_dirs import state_folder
from capstan.pipeline.errors import CapstanError, RecipeError
from capstan.pipeline.ports import free_port
from capstan.pipeline.storage import Storage

_TUNNEL_S: Final = 60.0
_TOKEN: Final = "~/.ray/auth_token"


class Instances(Machine):
    """A kind of node: an EC2 instance type, and the range of how many there are."""

    type: str
    disk_gib: Annotated[int, Field(ge=8)] = 200


class Aws(Target):
    kind: Literal["aws"] = "aws"
    region: str = "us-east-1"
    cluster: str | None = None  # its name; null: capstan-<target>
    head: Instances = Instances(type="m6i.xlarge")
    workers: Instances = Instances(type="m6i.4xlarge", max=4, spot=True)
    gpu_workers: Instances | None = None
    image: str | None = None  # an image built from the Dockerfile; null: `setup` installs Capstan
    ami: str | None = None  # null: Ray's choice for the region
    instance_profile: str | None = None  # ARN of the profile with which nodes reach the bucket
    ssh_user: str = "ubuntu"
    setup: list[str] = Field(default=[])  # shell commands on every node; without an image they install Capstan
    idle_minutes: Annotated[float, Field(gt=0)] = 10  # after which an idle worker is terminated
    token_file: str = _TOKEN

    @property
    def _cluster(self) -> str:
        return self.cluster or f"capstan-{self.name or 'aws'}"

    def documents(self, job: JobSpec) -> dict[str, str]:
        return {"cluster.yaml": self._launcher(), **self._jobs("http://127.0.0.1:8265").documents(job)}

    def _launcher(self) -> str:
        kinds = {"head": self.head, "cpu": self.workers} | ({"gpu": self.gpu_workers} if self.gpu_workers else {})
        home = "/home/ray" if self.image else f"/home/{self.ssh_user}"
        port, start = "--port=6379 --object-manager-port=8076", "ulimit -n 65536; RAY_AUTH_MODE=token ray start"
        config: dict[str, Any] = {
            "cluster_name": self._cluster,
            "max_workers": sum(kind.max for name, kind in kinds.items() if name != "head"),
            "upscaling_speed": 1.0,
            "idle_timeout_minutes": self.idle_minutes,
            "provider": {"type": "aws", "region": self.region, "cache_stopped_nodes": False},
            "auth": {"ssh_user": self.ssh_user},
            "available_node_types": {name: self._node_type(name, kind) for name, kind in kinds.items()},
            "head_node_type": "head",
            "file_mounts": {f"{home}/.ray/auth_token": self.token_file},
            "cluster_synced_files": [],
            "initialization_commands": [],
            "setup_commands": list(self.setup),
            "head_setup_commands": [],
            "worker_setup_commands": [],
            "head_start_ray_commands": [
                "ray stop",
                f"{start} --head {port} --autoscaling-config=~/ray_bootstrap_config.yaml --dashboard-host=127.0.0.1",
            ],
            "worker_start_ray_commands": [
                "ray stop",
                f"{start} --address=$RAY_HEAD_IP:6379 --object-manager-port=8076",
            ],
        }
        if self.image:
            options = ["--ulimit nofile=65536:65536", "--shm-size=8g"]
            config["docker"] = {"image": self.image, "container_name": "capstan", "run_options": options}
        return f"# Ray {importlib.metadata.version('ray')}: ray up, ray down\n" + yaml.safe_dump(
            config, sort_keys=False
        )

    def _node_type(self, name: str, kind: Instances) -> dict[str, Any]:
        disk = {"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": kind.disk_gib, "VolumeType": "gp3"}}
        node: dict[str, Any] = {"InstanceType": kind.type, "BlockDeviceMappings": [disk]}
        if self.ami:
            node["ImageId"] = self.ami
        if self.instance_profile:
            node["IamInstanceProfile"] = {"Arn": self.instance_profile}
        if name == "head":  # runs drivers and no work: it is the one node that must not be lost
            return {"resources": {"CPU": 0}, "node_config": node}
        if kind.spot:
            node["InstanceMarketOptions"] = {"MarketType": "spot"}
        gpus = {"GPU": kind.gpus} if kind.gpus else {}
        resources = {"CPU": kind.cpus, **gpus}
        return {"min_workers": kind.min, "max_workers": kind.max, "resources": resources, "node_config": node}

    # With `ray up` and a tunnel ---------------------------------------------------------------------------------------

    def _jobs(self, address: str) -> RayJobs:
        """Return the cluster as a target at `address`, the local end of a tunnel."""
        return RayJobs(name=self.name, address=address, token_file=self.token_file, env=self.env)

    def send(self, job: JobSpec) -> Handle:
        if not Path(self.token_file).expanduser().exists():
            hint = "create one with `ray get-auth-token --generate`"
            raise RecipeError(f"{self.name}.token_file", f"{self.token_file} does not exist", hint)
        folder = state_folder() / "aws"
        Storage(str(folder)).write(f"{self._cluster}.yaml", self._launcher().encode())
        file = str(folder / f"{self._cluster}.yaml")
        run_tool([*_RAY, "up", file, "--yes", "--no-config-cache"], field="kind")
        with self._tunnel(file) as jobs:
            return {"file": file, **jobs.send(job)}

    def state(self, handle: Handle) -> State:
        with self._tunnel(handle["file"]) as jobs:
            return jobs.state(handle)

    def logs(self, handle: Handle, *, follow: bool) -> Iterator[str]:
        with self._tunnel(handle["file"]) as jobs:
            yield from jobs.logs(handle, follow=follow)

    def stop(self, handle: Handle) -> None:
        with self._tunnel(handle["file"]) as jobs:
            jobs.stop(handle)

    @contextlib.contextmanager
    def _tunnel(self, file: str) -> Iterator[RayJobs]:
        """Yield the cluster, reached through a local port that leads to the head's dashboard."""
        port = free_port()
        command = [*_RAY, "dashboard", file, f"--port={port}"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as tunnel:
            try:
                started = time.monotonic()
                while not _answers(port):
                    if tunnel.poll() is not None or time.monotonic() - started > _TUNNEL_S:
                        hint = f"see `ray dashboard {file}`"
                        raise CapstanError(f"target {self.name}: no tunnel to the head of {self._cluster}. Fix: {hint}")
                    time.sleep(0.2)
                yield self._jobs(f"http://127.0.0.1:{port}")
            finally:
                tunnel.terminate()


_RAY: Final = [sys.executable, "-m", "ray.scripts.scripts"]


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False
