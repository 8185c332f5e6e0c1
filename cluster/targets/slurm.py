"""Target for Slurm: an sbatch script that runs the command on a Ray cluster

    FOLDER/<id>/job.sh, the recipe    what was sent
    FOLDER/<id>/log.txt               the command's output
    FOLDER/<id>/exit-code             written last

The script starts Ray on all nodes of the allocation, runs the command on the first one, and stops Ray. Its `setup`
activates an environment with capstan-t2i; sites with containers run an image built from the Dockerfile by an option of
sbatch, e.g. `options: [--container-image=...]`.

FOLDER is on a disk that all nodes share. The script creates Ray's token in the job's folder, readable by its owner
only. The dashboard is not started; the command reaches Ray from inside the allocation.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, field_validator

from capstan.cluster.targets.base import STOPPED, Handle, JobSpec, State, Target, capstan_line, ended, run_tool

_LOOK_EVERY_S = 1.0

_SCRIPT: Final = r"""set -euo pipefail
cd {folder}
{setup}
# Who can read the token can run code on all nodes: its file is for the owner only.
(umask 077 && od -An -tx1 -N32 /dev/urandom | tr -d ' \n' > token)
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={folder}/token RAY_USAGE_STATS_ENABLED=0 PYTHONUNBUFFERED=1
unset RAY_ADDRESS

