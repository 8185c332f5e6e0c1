"""Interface of a target: a place where capstan commands run as jobs

    JobSpec (a command and its files) ──documents──▶ what would be sent, as text      --dry-run
                                      ──send──▶ handle, plain data that identifies the job
                                                state(handle) · logs(handle) · stop(handle)

Handles and documents are written to disk and shown, so they must not hold secrets.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import Field, field_validator

from capstan.pipeline.config import Section
from capstan.pipeline.errors import CapstanError, RecipeError
from capstan.pipeline.secrets import refuse_secret_names

Handle = dict[str, Any]
Status = Literal["pending", "running", "succeeded", "failed", "stopped", "lost"]

FINAL: Final = frozenset({"succeeded", "failed", "stopped", "lost"})
STOPPED: Final = 130  # the exit code of an interrupted command


@dataclass(frozen=True)
class JobSpec:
    """A capstan command to run on a target: its arguments, and the files that they name (name → content)."""

    id: str
    arguments: list[str]
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """The capstan command: build, recaption, train, ..."""
        return self.arguments[0]


@dataclass(frozen=True)
class State:
    """Status of a job. `exit_code` is known once it has ended; `message` is the cluster's reason, if it has one."""

    status: Status
    exit_code: int | None = None
    message: str = ""

    @property
    def is_final(self) -> bool:
        return self.status in FINAL

    @property
    def code(self) -> int:
        """The exit code for a command that waited for this job."""
        if self.exit_code is not None:
            return self.exit_code
        return {"succeeded": 0, "stopped": STOPPED}.get(self.status, 1)


def ended(exit_code: int) -> State:
    """Return the state of a job whose command ended with `exit_code`."""
    if exit_code in (STOPPED, -2, -15, 143):
        return State("stopped", STOPPED)
    return State("succeeded" if exit_code == 0 else "failed", exit_code)


class Target(Section, ABC):
    """Settings of one target, and the operations on it."""

    name: str = ""  # as in clusters.yaml
    env: dict[str, str] = Field(default={})  # environment variables of the command; no secrets
    elsewhere: ClassVar[bool] = True  # whether it runs on machines that cannot see this one's files

    @field_validator("env")
    @classmethod
    def _not_secret(cls, env: dict[str, str]) -> dict[str, str]:
        refuse_secret_names(env, "env")
        return env

    @abstractmethod
    def documents(self, job: JobSpec) -> dict[str, str]:
        """Return exactly what `send` would send, by name."""

    @abstractmethod
    def send(self, job: JobSpec) -> Handle:
        """Start the job and return its handle. Raises CapstanError on failure."""

    @abstractmethod
    def state(self, handle: Handle) -> State:
        """Return the job's current state. Raises CapstanError if the cluster does not answer."""

    @abstractmethod
    def logs(self, handle: Handle, *, follow: bool) -> Iterator[str]:
        """Yield the command's output so far, in pieces; with `follow`, until it ends."""

    @abstractmethod
    def stop(self, handle: Handle) -> None:
        """Ask the job to stop. Finished work is kept; the same command resumes it."""


class Machine(Section):
    """A kind of node: its size, and the range of how many there are."""

    cpus: Annotated[int, Field(ge=1)] = 4
    memory_gib: Annotated[int, Field(ge=1)] = 16
    gpus: Annotated[int, Field(ge=0)] = 0
    min: Annotated[int, Field(ge=0)] = 0
    max: Annotated[int, Field(ge=0)] = 1
    spot: bool = False  # machines that may be reclaimed at any time

    @field_validator("max")
    @classmethod
    def _is_a_range(cls, most: int, info: Any) -> int:
        if most < info.data.get("min", 0):
            raise ValueError("max is below min; raise it")
        return most


def run_tool(
    command: Sequence[str], *, field: str, stdin: str | None = None, env: Mapping[str, str] | None = None
) -> str:
    """Return stdout of a scheduler's command. Raises RecipeError if it is not installed, CapstanError if it fails."""
    require_tool(command[0], field)
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        output = " ".join((done.stderr or done.stdout).split())[-500:]
        raise CapstanError(f"{shlex.join(command)} ended with {done.returncode}: {output}")
    return done.stdout


def require_tool(tool: str, field: str) -> None:
    """Raise RecipeError unless the command `tool` is on the PATH."""
    if shutil.which(tool) is None:
        raise RecipeError(
            field, f"needs the command {tool}, which is not on the PATH", f"install {tool}, or add its folder to PATH"
        )


def follow_tool(command: Sequence[str], *, field: str) -> Iterator[str]:
    """Yield the lines of stdout of a long-running command."""
    require_tool(command[0], field)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace") as process:
        assert process.stdout is not None
        try:
            yield from process.stdout
        finally:
            if process.poll() is None:
                process.terminate()


def capstan_line(job: JobSpec, program: str = "capstan") -> str:
    """Return the command as a line for a shell."""
    return f"{program} {shlex.join(job.arguments)}"
