"""Target for a running Ray cluster, through Ray Jobs

The command runs on the head, its work on all nodes. Both need Capstan: in an `image` built from the Dockerfile (its
target `gpu`, or `cpu` for building datasets), or in an environment with capstan-t2i, called as `program`.

The token is read when needed and sent in a header only: from `token_file`, or from where Ray itself looks for it
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

from capstan.cluster.targets.base import STOPPED, Handle, JobSpec, State, Target, capstan_line
from capstan.pipeline.errors import CapstanError, RecipeError

_OVERRIDES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")  # Ray would use these instead of the address passed to it
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
    program: str = "capstan"  # how to call capstan there; e.g. python -m capstan
    working_dir: str | None = None  # a folder to upload, which holds the recipe; null: the recipe alone
    requirements: str | None = None  # a file of pinned packages for Ray to install for the job
    image: str | None = None  # a container image to run the job in, e.g. one built from the Dockerfile
    grace_s: Annotated[int, Field(ge=1)] = 60  # between asking a job to stop and killing it
    entrypoint_cpus: Annotated[float, Field(ge=0)] = 0  # CPUs that the command itself uses
    entrypoint_resources: dict[str, float] = Field(default={})

    @field_validator("address")
    @classmethod
    def _is_a_url(cls, address: str) -> str:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("address must be the URL of the dashboard, e.g. http://127.0.0.1:8265")
        return address.rstrip("/")

    def documents(self, job: JobSpec) -> dict[str, str]:
        return {"job.yaml": yaml.safe_dump(self._request(job), sort_keys=False), **_texts(job)}

    def _request(self, job: JobSpec) -> dict[str, Any]:
        """Return the request to Ray Jobs; `working_dir` becomes an upload."""
        runtime_env: dict[str, Any] = {"working_dir": self.working_dir or "."}
        runtime_env["env_vars"] = {"RAY_JOB_STOP_WAIT_TIME_S": str(self.grace_s), **self.env}
        if self.requirements:
            runtime_env["pip"] = _pinned(Path(self.requirements))
        if self.image:
            runtime_env["image_uri"] = self.image
        request: dict[str, Any] = {
            "submission_id": job.id,
            "entrypoint": capstan_line(job, self.program),
            "runtime_env": runtime_env,
            "metadata": {"capstan": job.command},
        }
        if self.entrypoint_cpus:
            request["entrypoint_num_cpus"] = self.entrypoint_cpus
        if self.entrypoint_resources:
            request["entrypoint_resources"] = dict(self.entrypoint_resources)
        return request

    def send(self, job: JobSpec) -> Handle:
        request = self._request(job)
        with tempfile.TemporaryDirectory(prefix="capstan-submit-") as folder, self._client() as client:
            for name, content in job.files.items():
                (Path(folder) / name).write_bytes(content)
            if self.working_dir is None:
                request["runtime_env"]["working_dir"] = folder
            client.submit_job(**request)
        return {"submission_id": job.id}

    def state(self, handle: Handle) -> State:
        with self._client() as client:
            info = client.get_job_info(handle["submission_id"])
        status = _STATUS[str(info.status.value)]
        code: int | None = info.driver_exit_code
        if status == "stopped" or code == STOPPED:
            return State("stopped", STOPPED)
        message = (info.message or "").partition("last available logs")[0].strip().rstrip(",")
        return State(status, code, message if status == "failed" else "")

    def logs(self, handle: Handle, *, follow: bool) -> Iterator[str]:
        with self._client() as client:
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
        with self._client() as client:
            client.stop_job(handle["submission_id"])

    def version(self) -> str:
        """Return the cluster's version of Ray. Raises CapstanError if it does not answer."""
        with self._client() as client:
            answer = client._do_request("GET", "/api/version")
            return str(answer.json()["ray_version"])

    @contextlib.contextmanager
    def _client(self) -> Iterator[Any]:
        """Yield Ray's client; its errors become CapstanError and RecipeError."""
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
                hint = f"check that the cluster runs and {self.address} leads to its dashboard (perhaps by a tunnel)"
                message = " ".join(str(error).split())[:200]
                raise CapstanError(
                    f"target {self.name}: cannot reach {self.address} ({message}). Fix: {hint}"
                ) from None
            except RuntimeError as error:
                if "401" in str(error) or "403" in str(error) or "nauthorized" in str(error):
                    raise _refused(self, error) from None
                raise CapstanError(f"target {self.name}: {' '.join(str(error).split())[:500]}") from None


def _refused(target: RayJobs, error: Exception) -> RecipeError:
    problem = f"the cluster at {target.address} rejects the token"
    return RecipeError(f"{target.name}.token_file", problem, "set the file that holds the token of the cluster")


def _token(file: str | None) -> str | None:
    """Return the token, from the file or from where Ray looks for it; None if there is none."""
    if file is not None:
        try:
            return Path(file).expanduser().read_text().strip()
        except OSError as error:
            raise RecipeError(
                "token_file", f"cannot read {file} ({error.strerror})", "set the file that holds the token"
            ) from None
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
    """Return the packages of a requirements file. Raises RecipeError for one without an exact version."""
    try:
        lines = [line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise RecipeError("requirements", f"cannot read {file} ({error.strerror})", "set a readable file") from None
    packages = [line for line in lines if line]
    for package in packages:
        if not package.startswith("-") and "==" not in package and " @ " not in package:
            raise RecipeError("requirements", f"{package} has no exact version", "use package==version")
    return packages


def _texts(job: JobSpec) -> dict[str, str]:
    """Return the files that are sent along, as text."""
    return {name: content.decode("utf-8", "replace") for name, content in job.files.items()}
