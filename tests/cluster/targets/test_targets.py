"""What each kind of target would send: valid for its scheduler, and without secrets."""

from __future__ import annotations

import copy
import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from kuberay_schema import check_ray_job

from capstan.cluster.jobs.clusters_file import find_target, make_target, read_targets
from capstan.cluster.targets.base import JobSpec
from capstan.pipeline.errors import CapstanError, RecipeError

JOB = JobSpec(
    "build-mine-261124201512-3f2a", ["build", "mine.yaml", "--set", "select=[]"], {"mine.yaml": b"dataset: s3://b/x\n"}
)
KUBERAY = {
    "kind": "kuberay",
    "image": "registry.example.org/capstan:1",
    "namespace": "ml",
    "workers": {"cpus": 8, "memory_gib": 32, "min": 1, "max": 20, "spot": True},
    "gpu_workers": {"cpus": 12, "memory_gib": 96, "gpus": 1, "max": 8, "spot": True},
    "secrets": {"AWS_SECRET_ACCESS_KEY": "bucket/secret", "AWS_ACCESS_KEY_ID": "bucket/key"},
    "env": {"AWS_DEFAULT_REGION": "eu-west-1"},
    "volumes": {"data": {"path": "/data", "claim": "datasets"}, "ca": {"path": "/ca", "config_map": "ca"}},
    "service_account": "trainer",
    "deadline_s": 86400,
}
SLURM = {
    "kind": "slurm",
    "folder": "/shared/jobs",
    "nodes": 4,
    "gpus": 8,
    "partition": "gpu",
    "setup": ["module load cuda"],
}
AWS = {"kind": "aws", "gpu_workers": {"type": "g6.xlarge", "gpus": 1, "max": 8, "spot": True}, "image": "me/capstan:1"}
RAY = {"kind": "ray", "address": "http://127.0.0.1:8265"}


def ray_job(**settings: Any) -> dict[str, Any]:
    text = make_target("k", KUBERAY | settings).documents(JOB)["rayjob.yaml"]
    config_map, job = yaml.safe_load_all(text)
    assert config_map["data"] == {"mine.yaml": "dataset: s3://b/x\n"}
    assert "&id" not in text
    return dict(job)


# KubeRay -------------------------------------------------------------------------------------------------------------


def test_a_ray_job_is_one_that_kuberay_takes() -> None:
    for changes in ({}, {"gpu_workers": None}, {"secrets": {}, "volumes": {}, "env": {}, "deadline_s": None}):
        check_ray_job(ray_job(**changes))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["spec", "entryPoint"], "x"),
        (["spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0, "volumeMount"], []),
        (["spec", "rayClusterSpec", "workerGroupSpecs", 0, "minReplicas"], "1"),
        (["spec", "rayClusterSpec", "headGroupSpec", "rayStartParams"], {"num-cpus": 0}),
        (["metadata", "name"], "a" * 60),
    ],
)
def test_the_schema_refuses_what_kuberay_would(path: list[Any], value: Any) -> None:
    job = copy.deepcopy(ray_job())
    inner: Any = job
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    with pytest.raises(ValueError, match=str(path[-1]).split("[")[0]):
        check_ray_job(job)


def test_a_ray_job_has_what_was_asked_for() -> None:
    spec = ray_job()["spec"]
    assert spec["entrypoint"] == "bash -c 'cd /capstan && exec capstan build mine.yaml --set '\"'\"'select=[]'\"'\"''"
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    head, (cpu, gpu) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert head["rayStartParams"] == {"num-cpus": "0"}
    assert (cpu["minReplicas"], cpu["maxReplicas"], gpu["minReplicas"], gpu["maxReplicas"]) == (1, 20, 0, 8)
    pod = gpu["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"] == {"cpu": "12", "memory": "96Gi", "nvidia.com/gpu": "1"}
    assert "nvidia.com/gpu" in [toleration["key"] for toleration in pod["tolerations"]]
    assert "tolerations" not in head["template"]["spec"]  # the head is never on a machine that may be taken back
    variables = {entry["name"]: entry for entry in pod["containers"][0]["env"]}
    assert variables["AWS_SECRET_ACCESS_KEY"]["valueFrom"] == {"secretKeyRef": {"name": "bucket", "key": "secret"}}
    assert {"readinessProbe", "livenessProbe"} <= pod["containers"][0].keys()


