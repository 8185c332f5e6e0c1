"""Nothing secret in recipes: refused with the field's name. A planted secret is nowhere in what a stage writes."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from s3 import S3

from capstan.cluster.cli import run
from capstan.cluster.jobs.clusters_file import make_target
from capstan.cluster.recipe import load
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.secrets import is_secret_name

CANARY = "canary-9vJq2LxT7w"


def write(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"dataset": "s3://b/ds", "source": {"format": "world"}} | content))
    return path


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ({"storage": {"key": "AKIA", "endpoint_url": "http://x"}}, "storage.key"),
        ({"storage": {"secret": CANARY}}, "storage.secret"),
        (
            {"storage": {"client_kwargs": {"aws_secret_access_key": CANARY}}},
            "storage.client_kwargs.aws_secret_access_key",
        ),
        ({"storage": {"token": CANARY}}, "storage.token"),
        ({"storage": {"account_key": CANARY}}, "storage.account_key"),
        ({"source": {"path": "s3://b/x.parquet", "storage": {"password": CANARY}}}, "source.storage.password"),
        ({"source": {"path": ["https://me:pw@example.org/x.parquet"]}}, "source.path.0"),
        ({"dataset": "https://me:pw@example.org/ds"}, "dataset"),
        ({"dataset": f"https://{CANARY}@example.org/ds"}, "dataset"),
        ({"recaption": {"engine": "openai", "server": {"api_key": CANARY}}}, "recaption.server.api_key"),
        (
            {"recaption": {"server": {"extra": {"headers": {"X-Api-Key": CANARY}}}}},
            "recaption.server.extra.headers.X-Api-Key",
        ),
        ({"recaption": {"server": {"url": f"http://x/v1?access_token={CANARY}"}}}, "recaption.server.url"),
        ({"recaption": {"server": {"extra": [f"Authorization: Bearer {CANARY}"]}}}, "recaption.server.extra.0"),
        ({"recaption": {"server": {"extra": {"auth": f"Bearer {CANARY}"}}}}, "recaption.server.extra.auth"),
        ({"recaption": {"server": {"extra": {"tokens": [], "token": [CANARY]}}}}, "recaption.server.extra.token"),
        ({"recaption": {"server": {"key_env": "sk-" + 30 * "a"}}}, "recaption.server.key_env"),
        ({"train": {"checkpoint": {"upload": f"s3://me:{CANARY}@bucket/run"}}}, "train.checkpoint.upload"),
        ({"train": {"watch": {"wandb": {"githubPat": CANARY}}}}, "train.watch.wandb.githubPat"),
        ({"experiment": {"scorer": {"SERVICE_PASS": CANARY}}}, "experiment.scorer.SERVICE_PASS"),
        ({"source": {"path": f"https://b/x.csv?X-Amz-Date=1&X-Amz-Signature={CANARY}"}}, "source.path"),
        ({"source": {"path": f"https://a.blob.core.windows.net/c/x.csv?sv=1&sig={CANARY}"}}, "source.path"),
        ({"unknown": {"CONNECTION_STRING": CANARY}}, "unknown.CONNECTION_STRING"),
        ({"storage": {"bearer": CANARY}}, "storage.bearer"),
        ({"storage": {"client_kwargs": {"auth": ["me", CANARY]}}}, "storage.client_kwargs.auth"),
        ({"storage": {"credentials": {"me": CANARY}}}, "storage.credentials"),
        ({"storage": {"x": f"Endpoint=https;AccountKey={CANARY}"}}, "storage.x"),
        ({"storage": {"x": f"host=h user=u password={CANARY}"}}, "storage.x"),
        ({"storage": {"x": f"eyJhbGciOiJI.eyJzdWIiOiIx.{CANARY}"}}, "storage.x"),
        ({"source": {"path": f"me:{CANARY}@data.example.org/x.csv"}}, "source.path"),
        ({"storage": {"client_kwargs": {"proxy": f"me:{CANARY}@localhost:8080"}}}, "storage.client_kwargs.proxy"),
        ({"storage": {"x": f"IQoJb3JpZ2lu{20 * chr(65)}{CANARY}"}}, "storage.x"),
        ({"storage": {"x": f"glpat-{CANARY}{CANARY}"}}, "storage.x"),
        ({"storage": {"x": f"ya29.{CANARY}{CANARY}"}}, "storage.x"),
    ],
)
def test_a_secret_in_a_recipe_is_refused_and_not_repeated(tmp_path: Path, content: dict[str, Any], field: str) -> None:
    with pytest.raises(RecipeError) as raised:
        load(write(tmp_path, content))
    assert raised.value.field == field
    assert CANARY not in str(raised.value)
    assert "environment" in raised.value.hint


def test_what_is_no_secret_is_taken(tmp_path: Path) -> None:
    storage = {"endpoint_url": "http://x", "profile": "work", "anon": True, "token": "anon", "requester_pays": True}
    storage |= {"image": "ns/image:1.2@sha256:0a1b", "remote": "git@github.com:me/x.git", "contact": "me@example.org"}
    storage |= {"credentials": {"file": "/home/me/credentials.json"}, "auth": None, "author": "me"}
    assert load(write(tmp_path, {"storage": storage})).storage == storage


WHERE = "token = 'a' and key='b' and https = 'x'"


def test_text_and_references_are_no_secrets(tmp_path: Path) -> None:
    section = {"engine": "openai", "model": "m", "slots": ["short"], "prompts": {"short": "Name the key: in a word."}}
    section |= {"server": {"url": "http://127.0.0.1:9/v1?version=2", "key_env": "CAPSTAN_KEY", "tokens_per_minute": 5}}
    content = {"recaption": section, "select": [{"name": "a", "where": WHERE}], "dataset": "sftp://me@host/ds"}
    assert load(write(tmp_path, content)).select[0].where == WHERE


TARGETS = [
    ({"kind": "slurm", "folder": "/jobs", "setup": [f"export HF_TOKEN={CANARY}"]}, "night.setup.0"),
    ({"kind": "slurm", "folder": "/jobs", "options": [f"--export=WANDB_API_KEY={CANARY}"]}, "night.options.0"),
    ({"kind": "aws", "setup": [f"pip install x --password='{CANARY}'"]}, "night.setup.0"),
    ({"kind": "ray", "address": "http://x:1", "program": f"env DB_PASS={CANARY} capstan"}, "night.program"),
    ({"kind": "kuberay", "image": "i", "volumes": {"a": {"password": CANARY}}}, "night.volumes.a.password"),
    ({"kind": "ray", "address": f"http://x:1/?token={CANARY}"}, "night.address"),
]


@pytest.mark.parametrize(("settings", "field"), TARGETS, ids=[field for _, field in TARGETS])
def test_a_secret_in_a_target_is_refused_and_not_repeated(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(RecipeError) as raised:
        make_target("night", settings)
    assert raised.value.field == field
    assert CANARY not in str(raised.value)


def test_a_target_may_refer_to_secrets() -> None:
    setup = [
        "export HF_TOKEN=$(cat ~/.hf)",
        'export API_KEY="$KEY"',
        "module load cuda",
        "export PATH=/opt:$PATH",
        "TOKEN= x",
    ]
    assert make_target("night", {"kind": "slurm", "folder": "/jobs", "setup": setup}).model_dump()["setup"] == setup


@pytest.mark.parametrize(
    "arguments",
    [
        ["verify", "s3://b/ds", "--set", f"storage={{secret: {CANARY}}}"],
        ["verify", f"https://me:{CANARY}@host/ds"],
        ["verify", "s3://b/ds", f"--password={CANARY}"],
    ],
)
def test_a_secret_in_a_submitted_command_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["submit", "--dry-run", "--", *arguments]) == 2
    out, err = capsys.readouterr()
    assert CANARY not in out + err


def test_a_password_in_a_datasets_url_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", f"https://me:{CANARY}@127.0.0.1:9/ds"]) == 2
    err = capsys.readouterr().err
    assert "DATASET: has a password in its URL" in err
    assert CANARY not in err


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "hf_token", "api_key", "connection_string", "Password"])
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name)
    assert not is_secret_name(f"{name}_file")


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder for Ray, whose sockets have names of 107 characters at most."""
    with tempfile.TemporaryDirectory(prefix="c-", dir="/tmp") as name:
        yield Path(name)


