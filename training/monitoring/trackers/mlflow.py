"""MLflow: the server of MLFLOW_TRACKING_URI, else the database RUN/mlflow.db.

`mlflow ui --backend-store-uri sqlite:///RUN/mlflow.db` shows the database. The experiment is MLFLOW_EXPERIMENT_NAME,
else `capstan`. RUN/mlflow.json holds the MLflow run's id, so that a resumed run stays one MLflow run.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from capstan.pipeline.errors import MissingExtra
from capstan.pipeline.storage import Storage
from capstan.training.monitoring.trackers.subject import FIELD, Subject

logger = logging.getLogger(__name__)

# By default the client tries for minutes; here Capstan tries again, without holding up the end of a run.
_IMPATIENT: Final = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
_QUIET: Final = {"MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}  # stdout is for a command's summary
_TRANSIENT: Final = (401, 403, 408, 429)  # of the 4xx: what an administrator, or time, changes


def require(field: str = FIELD) -> None:
    """Raise MissingExtra if MLflow is not installed."""
    try:
        import mlflow  # noqa: F401
    except ModuleNotFoundError:
        raise MissingExtra(field, "mlflow", "mlflow") from None


def rejects(error: Exception) -> bool:
    """Return whether `error` is the server's answer that it does not take this record."""
    from mlflow.exceptions import MlflowException

    status = error.get_http_status_code() if isinstance(error, MlflowException) else 500
    return 400 <= status < 500 and status not in _TRANSIENT


class Tracker:
    """An MLflow run."""

    def __init__(self, subject: Subject, step: int) -> None:
        import mlflow

        for variable, value in (_IMPATIENT | _QUIET).items():
            os.environ.setdefault(variable, value)
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        local = f"sqlite:///{subject.folder.absolute()}/mlflow.db"
        uri = os.environ.get("MLFLOW_TRACKING_URI", local)
        artifacts = f"file://{subject.folder.absolute()}/mlflow" if uri == local else None
        self.client = mlflow.MlflowClient(uri)
        self.id = self._find(subject, artifacts)

    def _find(self, subject: Subject, artifacts: str | None) -> str:
        """Return the MLflow run's id, created at the first start."""
        known = subject.folder / "mlflow.json"
        if known.exists():
            try:
                return str(json.loads(known.read_bytes())["run_id"])
            except (ValueError, KeyError, TypeError):
                logger.warning("%s is damaged: the records go to a new MLflow run from here on", known)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "capstan")
        existing: Any = self.client.get_experiment_by_name(name)
        experiment = existing.experiment_id if existing else self.client.create_experiment(name, artifacts)
        created: str = self.client.create_run(experiment, run_name=subject.name).info.run_id
        self.client.log_dict(created, dict(subject.config()), "recipe.json")
        Storage(str(subject.folder)).write(known.name, json.dumps({"run_id": created}).encode())
        return created

    def scalars(self, step: int, values: Mapping[str, float], time_s: float) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(name, value, int(time_s * 1000), step) for name, value in values.items()]
        self.client.log_batch(self.id, metrics=metrics)

    def notes(self, step: int, values: Mapping[str, str], time_s: float) -> None:
        for name, value in values.items():
            self.client.set_tag(self.id, name, value)

    def image(self, step: int, name: str, file: Path, time_s: float) -> None:
        self.client.log_artifact(self.id, str(file), name)

    def close(self) -> None:
        self.client.set_terminated(self.id)
