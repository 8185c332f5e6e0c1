"""A Ray cluster that exists already, through Ray Jobs: the command runs on its head, its work on all nodes.

The token is read when it is needed and travels in a header only: from `token_file`, or where Ray itself looks for it
(RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import Field, field_validator

from capstan.cluster.targets.base import STOPPED, Handle, Order, State, Target, capstan_line
from capstan.pipeline.errors import CapstanError, RecipeError

_OVERRIDES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")  # Ray would take these in place of the address it is given
_STATUS: dict[str, Any] = {
    "PENDING": "pending",
    "RUNNING": "running",
    "SUCCEEDED": "succeeded",
    "FAILED": "failed",
    "STOPPED": "stopped",
}


class RayJobs(Target):
    kind: Literal["ray"] = "ray"
    address: str  # of the dashboard: http://HOST:8265
    token_file: str | None = None
    program: str = "capstan"  # the command as it is called there; or e.g. python -m capstan
    working_dir: str | None = None  # a folder that is sent along, which holds the recipe; null: the recipe alone
    requirements: str | None = None  # a file of pinned packages that Ray installs for the job
    image: str | None = None  # a container image that the job runs in
    grace_s: Annotated[int, Field(ge=1)] = 60  # between asking a job to stop, and killing it
    entrypoint_cpus: Annotated[float, Field(ge=0)] = 0  # that the command itself keeps busy
    entrypoint_resources: dict[str, float] = Field(default={})

    @field_validator("address")
    @classmethod
    def _is_a_url(cls, address: str) -> str:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("address must be that of the dashboard, e.g. http://127.0.0.1:8265")
        return address.rstrip("/")

    def documents(self, order: Order) -> dict[str, str]:
        return {"job.yaml": yaml.safe_dump(self._request(order), sort_keys=False), **_texts(order)}

    def _request(self, order: Order) -> dict[str, Any]:
        """What Ray Jobs is asked for; `working_dir` becomes an upload."""
        runtime_env: dict[str, Any] = {"working_dir": self.working_dir or "."}
        runtime_env["env_vars"] = {"RAY_JOB_STOP_WAIT_TIME_S": str(self.grace_s), **self.env}
        if self.requirements:
            runtime_env["pip"] = _pinned(Path(self.requirements))
        if self.image:
            runtime_env["image_uri"] = self.image
        request: dict[str, Any] = {
            "submission_id": order.id,
            "entrypoint": capstan_line(order, self.program),
            "runtime_env": runtime_env,
            "metadata": {"capstan": order.command},
        }
        if self.entrypoint_cpus:
            request["entrypoint_num_cpus"] = self.entrypoint_cpus
        if self.entrypoint_resources:
            request["entrypoint_resources"] = dict(self.entrypoint_resources)
        return request

    def send(self, order: Order) -> Handle:
        request = self._request(order)
        with tempfile.TemporaryDirectory(prefix="capstan-submit-") as folder, self._asking() as client:
            for name, content in order.files.items():
                (Path(folder) / name).write_bytes(content)
            if self.working_dir is None:
                request["runtime_env"]["working_dir"] = folder
            client.submit_job(**request)
        return {"submission_id": order.id}

    def state(self, handle: Handle) -> State:
        with self._asking() as client:
            info = client.get_job_info(handle["submission_id"])
        status = _STATUS[str(info.status.value)]
        code: int | None = info.driver_exit_code
        if status == "stopped" or code == STOPPED:
            return State("stopped", STOPPED)
        message = (info.message or "").partition("last available logs")[0].strip().rstrip(",")
        return State(status, code, message if status == "failed" else "")

    def logs(self, handle: Handle, *, follow: bool) -> Iterator[str]:
        with self._asking() as client:
            if not follow:
                yield client.get_job_logs(handle["submission_id"])
                return
            stream, loop = client.tail_job_logs(handle["submission_id"]), asyncio.new_event_loop()
            try:
                with contextlib.suppress(StopAsyncIteration):
                    while True:
                        yield loop.run_until_complete(anext(stream))
            finally:
                loop.run_until_complete(stream.aclose())
                loop.close()

    def stop(self, handle: Handle) -> None:
        with self._asking() as client:
            client.stop_job(handle["submission_id"])

    def version(self) -> str:
        """The version of Ray on the cluster. Raises as everything here does where it does not answer."""
        with self._asking() as client:
            answer = client._do_request("GET", "/api/version")
            return str(answer.json()["ray_version"])

    @contextlib.contextmanager
    def _asking(self) -> Iterator[Any]:
        """Ray's client, with errors as Capstan knows them."""
        token = _token(self.token_file)
        headers = {"Authorization": f"Bearer {token}"} if token else None
        with _without(_OVERRIDES):
            try:
                from ray.exceptions import AuthenticationError
                from ray.job_submission import JobSubmissionClient

                yield JobSubmissionClient(self.address, headers=headers)
            except AuthenticationError as error:
                raise _refused(self, error) from None
            except ConnectionError as error:
                hint = f"see that the cluster runs and {self.address} leads to its dashboard (a tunnel, perhaps)"
                said = " ".join(str(error).split())[:200]
                raise CapstanError(f"target {self.name}: cannot reach {self.address} ({said}). Fix: {hint}") from None
            except RuntimeError as error:
                if "401" in str(error) or "403" in str(error) or "nauthorized" in str(error):
                    raise _refused(self, error) from None
                raise CapstanError(f"target {self.name}: {' '.join(str(error).split())[:500]}") from None


def _refused(target: RayJobs, error: Exception) -> RecipeError:
    problem = f"the cluster at {target.address} does not take the token"
    return RecipeError(
        f"{target.name}.token_file", problem, "name the file with the token that the cluster was started with"
    )


def _token(file: str | None) -> str | None:
    """The token, from the file or from where Ray looks for it."""
    if file is not None:
        try:
            return Path(file).expanduser().read_text().strip()
        except OSError as error:
            raise RecipeError("token_file", f"cannot read {file} ({error.strerror})", "name the token's file") from None
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return path.read_text().strip() if path.exists() else None


@contextlib.contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _pinned(file: Path) -> list[str]:
    """The packages of a requirements file. Raises RecipeError for one without an exact version: jobs must be alike."""
    try:
        lines = [line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise RecipeError("requirements", f"cannot read {file} ({error.strerror})", "name the file") from None
    packages = [line for line in lines if line]
    for package in packages:
        if not package.startswith("-") and "==" not in package and " @ " not in package:
            raise RecipeError("requirements", f"{package} has no exact version", "write package==version")
    return packages


def _texts(order: Order) -> dict[str, str]:
    """The files that are sent along, as text."""
    return {name: content.decode("utf-8", "replace") for name, content in order.files.items()}