def test_a_probe_asks_what_it_says(tmp_path: Path) -> None:
    """The probe's own code, against a server that is well and then is not."""
    probe = ray_job()["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0][
        "livenessProbe"
    ]
    (tmp_path / "api").mkdir()
    (tmp_path / "api" / "local_raylet_healthz").write_text("success")
    server = subprocess.Popen(
        [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    port = server.stdout.readline().split("port ")[1].split()[0]
    code = probe["exec"]["command"][2].replace("52365", port)
    try:
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0
        (tmp_path / "api" / "local_raylet_healthz").write_text("failed")
        assert subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode != 0
    finally:
        server.kill()
        server.wait()


# Slurm ---------------------------------------------------------------------------------------------------------------


def shellcheck(script: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    (tmp_path / "job.sh").write_text(script)
    tool = Path(sys.executable).with_name("shellcheck")
    return subprocess.run([str(tool), "--severity=style", str(tmp_path / "job.sh")], capture_output=True, text=True)


@pytest.mark.parametrize(
    "changes", [{}, {"nodes": 1, "gpus": 0, "setup": []}, {"env": {"A": "it's"}, "folder": "/a b/c"}]
)
def test_an_sbatch_script_passes_shellcheck(changes: dict[str, Any], tmp_path: Path) -> None:
    script = make_target("s", SLURM | changes).documents(JOB)["job.sh"]
    done = shellcheck(script, tmp_path)
    assert done.returncode == 0, done.stdout
    assert shellcheck(script + "\nfor x in $*; do rm $x; done\n", tmp_path).returncode != 0
    header = [line for line in script.splitlines() if line.startswith("#SBATCH ")]
    assert script.splitlines()[1 : 1 + len(header)] == header  # sbatch reads no options below the first command
    assert "#SBATCH --ntasks-per-node=1" in header


# AWS -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"image": None, "setup": ["pip install capstan-t2i"]}, {"gpu_workers": None, "ami": "ami-1"}]
)
def test_a_launcher_file_passes_rays_validator(changes: dict[str, Any]) -> None:
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    text = make_target("a", AWS | changes).documents(JOB)["cluster.yaml"]
    config = yaml.safe_load(text)
    validate_config(prepare_config(copy.deepcopy(config)))
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])
    assert all("RAY_AUTH_MODE=token" in config[f"{who}_start_ray_commands"][-1] for who in ("head", "worker"))
    with pytest.raises(ValidationError):
        validate_config({**config, "workers": 3})


# All kinds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [KUBERAY, SLURM, AWS, RAY, {"kind": "local"}], ids=lambda s: s["kind"])
def test_what_would_be_sent_names_the_command_and_no_token(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "canary-token")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-secret")
    text = "\n".join(make_target("t", settings).documents(JOB).values())
    assert "build mine.yaml" in text
    assert "canary" not in text


def test_requirements_are_pinned(tmp_path: Path) -> None:
    file = tmp_path / "requirements.txt"
    file.write_text("webdataset==1.0.2  # shards\n\nopen_clip_torch==3.3.0\n")
    job = yaml.safe_load(make_target("r", RAY | {"requirements": str(file)}).documents(JOB)["job.yaml"])
    assert job["runtime_env"]["pip"] == ["webdataset==1.0.2", "open_clip_torch==3.3.0"]
    file.write_text("webdataset>=1.0\n")
    with pytest.raises(RecipeError, match="no exact version"):
        make_target("r", RAY | {"requirements": str(file)}).documents(JOB)


WRONG = [
    ({"kind": "rayy"}, "kind", "ray"),
    ({"kind": "ray"}, "address", "add it"),
    ({"kind": "ray", "address": "127.0.0.1:8265"}, "address", "http://127.0.0.1:8265"),
    ({"kind": "ray", "address": "http://x:1", "token": "abc"}, "token", "remove it here"),
    ({"kind": "ray", "address": "http://me:pw@x:1"}, "address", "remove it here"),
    ({"kind": "ray", "address": "http://x:1", "env": {"HF_TOKEN": "abc"}}, "env.HF_TOKEN", "remove it here"),
    ({"kind": "slurm", "folder": "jobs"}, "folder", "absolute"),
    ({"kind": "slurm", "folder": "/jobs", "options": ["--x\nrm -rf"]}, "options", "line breaks"),
    ({"kind": "kuberay", "image": "x", "secrets": {"A": "the-secret-itself"}}, "secrets.A", "pattern"),
    ({"kind": "kuberay", "image": "x", "workers": {"min": 3, "max": 2}}, "workers.max", "raise it"),
    ({"kind": "local", "wrokers": 2}, "wrokers", "did you mean workers?"),
]


@pytest.mark.parametrize(("settings", "field", "hint"), WRONG, ids=[str(field) for _, field, _ in WRONG])
def test_a_wrong_target_names_field_and_fix(settings: dict[str, Any], field: str, hint: str) -> None:
    with pytest.raises(RecipeError) as raised:
        make_target("mine", settings)
    assert raised.value.field.startswith("mine.")
    assert field in f"{raised.value.field} {raised.value.problem}"
    assert hint in str(raised.value)


