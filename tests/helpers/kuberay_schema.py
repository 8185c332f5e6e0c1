"""What may stand in a RayJob, by the published names and types of ray.io/v1 (KubeRay 1.5) and Kubernetes' models.

KubeRay's API server refuses an unknown or mistyped field; so does `check_ray_job`.
"""

from __future__ import annotations

import re
from typing import Any

from kubernetes.client import models

_TEMPLATE, _ENV, _RESOURCES = "V1PodTemplateSpec", "list[V1EnvVar]", "V1ResourceRequirements"
_SPECS: dict[str, dict[str, Any]] = {
    "RayJobSpec": {
        "activeDeadlineSeconds": int,
        "backoffLimit": int,
        "preRunningDeadlineSeconds": int,
        "rayClusterSpec": "RayClusterSpec",
        "submitterPodTemplate": _TEMPLATE,
        "metadata": dict,
        "clusterSelector": dict,
        "submitterConfig": dict,
        "managedBy": str,
        "deletionStrategy": dict,
        "entrypoint": str,
        "runtimeEnvYAML": str,
        "jobId": str,
        "submissionMode": ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
        "entrypointResources": str,
        "entrypointNumCpus": float,
        "entrypointNumGpus": float,
        "ttlSecondsAfterFinished": int,
        "shutdownAfterJobFinishes": bool,
        "suspend": bool,
    },
    "RayClusterSpec": {
        "headGroupSpec": "HeadGroupSpec",
        "workerGroupSpecs": "list[WorkerGroupSpec]",
        "rayVersion": str,
        "enableInTreeAutoscaling": bool,
        "autoscalerOptions": "AutoscalerOptions",
        "headServiceAnnotations": dict,
        "gcsFaultToleranceOptions": dict,
        "managedBy": str,
        "suspend": bool,
        "upgradeStrategy": dict,
        "authOptions": "AuthOptions",
    },
    "AuthOptions": {"mode": ("disabled", "token"), "secretName": str},
    "AutoscalerOptions": {
        "resources": _RESOURCES,
        "image": str,
        "imagePullPolicy": ("Always", "Never", "IfNotPresent"),
        "env": _ENV,
        "envFrom": list,
        "volumeMounts": "list[V1VolumeMount]",
        "securityContext": "V1SecurityContext",
        "idleTimeoutSeconds": int,
        "upscalingMode": ("Default", "Aggressive", "Conservative"),
        "version": ("v1", "v2"),
    },
    "HeadGroupSpec": {
        "serviceType": ("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"),
        "headService": dict,
        "enableIngress": bool,
        "resources": dict,
        "labels": dict,
        "rayStartParams": "strings",
        "template": _TEMPLATE,
    },
    "WorkerGroupSpec": {
        "groupName": str,
        "replicas": int,
        "minReplicas": int,
        "maxReplicas": int,
        "numOfHosts": int,
        "idleTimeoutSeconds": int,
        "suspend": bool,
        "resources": dict,
        "labels": dict,
        "rayStartParams": "strings",
        "template": _TEMPLATE,
        "scaleStrategy": dict,
    },
}
_REQUIRED = {
    "RayClusterSpec": {"headGroupSpec"},
    "HeadGroupSpec": {"template"},
    "WorkerGroupSpec": {"groupName", "template", "minReplicas", "maxReplicas"},
}
_PLAIN: dict[str, type] = {"str": str, "int": int, "bool": bool, "float": float}


def check_ray_job(job: dict[str, Any]) -> None:
    """Raise ValueError naming the first field that is unknown, mistyped or missing."""
    if (job["apiVersion"], job["kind"]) != ("ray.io/v1", "RayJob"):
        raise ValueError("not a RayJob of ray.io/v1")
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,45}[a-z0-9])?", job["metadata"]["name"]):
        raise ValueError(f"metadata.name: {job['metadata']['name']} is longer than 47, or no name of a service")
    check(job["metadata"], "V1ObjectMeta", "metadata")
    check(job["spec"], "RayJobSpec", "spec")


def check(value: Any, kind: Any, where: str) -> None:
    """`value` against a type: of _SPECS, a model of Kubernetes, `list[…]`, `dict[str, …]`, a choice, a plain one."""
    if isinstance(kind, tuple):
        _expect(value in kind, where, f"{value!r} is none of {kind}")
    elif kind == "strings":
        _expect(isinstance(value, dict) and all(isinstance(v, str) for v in value.values()), where, "not strings")
    elif isinstance(kind, type):
        _expect(
            isinstance(value, kind) and not (kind is int and isinstance(value, bool)), where, f"not {kind.__name__}"
        )
    elif inner := re.fullmatch(r"[lL]ist\[(.*)\]", kind):
        _expect(isinstance(value, list), where, "not a list")
        for number, item in enumerate(value):
            check(item, inner[1], f"{where}[{number}]")
    elif inner := re.fullmatch(r"[dD]ict[\[(](\w+), (.*)[\])]", kind):
        _expect(isinstance(value, dict), where, "not a mapping")
        for name, item in value.items():
            check(item, inner[2], f"{where}.{name}")
    elif kind in _PLAIN:
        check(value, _PLAIN[kind], where)
    elif kind in _SPECS:
        _fields(value, _SPECS[kind], _REQUIRED.get(kind, set()), where)
    elif hasattr(models, kind):
        _model(value, getattr(models, kind), where)
    else:
        _expect(kind in ("object", "datetime"), where, f"unknown type {kind}")


def _fields(value: Any, known: dict[str, Any], required: set[str], where: str) -> None:
    _expect(isinstance(value, dict), where, "not a mapping")
    for name in sorted(required - value.keys()):
        raise ValueError(f"{where}.{name}: is missing")
    for name, item in value.items():
        _expect(name in known, f"{where}.{name}", "no such field")
        check(item, known[name], f"{where}.{name}")


def _model(value: Any, model: Any, where: str) -> None:
    names = {published: python for python, published in model.attribute_map.items()}
    known = {published: model.openapi_types[python] for published, python in names.items()}
    _fields(value, known, set(), where)
    python = {names[name]: item for name, item in value.items()}
    model(**python)  # refuses what lacks a required field


def _expect(holds: bool, where: str, problem: str) -> None:
    if not holds:
        raise ValueError(f"{where}: {problem}")