@pytest.mark.integration
@pytest.mark.parametrize(("executor", "worker"), [("ray", b"raylet"), ("processes", b"process_worker")])
def test_a_build_into_a_bucket_writes_no_secret_anywhere(
    tmp_path: Path, short: Path, executor: str, worker: bytes
) -> None:
    """The bucket, the state folder, Ray's session and logs, stdout and stderr, the arguments of all processes."""
    with S3(tmp_path / "s3", "capstan-key", CANARY) as s3:
        content = {
            "dataset": "s3://bucket/ds",
            "storage": s3.storage(),
            "source": {"format": "world", "world": {"scenes": 12, "size": 32}},
            "unit": {"rows": 6},
            "resources": {"executor": executor},
        }
        env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        env |= s3.env | {
            "CAPSTAN_STATE": str(tmp_path / "state"),
            "RAY_TMPDIR": str(short),
            "TMPDIR": str(tmp_path / "t"),
        }
        (tmp_path / "t").mkdir()
        (tmp_path / "home").mkdir()
        env["HOME"] = str(tmp_path / "home")  # where Ray keeps its token
        command = [
            sys.executable,
            "-m",
            "capstan",
            "submit",
            "--wait",
            "--json",
            "--",
            "build",
            str(write(tmp_path, content)),
        ]
        with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            arguments: set[bytes] = set()
            while True:
                arguments |= _command_lines()
                try:
                    out, err = process.communicate(timeout=0.1)
                    break
                except subprocess.TimeoutExpired:
                    continue
        assert process.returncode == 0, err
        assert json.loads(out.splitlines()[-1])["status"] == "succeeded"
    ours = [line for line in arguments if b"rclone" not in line]
    assert any(worker in line for line in ours)
    assert [line for line in ours if CANARY.encode() in line] == []
    # Ray's session, logs included, is removed at the end.
    looked = [path for folder in (tmp_path, short) for path in folder.rglob("*") if path.is_file()]
    assert len([path for path in looked if "/s3/" in str(path)]) > 5
    assert [path for path in looked if CANARY.encode() in path.read_bytes()] == []
    assert CANARY not in out + err


def _command_lines() -> set[bytes]:
    """The arguments of all processes."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found.add(path.read_bytes())
    return found
