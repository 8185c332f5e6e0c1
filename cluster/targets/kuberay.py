"""Target for Kubernetes with the KubeRay operator: a RayJob with its own cluster

    ConfigMap <id>   the recipe, mounted at /capstan
    RayJob <id>      a head that runs the command and no work; CPU workers and GPU workers, each between min and max

`image` is built from the Dockerfile: its target `gpu`, or `cpu` where no pod trains or captions.

Secrets are referenced, never stored: `secrets` maps variables to keys of Kubernetes secrets. The operator creates the
token that Ray's own servers require (authOptions; KubeRay 1.5 or newer). Worker pods may be reclaimed at any time:
their unfinished work is repeated elsewhere.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import shlex
from collections.abc import Iterator
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import Field, model_validator

from capstan.cluster.targets.base import (
    STOPPED,
    Handle,
    JobSpec,
    Machine,
    State,
    Status,
    Target,
    capstan_line,
    follow_tool,
    run_tool,
)
from capstan.pipeline.config import Section

_FOLDER: Final = "/capstan"  # where the recipe is mounted in the head's pod
_SHM: Final = "dshm"
_STATUS: Final[dict[str, Status]] = {
    "": "pending",
    "PENDING": "pending",
    "RUNNING": "running",
    "SUCCEEDED": "succeeded",
    "FAILED": "failed",
    "STOPPED": "stopped",
}
_SPOT_TAINTS: Final[list[dict[str, Any]]] = [
    {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"},
    {"key": "kubernetes.azure.com/scalesetpriority", "operator": "Equal", "value": "spot", "effect": "NoSchedule"},
    {"key": "capstan/spot", "operator": "Exists", "effect": "NoSchedule"},
]
# In Python, which every image of Capstan has, unlike wget.
_PROBE: Final = "import urllib.request as u; assert b'success' in u.urlopen('http://127.0.0.1:{}', timeout=3).read()"
_RAYLET: Final = _PROBE.format("52365/api/local_raylet_healthz")
_GCS: Final = _PROBE.format("8265/api/gcs_healthz")


class Volume(Section):
    """A volume that every pod mounts at `path`: a claim, a secret or a config map, by its name."""

    path: Annotated[str, Field(pattern="^/")]
    claim: str | None = None
    secret: str | None = None
    config_map: str | None = None
    read_only: bool = False

    @model_validator(mode="after")
    def _is_one(self) -> Volume:
        if sum(source is not None for source in (self.claim, self.secret, self.config_map)) != 1:
            raise ValueError("set exactly one of claim, secret and config_map")
        return self

    def source(self) -> dict[str, Any]:
        if self.claim is not None:
            return {"persistentVolumeClaim": {"claimName": self.claim, "readOnly": self.read_only}}
        if self.secret is not None:
            return {"secret": {"secretName": self.secret}}
        return {"configMap": {"name": self.config_map}}


class Spot(Section):
    """Taints and labels of spot nodes in this Kubernetes cluster."""

    tolerations: list[dict[str, Any]] = Field(default=_SPOT_TAINTS)
    node_selector: dict[str, str] = Field(default={})


class KubeRay(Target):
    kind: Literal["kuberay"] = "kuberay"
    image: str  # built from the Dockerfile, or another with Capstan installed
    namespace: str = "default"
    context: str | None = None  # kubectl's; null: the current one
    ray_version: str | None = None  # of the image; null: as installed here
    head: Machine = Machine(cpus=2, memory_gib=8)
    workers: Machine = Machine(cpus=4, memory_gib=16, min=0, max=4)
    gpu_workers: Machine | None = None
    spot: Spot = Spot()
    gpu_resource: str = "nvidia.com/gpu"
    secrets: dict[str, Annotated[str, Field(pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$")]] = Field(
        default={}
    )  # variable: secret/key
    volumes: dict[str, Volume] = Field(default={})
    service_account: str | None = None  # its role grants access to a bucket without any secret
    node_selector: dict[str, str] = Field(default={})
    keep_s: Annotated[int, Field(ge=0)] = 600  # seconds for which the cluster is kept after the end, for inspection
    deadline_s: Annotated[int, Field(ge=1)] | None = None
    retries: Annotated[int, Field(ge=0)] = 2  # in a new cluster, after a head was lost: the command resumes

    def documents(self, job: JobSpec) -> dict[str, str]:
        objects = [self._config_map(job), self._ray_job(job)]
        return {"rayjob.yaml": yaml.safe_dump_all(objects, sort_keys=False)}

    def _config_map(self, job: JobSpec) -> dict[str, Any]:
        texts = {name: content.decode("utf-8") for name, content in job.files.items()}
        return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": self._metadata(job), "data": texts}

    def _metadata(self, job: JobSpec) -> dict[str, Any]:
        labels = {"app.kubernetes.io/managed-by": "capstan", "capstan/command": job.command}
        return {"name": job.id, "namespace": self.namespace, "labels": labels}

    def _ray_job(self, job: JobSpec) -> dict[str, Any]:
        groups = [("cpu", self.workers)] + ([("gpu", self.gpu_workers)] if self.gpu_workers else [])
        spec: dict[str, Any] = {
            "entrypoint": shlex.join(["bash", "-c", f"cd {_FOLDER} && exec {capstan_line(job)}"]),
            "submissionMode": "K8sJobMode",
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": self.keep_s,
            "backoffLimit": self.retries,
            "rayClusterSpec": {
                "rayVersion": self.ray_version or importlib.metadata.version("ray"),
                "authOptions": {"mode": "token"},
                "enableInTreeAutoscaling": True,
                "autoscalerOptions": {"upscalingMode": "Default", "idleTimeoutSeconds": 120},
                "headGroupSpec": {
                    "serviceType": "ClusterIP",  # reached from inside the cluster only
                    "rayStartParams": {"num-cpus": "0"},
                    "template": self._pod("ray-head", self.head, job),
                },
                "workerGroupSpecs": [self._group(name, machine) for name, machine in groups],
            },
        }
        if self.deadline_s is not None:
            spec["activeDeadlineSeconds"] = self.deadline_s
        return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": self._metadata(job), "spec": spec}

    def _group(self, name: str, machine: Machine) -> dict[str, Any]:
        return {
            "groupName": name,
            "replicas": machine.min,
            "minReplicas": machine.min,
            "maxReplicas": machine.max,
            "rayStartParams": {"num-cpus": str(machine.cpus)},
            "template": self._pod("ray-worker", machine, None),
        }

    def _pod(self, name: str, machine: Machine, job: JobSpec | None) -> dict[str, Any]:
        """Return a pod template; that of the head, which has a `job`, mounts the recipe."""
        is_head = job is not None
        mounts: list[dict[str, Any]] = [{"name": _SHM, "mountPath": "/dev/shm"}]
        volumes: list[dict[str, Any]] = [
            {"name": _SHM, "emptyDir": {"medium": "Memory", "sizeLimit": f"{max(1, machine.memory_gib // 3)}Gi"}}
        ]
        for volume, settings in self.volumes.items():
            volumes.append({"name": volume, **settings.source()})
            mounts.append({"name": volume, "mountPath": settings.path, **_read_only(settings)})
        if job is not None:
            volumes.append({"name": "recipe", "configMap": {"name": job.id}})
            mounts.append({"name": "recipe", "mountPath": _FOLDER})
        size: dict[str, str] = {"cpu": str(machine.cpus), "memory": f"{machine.memory_gib}Gi"}
        if machine.gpus:
            size[self.gpu_resource] = str(machine.gpus)
        container: dict[str, Any] = {
            "name": name,
            "image": self.image,
            "env": self._variables(),
            "resources": {"requests": size, "limits": dict(size)},
            "volumeMounts": mounts,
            "readinessProbe": _probe([_RAYLET, _GCS] if is_head else [_RAYLET], failures=10),
            "livenessProbe": _probe([_RAYLET, _GCS] if is_head else [_RAYLET], failures=60),
            "securityContext": {"allowPrivilegeEscalation": False},
        }
        spec: dict[str, Any] = {"containers": [container], "volumes": volumes}
        if self.service_account:
            spec["serviceAccountName"] = self.service_account
        selector = self.node_selector | (self.spot.node_selector if machine.spot else {})
        if selector:
            spec["nodeSelector"] = selector
        tolerations = [dict(taint) for taint in self.spot.tolerations] if machine.spot else []
        if machine.gpus:
            tolerations.append({"key": self.gpu_resource, "operator": "Exists", "effect": "NoSchedule"})
        if tolerations:
            spec["tolerations"] = tolerations
        if not is_head:
            spec["terminationGracePeriodSeconds"] = 60
        return {"metadata": {"labels": {"app.kubernetes.io/managed-by": "capstan"}}, "spec": spec}

    def _variables(self) -> list[dict[str, Any]]:
        plain = [{"name": name, "value": value} for name, value in sorted(self.env.items())]
        referred = []
        for variable, reference in sorted(self.secrets.items()):
            secret, _, key = reference.partition("/")
            referred.append({"name": variable, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}})
        return plain + referred

    # With kubectl ----------------------------------------------------------------------------------------------------

    def _kubectl(self, *arguments: str) -> list[str]:
        context = ["--context", self.context] if self.context else []
        return ["kubectl", *context, "--namespace", self.namespace, *arguments]

    def send(self, job: JobSpec) -> Handle:
        run_tool(self._kubectl("apply", "-f", "-"), field="kind", stdin=self.documents(job)["rayjob.yaml"])
        return {"rayjob": job.id}

    def state(self, handle: Handle) -> State:
        found = run_tool(
            self._kubectl("get", "rayjob", handle["rayjob"], "--ignore-not-found", "-o", "json"), field="kind"
        )
        if not found.strip():
            return State("lost", message="the RayJob no longer exists")
        reported = json.loads(found).get("status") or {}
        status, message = _STATUS.get(reported.get("jobStatus", ""), "pending"), reported.get("message", "")
        deployment = reported.get("jobDeploymentStatus", "")
        if deployment in ("Suspended", "Suspending"):
            return State("stopped", STOPPED)
        if deployment == "Failed":
            status = "failed"
        elif status == "failed" and deployment in ("Retrying", "Running"):
            return State("running", message="it is being retried in a new cluster")
        code = _exit_code(message) if status == "failed" else (0 if status == "succeeded" else None)
        if code == STOPPED or status == "stopped":
            return State("stopped", STOPPED)
        return State(status, code, message.partition("last available logs")[0].strip().rstrip(","))

    def logs(self, handle: Handle, *, follow: bool) -> Iterator[str]:
        # The operator's submitter, a Kubernetes job with the RayJob's name, prints the command's output.
        command = self._kubectl("logs", f"job/{handle['rayjob']}", *(["--follow"] if follow else []))
        yield from follow_tool(command, field="kind")

    def stop(self, handle: Handle) -> None:
        suspend = json.dumps({"spec": {"suspend": True}})
        run_tool(self._kubectl("patch", "rayjob", handle["rayjob"], "--type=merge", "-p", suspend), field="kind")


def _read_only(volume: Volume) -> dict[str, bool]:
    return {"readOnly": True} if volume.read_only or volume.claim is None else {}


def _probe(checks: list[str], failures: int) -> dict[str, Any]:
    code = "\n".join(checks)
    timing = {"initialDelaySeconds": 10, "periodSeconds": 10, "timeoutSeconds": 10, "failureThreshold": failures}
    return {"exec": {"command": ["python", "-c", code]}, **timing}


def _exit_code(message: str) -> int | None:
    """Return the command's exit code, from Ray's message about a failed job; None if it has none."""
    found = re.search(r"exit code (\d+)", message)
    return int(found[1]) if found else None