# The exit code is always written: the command's, 130 if stopped, 1 if Ray did not start.
code=1
finish() {{
  trap - EXIT TERM INT
  if [[ -n "${{command_pid:-}}" ]] && kill -TERM "$command_pid" 2> /dev/null; then
    code=0
    wait "$command_pid" || code=$?
  fi
  jobs -pr | xargs -r kill 2> /dev/null || true
  rm -f token
  echo "$code" > exit-code.partial && mv exit-code.partial exit-code
  exit "$code"
}}
trap finish EXIT
trap 'code=130; finish' TERM INT

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${{nodes[0]}}
head_ip=$(srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{{print $1}}')
port=$((20000 + SLURM_JOB_ID % 20000))

srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \
  ray start --head --block --node-ip-address="$head_ip" --port="$port" --include-dashboard=false \
  --num-cpus={cpus} --num-gpus={gpus} --disable-usage-stats &
export RAY_ADDRESS="$head_ip:$port"
for _ in $(seq 60); do
  ray health-check --address "$RAY_ADDRESS" > /dev/null 2>&1 && break
  sleep 2
done
if (( ${{#nodes[@]}} > 1 )); then
  srun --overlap --nodes=$((${{#nodes[@]}} - 1)) --ntasks=$((${{#nodes[@]}} - 1)) --exclude="$head" \
    ray start --block --address="$RAY_ADDRESS" --num-cpus={cpus} --num-gpus={gpus} --disable-usage-stats &
fi
{python} -m capstan.cluster.local_cluster "${{#nodes[@]}}"

{command} &
command_pid=$!
ended=0
wait "$command_pid" || ended=$?
command_pid=
code=$ended
"""


class Slurm(Target):
    kind: Literal["slurm"] = "slurm"
    folder: str  # on a disk that all nodes share; holds a folder per job
    nodes: Annotated[int, Field(ge=1)] = 1
    cpus: Annotated[int, Field(ge=1)] = 8  # of each node
    gpus: Annotated[int, Field(ge=0)] = 0  # of each node
    memory_gib: Annotated[int, Field(ge=1)] | None = None
    hours: Annotated[float, Field(gt=0)] = 24  # the time limit
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    options: list[Annotated[str, Field(pattern="^--[a-z]")]] = Field(
        default=[]
    )  # further options of sbatch, passed on unchanged
    setup: list[str] = Field(default=[])  # shell lines: modules to load, an environment to activate
    python: str = "python"  # with Capstan installed
    grace_s: Annotated[int, Field(ge=10)] = 120  # before the time limit, the command is asked to save and stop

    @field_validator("folder")
    @classmethod
    def _is_absolute(cls, folder: str) -> str:
        path = Path(folder).expanduser()
        if not path.is_absolute():
            raise ValueError("folder must be an absolute path on a disk that all nodes share")
        return str(path)

    @field_validator("options", "partition", "account", "qos")
    @classmethod
    def _is_one_line(cls, value: list[str] | str | None) -> list[str] | str | None:
        if "\n" in "".join(value or ""):
            raise ValueError("must not contain line breaks")
        return value

    def documents(self, job: JobSpec) -> dict[str, str]:
        texts = {name: content.decode("utf-8", "replace") for name, content in job.files.items()}
        return {"job.sh": self._script(job), **texts}

    def _script(self, job: JobSpec) -> str:
        folder = f"{self.folder}/{job.id}"
        options_by_name: dict[str, object] = {
            "job-name": job.id,
            "nodes": self.nodes,
            "ntasks-per-node": 1,
            "cpus-per-task": self.cpus,
            "time": _clock(self.hours),
            "output": f"{folder}/log.txt",
            "open-mode": "append",
            "signal": f"B:TERM@{self.grace_s}",
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "gpus-per-node": self.gpus or None,
            "mem": f"{self.memory_gib}G" if self.memory_gib else None,
        }
        options = [f"#SBATCH --{name}={value}" for name, value in options_by_name.items() if value is not None]
        options += [f"#SBATCH {option}" for option in self.options]
        exports = [f"export {name}={shlex.quote(value)}" for name, value in sorted(self.env.items())]
        body = _SCRIPT.format(
            folder=shlex.quote(folder),
            setup="\n".join([*self.setup, *exports]),
            cpus=self.cpus,
            gpus=self.gpus,
            python=self.python,
            command=capstan_line(job, f"{self.python} -m capstan"),
        )
        return "\n".join(["#!/usr/bin/env bash", *options, body])

    # With Slurm's commands --------------------------------------------------------------------------------------------

    def send(self, job: JobSpec) -> Handle:
        folder = Path(self.folder) / job.id
        folder.mkdir(parents=True, mode=0o700)
        for name, text in self.documents(job).items():
            (folder / name).write_text(text, encoding="utf-8")
        answer = run_tool(["sbatch", "--parsable", str(folder / "job.sh")], field="kind")
        return {"slurm_id": answer.strip().split(";")[0], "folder": str(folder)}

    def state(self, handle: Handle) -> State:
        file = Path(handle["folder"]) / "exit-code"
        if file.exists():
            return ended(int(file.read_text()))
        queued = run_tool(
            ["squeue", "--noheader", "--format=%T", "--states=all", f"--jobs={handle['slurm_id']}"], field="kind"
        ).strip()
        if queued in ("PENDING", "CONFIGURING", "REQUEUED", "SUSPENDED"):
            return State("pending", message=queued)
        if queued in ("RUNNING", "COMPLETING", "STOPPED", "SIGNALING"):
            return State("running")
        if queued == "CANCELLED":
            return State("stopped", STOPPED)
        if file.exists():  # it ended between the two queries
            return ended(int(file.read_text()))
        return State("lost", message=f"Slurm reports {queued or 'nothing'}, and there is no exit code")

    def logs(self, handle: Handle, *, follow: bool) -> Iterator[str]:
        path, place = Path(handle["folder"]) / "log.txt", 0
        while True:
            final = not follow or self.state(handle).is_final
            if path.exists():
                with path.open("rb") as file:
                    file.seek(place)
                    new = file.read()
                place += len(new)
                if new:
                    yield new.decode("utf-8", "replace")
            if final:
                return
            time.sleep(_LOOK_EVERY_S)

    def stop(self, handle: Handle) -> None:
        run_tool(["scancel", "--batch", "--signal=TERM", handle["slurm_id"]], field="kind")
        if self.state(handle).status == "pending":
            run_tool(["scancel", handle["slurm_id"]], field="kind")


def _clock(hours: float) -> str:
    """
    >>> _clock(24), _clock(0.5)
    ('24:00:00', '0:30:00')
    """
    minutes, seconds = divmod(round(hours * 3600), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
