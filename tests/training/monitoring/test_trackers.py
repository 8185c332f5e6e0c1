"""Weights & Biases offline, MLflow in a file: what a run tells them, also after it was stopped."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import pytest

from capstan.pipeline.errors import RecipeError
from capstan.training.config import TrainConfig
from capstan.training.monitoring.trackers import open_trackers
from capstan.training.run import Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    tmp_path.joinpath("run").mkdir()
    watch = {"trackers": ["wandb", "mlflow"]}
    section = {"model": "captioner", "run": str(tmp_path / "run"), "steps": 1, "watch": watch}
    return Run(TrainConfig.from_section(section))


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_names_its_extra(run: Run, name: str, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    section = {"model": "captioner", "run": run.train.run, "steps": 1, "watch": {"trackers": [name]}}
    with pytest.raises(RecipeError, match=rf"train\.watch\.trackers: needs the package {name}.*capstan-t2i\[{name}\]"):
        open_trackers(Run(TrainConfig.from_section(section)), 0)


@pytest.mark.slow
def test_both_are_told_of_one_run_that_was_stopped(run: Run, monkeypatch, tmp_path: Path) -> None:
    from PIL import Image

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "step-000001.png")
    for start, losses in ((0, [0.5, 0.25]), (1, [0.2])):
        trackers = open_trackers(run, start)
        for number, loss in enumerate(losses):
            trackers.scalars(start + number + 1, {"loss": loss, "blend/original": 1.0})
        trackers.notes(start + 1, {"dataset_seal": f"seal {start}"})
        trackers.image(start + 1, "samples", tmp_path / "step-000001.png")
        trackers.close()
        trackers.close()  # a second time changes nothing

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run.folder}/mlflow.db")
    (known,) = client.search_runs([client.get_experiment_by_name("capstan").experiment_id])
    assert known.info.run_id == json.loads((run.folder / "mlflow.json").read_text())["run_id"]
    told = [(metric.step, metric.value) for metric in client.get_metric_history(known.info.run_id, "loss")]
    assert sorted(told) == [(1, 0.5), (2, 0.2), (2, 0.25)]
    assert client.get_run(known.info.run_id).data.tags["dataset_seal"] == "seal 1"
    assert {file.path for file in client.list_artifacts(known.info.run_id)} == {"recipe.json", "samples"}

    offline = sorted((run.folder / "wandb").glob("offline-run-*"))
    assert len({path.name.rpartition("-")[2] for path in offline}) == 1  # one run there, by its id
    histories = [history for path in offline for history in read_history(next(path.glob("*.wandb")))]
    assert [(row["step"], row["loss"]) for row in histories if "loss" in row] == [(1, 0.5), (2, 0.25), (2, 0.2)]
    assert any(b"seal 1" in path.read_bytes() for path in (run.folder / "wandb").glob("offline-run-*/*.wandb"))
    assert list((run.folder / "wandb").glob("offline-run-*/files/media/images/samples*.png"))


def read_history(file: Path) -> list[dict]:
    """The rows that were logged, from the file that `wandb sync` would send: records in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole, rows = file.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:  # a block's end
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # all of a record, or the last piece of one
            record = Record.FromString(whole)
            items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            rows += [{name: json.loads(value) for name, value in items.items()}] if items else []
            whole = b""
    return rows
