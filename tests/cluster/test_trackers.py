"""Where the recipe asks, commands' summaries and the dataset's seal go to MLflow; an outage never ends a command."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_server import serving
from drawn import drawing
from mlflow_server import Server

from capstan.cluster.cli import run
from capstan.training.monitoring.trackers import delivery


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CAPSTAN_STATE", str(tmp_path / "state"))
    rows = []
    for number in range(4):
        file = io.BytesIO()
        drawing(number, 80).save(file, "JPEG")
        rows.append({"image": b"" if number == 3 else file.getvalue(), "caption": f"image {number}"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    path = tmp_path / "recipe.yaml"
    path.write_text(f"""
dataset: {tmp_path}/birds
source: {{path: {tmp_path}/rows.parquet, image: image}}
trackers: [mlflow]
""")
    return str(path)


def test_mlflow_has_the_numbers_and_the_seal_of_each_command(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Server(tmp_path).up() as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.port}")
        assert run(["build", recipe, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["counts"]["kept"] == 3  # the client writes nothing next to it
        numbers = {name: value for _, name, value in server.metrics}
        assert numbers["build/counts/kept"] == 3
        assert numbers["build/failed/empty"] == 1
        assert numbers["build/funnel/fetched and decoded"] == 3
        assert server.ended
        seal = server.tags["dataset_seal"]
        assert seal == json.loads((tmp_path / "birds/dataset.json").read_text())["seal"]

        assert run(["select", recipe, "--dry-run", "--set", "select=[{name: none, where: width < 0}]"]) == 0
        assert not [name for _, name, _ in server.metrics if name.startswith("select/")]
        assert run(["select", recipe, "--set", "select=[{name: none, where: width < 0}]"]) == 0
        assert {name: value for _, name, value in server.metrics}["select/counts/kept"] == 0
        assert server.tags["dataset_seal"] != seal
    assert not (tmp_path / "birds/mlflow.json").exists()  # the dataset's folder holds the dataset


@pytest.mark.slow
def test_a_layer_of_captions_is_in_the_same_run(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Server(tmp_path).up() as server, serving() as chat:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.port}")
        assert run(["build", recipe]) == 0
        section = f"{{engine: openai, model: m, slots: [short], server: {{url: '{chat.url}'}}}}"
        assert run(["recaption", recipe, "--set", f"recaption={section}"]) in (0, 3)
    names = {name for _, name, _ in server.metrics}
    assert {name.partition("/")[0] for name in names} == {"build", "recaption"}


def test_an_outage_is_a_line_and_the_next_command_sends_what_is_left(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(delivery, "_FIRST_WAIT_S", 0.05)
    server = Server(tmp_path)
    with server.up():
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.port}")
    assert run(["build", recipe]) == 0
    assert "tracker mlflow" in caplog.text
    assert not server.metrics
    with server.up():
        assert run(["build", recipe]) == 0
    assert len([name for _, name, _ in server.metrics if name == "build/counts/kept"]) == 2


def test_a_missing_package_is_said_before_the_command_runs(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert run(["build", recipe]) == 2
    assert "trackers: needs the package mlflow" in capsys.readouterr().err
    assert not (tmp_path / "birds").exists()
