"""Exit codes of the `capstan` command, the line that names field and fix, JSON on stdout."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from capstan.cluster.cli import run


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    table = tmp_path / "urls.csv"
    table.write_text("url,caption\nhttp://example.org/a.jpg,a cat\n")
    return {"dataset": str(tmp_path / "ds"), "source": {"path": str(table)}}


def written(tmp_path: Path, recipe: dict[str, Any]) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


WRONG = [
    ({"fetch": {"retires": 3}}, "fetch.retires: unknown key", "did you mean retries?"),
    ({"image": {"size": "large"}}, "image.size: ", "found 'large'"),
    ({"image": {"resize": "stretch"}}, "image.resize: ", "center_crop"),
    ({"select": [{"name": "size", "where": "widht >= 200"}]}, "select", "width"),
    ({"source": {"path": "no/such.parquet"}}, "source.path", "no/such.parquet"),
    ({"source": None}, "source", "Fix"),
    ({"recaption": {"engine": "coca", "slot": ["short"]}}, "recaption.slot: unknown key", "did you mean slots?"),
    ({"train": {"model": "difusion", "run": "r", "steps": 1}}, "train.model", "diffusion"),
    (
        {"train": {"model": "autoencoder", "run": "r", "steps": 1, "autoencoder": {"kI": 1}}},
        "train.autoencoder.kI",
        "kl",
    ),
    ({"dataset": "/proc/capstan/ds"}, "dataset", "Fix"),
]


@pytest.mark.parametrize(("change", "field", "hint"), WRONG, ids=[field for _, field, _ in WRONG])
def test_a_wrong_recipe_names_field_and_fix(
    tmp_path: Path, recipe: dict[str, Any], capsys: pytest.CaptureFixture[str], change: Any, field: str, hint: str
) -> None:
    code = run(["build", written(tmp_path, recipe | change)])
    err = capsys.readouterr().err
    assert code == 2
    assert field in err
    assert hint in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) <= 2


def test_an_unreachable_bucket_is_said_before_anything_is_fetched(
    tmp_path: Path, recipe: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    bucket = {"dataset": "s3://bucket/ds", "storage": {"endpoint_url": "http://127.0.0.1:9"}}
    assert run(["build", written(tmp_path, recipe | bucket)]) == 2
    err = capsys.readouterr().err
    assert "dataset: cannot" in err
    assert "endpoint_url" in err


COMMANDS = [  # one of each way to a dataset
    ["select", "RECIPE", "--dry-run"],
    ["recaption", "RECIPE", "--plan", "--set", "recaption={engine: coca, model: coca_ViT-B-32}"],
    ["verify", "s3://bucket/ds", "--set", "storage.endpoint_url=http://127.0.0.1:9"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_says_that_its_bucket_cannot_be_reached(
    tmp_path: Path,
    recipe: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
) -> None:
    monkeypatch.setattr("capstan.pipeline.storage.retry.FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    bucket = {"dataset": "s3://bucket/ds", "storage": {"endpoint_url": "http://127.0.0.1:9"}}
    path = written(tmp_path, recipe | bucket)
    assert run([path if part == "RECIPE" else part for part in command]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"error: (dataset|DATASET): cannot (reach|write to) s3://bucket/ds \(.*Fix: .*endpoint_url", line)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("image.size=3", "--set: image has no effect on this command"),
        ("storage.secret=x", "storage.secret: is a secret"),
        ("storage=3", "storage"),
    ],
)
def test_of_a_dataset_that_is_named_only_the_storage_can_be_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, said: str
) -> None:
    assert run(["verify", str(tmp_path), "--set", override]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["buidl", "x"], ["build"], ["build", "no-such.yaml"], ["sample", "no-such-run", "-p", "x"]]
)
def test_wrong_arguments_end_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    assert "Fix: " in capsys.readouterr().err


def test_an_override_is_applied_and_checked(
    tmp_path: Path, recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["build", written(tmp_path, recipe), "--set", "image.sise=256"]) == 2
    assert "did you mean size?" in capsys.readouterr().err


def test_init_writes_a_recipe_that_is_valid_and_never_overwrites(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["init", str(tmp_path / "mine")]) == 0
    assert run(["doctor", str(tmp_path / "mine" / "recipe.yaml"), "--json"]) in (0, 1)
    findings = json.loads(capsys.readouterr().out.splitlines()[-1])["findings"]
    assert {"name": "recipe", "ok": True} in [{key: f[key] for key in ("name", "ok")} for f in findings]
    assert run(["init", str(tmp_path / "mine")]) == 2


def test_editors_find_the_schema_next_to_the_recipe(tmp_path: Path) -> None:
    assert run(["init", str(tmp_path)]) == 0
    first = (tmp_path / "recipe.yaml").read_text().partition("\n")[0]
    found = re.fullmatch(r"# yaml-language-server: \$schema=\./(\S+)", first)
    assert found
    properties = json.loads((tmp_path / found[1]).read_text())["properties"]
    assert properties.keys() >= yaml.safe_load((tmp_path / "recipe.yaml").read_text()).keys()


def test_schema_covers_every_floor(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert {"source", "fetch", "recaption", "train"} <= schema["properties"].keys()
    assert "slots" in schema["$defs"]["RecaptionConfig"]["properties"]


def _keys(section: dict[str, Any], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for key, value in section.get("properties", {}).items():
        yield f"{where}.{key}", value
        yield from _keys(value, f"{where}.{key}")


def test_every_key_of_the_schema_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    """Editors show these sentences."""
    assert run(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    keys = [*_keys(schema, "recipe")]
    for name, section in schema["$defs"].items():
        keys += _keys(section, name)
    assert len(keys) > 300
    assert [key for key, value in keys if not value.get("description", "").endswith(".")] == []