def test_targets_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "capstan").mkdir()
    (tmp_path / "capstan" / "clusters.yaml").write_text(yaml.safe_dump({"night": SLURM}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CAPSTAN_CLUSTERS", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert sorted(read_targets()) == ["local", "night"]
    (tmp_path / "clusters.yaml").write_text(yaml.safe_dump({"lab": RAY}))
    assert sorted(read_targets()) == ["lab", "local"]
    with pytest.raises(RecipeError, match="did you mean lab"):
        find_target("labs")


# Schedulers' own commands --------------------------------------------------------------------------------------------


def tool(folder: Path, name: str, script: str) -> None:
    """A command of a scheduler that is not installed here, as a shell script on the PATH."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def one_node_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's commands over this machine: sbatch runs the real script, srun its command, and Ray is a stand-in."""
    bin_, spool = tmp_path / "bin", tmp_path / "spool"
    spool.mkdir()
    tool(
        bin_,
        "sbatch",
        f"""log=$(sed -n 's/^#SBATCH --output=//p' "$2")
SLURM_JOB_ID=7 SLURM_JOB_NODELIST=here setsid bash "$2" >> "$log" 2>&1 < /dev/null &
echo $! > {spool}/7; echo "7;cluster" """,
    )
    tool(bin_, "squeue", f'kill -0 "$(cat {spool}/7)" 2> /dev/null && echo RUNNING || echo COMPLETED')
    tool(bin_, "scancel", f'[[ "$1" == --batch ]] && kill -TERM "$(cat {spool}/7)"')
    tool(bin_, "scontrol", "echo here")
    tool(bin_, "srun", 'while [[ "$1" == --* ]]; do shift; done; exec "$@"')
    tool(bin_, "ray", '[[ "$1" == start ]] && exec sleep 600; exit 0')
    tool(
        bin_,
        "work",
        """[[ "$2" == capstan.cluster.local_cluster ]] && exit 0
trap 'echo saving; exit 130' TERM
stat -c 'token %a' "$RAY_AUTH_TOKEN_PATH"; echo "$RAY_AUTH_MODE $RAY_ADDRESS $*"
for _ in $(seq "$(cat seconds)"); do sleep 0.1; done; exit 3""",
    )
    monkeypatch.setenv("PATH", f"{bin_}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def slurm_job(folder: Path, tenths: int) -> tuple[Any, Any]:
    target = make_target("s", {"kind": "slurm", "folder": str(folder / "jobs"), "python": "work"})
    job = JobSpec(JOB.id, JOB.arguments, {**JOB.files, "seconds": str(tenths).encode()})
    return target, target.send(job)


def test_a_slurm_job_ends_with_its_commands_exit_code(one_node_slurm: Path) -> None:
    target, handle = slurm_job(one_node_slurm, 3)
    text = "".join(target.logs(handle, follow=True))
    state = target.state(handle)
    assert (state.status, state.code) == ("failed", 3)
    assert "token 600" in text
    assert ":20007 -m capstan build mine.yaml --set select=[]" in text
    assert not (Path(handle["folder"]) / "token").exists()


def test_a_slurm_job_is_stopped_and_saves(one_node_slurm: Path) -> None:
    target, handle = slurm_job(one_node_slurm, 600)
    started = time.monotonic()
    while "-m capstan build" not in "".join(target.logs(handle, follow=False)):
        assert time.monotonic() - started < 30
        time.sleep(0.1)
    assert target.state(handle).status == "running"
    target.stop(handle)
    text = "".join(target.logs(handle, follow=True))
    assert "saving" in text
    assert (target.state(handle).status, target.state(handle).code) == ("stopped", 130)


def test_a_ray_job_of_kubernetes_is_applied_asked_and_suspended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kubectl's calls, against a stand-in that keeps what is applied and answers with a status."""
    tool(
        tmp_path / "bin",
        "kubectl",
        f"""cd {tmp_path}; echo "$*" >> calls
case "$*" in *apply*) cat > applied.yaml;; *"get rayjob"*) cat status.json;; *logs*) echo one; echo two;; esac""",
    )
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    target = make_target("k", KUBERAY | {"context": "prod"})
    handle = target.send(JOB)
    check_ray_job(list(yaml.safe_load_all((tmp_path / "applied.yaml").read_text()))[1])
    answers = [
        ({}, "pending", 1),
        ({"jobStatus": "RUNNING", "jobDeploymentStatus": "Running"}, "running", 1),
        ({"jobStatus": "SUCCEEDED", "jobDeploymentStatus": "Complete"}, "succeeded", 0),
        (
            {"jobStatus": "FAILED", "jobDeploymentStatus": "Failed", "message": "failed with exit code 3, last"},
            "failed",
            3,
        ),
        ({"jobStatus": "FAILED", "jobDeploymentStatus": "Retrying"}, "running", 1),
        ({"jobStatus": "RUNNING", "jobDeploymentStatus": "Failed", "message": "DeadlineExceeded"}, "failed", 1),
        ({"jobStatus": "STOPPED", "jobDeploymentStatus": "Suspended"}, "stopped", 130),
    ]
    for told, status, code in answers:
        (tmp_path / "status.json").write_text(json.dumps({"status": told}))
        assert (target.state(handle).status, target.state(handle).code) == (status, code), told
    (tmp_path / "status.json").write_text("")
    assert target.state(handle).status == "lost"
    assert list(target.logs(handle, follow=True)) == ["one\n", "two\n"]
    target.stop(handle)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert all(call.startswith("--context prod --namespace ml ") for call in calls)
    assert '{"spec": {"suspend": true}}' in calls[-1]
    tool(tmp_path / "bin", "kubectl", "echo 'Forbidden: no' >&2; exit 1")
    with pytest.raises(CapstanError, match="Forbidden"):
        target.state(handle)


def test_a_missing_scheduler_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RecipeError, match="needs the command kubectl"):
        make_target("k", KUBERAY).send(JOB)
