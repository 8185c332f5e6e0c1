"""What a target is: a place where a capstan command can run, and what can be asked of the job there.

    Order (a command and its files) ──documents──▶ what would be sent, as text      --dry-run
                                    ──send──▶ handle, plain data by which the job is found again
                                              state(handle) · logs(handle) · stop(handle)

A handle and everything in `documents` is written to disk and shown, so nothing in them may be secret.
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
class Order:
    """A capstan command to run elsewhere: its arguments, and the files that they name (name → content)."""

    id: str
    arguments: list[str]
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """Which capstan command: build, recaption, train, ..."""
        return self.arguments[0]


@dataclass(frozen=True)
class State:
    """How a job is. `exit_code` is known once it has ended; `message` says why, where the cluster does."""

    status: Status
    exit_code: int | None = None
    message: str = ""

    @property
    def is_final(self) -> bool:
        return self.status in FINAL

    @property
    def code(self) -> int:
        """The exit code of a command that waited for this job."""
        if self.exit_code is not None:
            return self.exit_code
        return {"succeeded": 0, "stopped": STOPPED}.get(self.status, 1)


def ended(exit_code: int) -> State:
    """The state of a job whose command ended with `exit_code`."""
    if exit_code in (STOPPED, -2, -15, 143):
        return State("stopped", STOPPED)
    return State("succeeded" if exit_code == 0 else "failed", exit_code)


class Target(Section, ABC):
    """The settings of one target, and what is done with them."""

    name: str = ""  # as in clusters.yaml
    env: dict[str, str] = Field(default={})  # environment variables of the command; nothing secret
    elsewhere: ClassVar[bool] = True  # on machines that do not see this one's files

    @field_validator("env")
    @classmethod
    def _not_secret(cls, env: dict[str, str]) -> dict[str, str]:
        refuse_secret_names(env, "env")
        return env

    @abstractmethod
    def documents(self, order: Order) -> dict[str, str]:
        """Exactly what `send` would send, by name."""

    @abstractmethod
    def send(self, order: Order) -> Handle:
        """Start the job. Raises CapstanError where that did not work."""

    @abstractmethod
    def state(self, handle: Handle) -> State:
        """How the job is now. Raises CapstanError where the cluster does not answer."""

    @abstractmethod
    def logs(self, handle: Handle, *, follow: bool) -> Iterator[str]:
        """What the command wrote so far, in pieces; with `follow` until it ends."""

    @abstractmethod
    def stop(self, handle: Handle) -> None:
        """Ask the job to end; what is finished is kept, and the same command goes on."""


class Machine(Section):
    """A kind of node that may come and go: how large it is, and how many there are of it."""

    cpus: Annotated[int, Field(ge=1)] = 4
    memory_gib: Annotated[int, Field(ge=1)] = 16
    gpus: Annotated[int, Field(ge=0)] = 0
    min: Annotated[int, Field(ge=0)] = 0
    max: Annotated[int, Field(ge=0)] = 1
    spot: bool = False  # machines that may be taken back at any time

    @field_validator("max")
    @classmethod
    def _is_a_range(cls, most: int, info: Any) -> int:
        if most < info.data.get("min", 0):
            raise ValueError("max is below min; raise it")
        return most


def run_tool(
    command: Sequence[str], *, field: str, stdin: str | None = None, env: Mapping[str, str] | None = None
) -> str:
    """stdout of a scheduler's command. Raises RecipeError where it is not installed, CapstanError where it fails."""
    require_tool(command[0], field)
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[-500:]
        raise CapstanError(f"{shlex.join(command)} ended with {done.returncode}: {said}")
    return done.stdout


def require_tool(tool: str, field: str) -> None:
    """Raise RecipeError unless the command `tool` is there."""
    if shutil.which(tool) is None:
        raise RecipeError(field, f"needs the command {tool}, which is not on the PATH", f"install {tool}, or add it")


def follow_tool(command: Sequence[str], *, field: str) -> Iterator[str]:
    """The lines of stdout of a command that may go on writing for long."""
    require_tool(command[0], field)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace") as process:
        assert process.stdout is not None
        try:
            yield from process.stdout
        finally:
            if process.poll() is None:
                process.terminate()


def capstan_line(order: Order, program: str = "capstan") -> str:
    """The command as a line for a shell."""
    return f"{program} {shlex.join(order.arguments)}"
