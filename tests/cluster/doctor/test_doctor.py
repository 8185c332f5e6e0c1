"""Doctor on machines, recipes, buckets and targets with problems, and the fix for each."""

from __future__ import annotations

import json
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from s3 import S3

from capstan.cluster.cli import run
from capstan.cluster.doctor.clock_skew import clock_against
from capstan.cluster.doctor.estimates import disk_bytes, parameters, state_bytes
from capstan.cluster.doctor.finding import Finding
from capstan.cluster.doctor.machine import extension_locks, open_files, ports
from capstan.cluster.doctor.packages import judged
from capstan.cluster.doctor.recipe import recipe_findings, rows_of
from capstan.cluster.doctor.targets import same_ray, target_findings
from capstan.cluster.jobs.clusters_file import make_target
from capstan.pipeline.build import build
from capstan.pipeline.config import Recipe, Resources
from capstan.training.config import TrainConfig


def by_name(findings: Iterator[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def written(folder: Path, **content: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"dataset": str(folder / "ds"), "source": {"format": "world"}} | content))
    return path


@pytest.mark.parametrize(
    ("package", "version", "ok"),
    [
        ("deepspeed", "0.17.5", True),
        ("deepspeed", "0.17.6", False),
        ("deepspeed", "0.18.2", False),
        ("deepspeed", "0.19.8", True),
        ("torch", "0.18.0", True),
    ],
)
def test_versions_that_are_known_to_be_bad(package: str, version: str, ok: bool) -> None:
    finding = judged(package, version)
    assert finding.ok == ok
    assert ("ZeRO-2" in finding.hint) != ok


def test_a_stale_lock_is_found_and_a_fresh_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert by_name(extension_locks())["torch extensions"].ok
    lock = tmp_path / "py311" / "shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - 7200,) * 2)
    finding = by_name(extension_locks())["torch extensions"]
    assert not finding.ok
    assert finding.hint == f"rm {lock}"


def test_too_few_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        finding = by_name(open_files())["open files"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not finding.ok
    assert "ulimit -n" in finding.hint


def test_a_taken_port() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        finding = by_name(ports(port))["resources.metrics_port"]
        assert not finding.ok
        assert str(port) in finding.hint
    assert by_name(ports(port))["resources.metrics_port"].ok


# Recipes -------------------------------------------------------------------------------------------------------------


def test_a_recipe_that_is_wrong_is_one_finding_with_its_fix(tmp_path: Path) -> None:
    (finding,) = recipe_findings(written(tmp_path, image={"sise": 3}))
    assert (finding.ok, finding.hint) == (False, "did you mean size?")


def test_the_room_that_a_dataset_needs(tmp_path: Path) -> None:
    small = by_name(recipe_findings(written(tmp_path)))["room for the dataset"]
    assert small.ok
    huge = written(tmp_path, source={"format": "world", "world": {"scenes": 10**12}})
    finding = by_name(recipe_findings(huge))["room for the dataset"]
    assert not finding.ok
    assert "1,000,000,000,000 rows" in finding.seen
    assert "larger disk" in finding.hint


@pytest.mark.parametrize(("suffix", "ok"), [("txt", True), ("prompt", False)])
def test_a_source_without_captions(tmp_path: Path, suffix: str, ok: bool) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        (tmp_path / "in" / f"{name}.jpg").write_bytes(b"JPEG")
        (tmp_path / "in" / f"{name}.{suffix}").write_text("a caption")
    recipe = written(tmp_path, source={"path": str(tmp_path / "in")})
    finding = by_name(recipe_findings(recipe))["source"]
    assert finding.ok == ok
    expected = "2 of 2 rows have a caption" if ok else "0 of 2 rows have a caption; 2 files or tar members (.prompt)"
    assert finding.seen.startswith(expected)


def test_a_source_that_cannot_be_read(tmp_path: Path) -> None:
    finding = by_name(recipe_findings(written(tmp_path, source={"path": str(tmp_path / "none.csv")})))["source"]
    assert not finding.ok
    assert "source.path: no file at" in finding.seen


def test_a_damaged_table_has_no_known_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and no more")
    source = {"path": str(tmp_path / "rows.parquet")}
    assert rows_of(Recipe.model_validate({"dataset": str(tmp_path / "ds"), "source": source})) is None


def test_the_estimate_is_near_what_a_dataset_takes(tmp_path: Path, two_cpus: Resources) -> None:
    recipe = Recipe.model_validate(
        {
            "dataset": str(tmp_path / "ds"),
            "source": {"format": "world", "world": {"scenes": 40, "size": 256, "defects": False}},
            "dedup": {"exact": False, "perceptual": None},
            "image": {"size": 256},
        }
    )
    assert rows_of(recipe) == 40
    build(recipe, progress=False)
    taken = sum(path.stat().st_size for path in (tmp_path / "ds").rglob("*") if path.is_file())
    # Drawings are smaller than photographs, for which the estimate is made; it must err on that side, within reason.
    assert taken < disk_bytes(recipe, 40) < 12 * taken


def test_fewer_shards_than_readers(tmp_path: Path, two_cpus: Resources) -> None:
    train = {"model": "autoencoder", "run": str(tmp_path / "run"), "steps": 1, "batch": 4, "engine": {"workers": 2}}
    path = written(tmp_path, source={"format": "world", "world": {"scenes": 12, "size": 32}}, train=train)
    build(Recipe.model_validate(yaml.safe_load(path.read_text()) | {"image": {"min_size": 16}}), progress=False)
    finding = by_name(recipe_findings(path))["shards"]
    assert not finding.ok
    assert "1 shards" in finding.seen
    assert "shards.samples" in finding.hint


def test_parameters_are_counted_without_making_the_model() -> None:
    section = {"model": "autoencoder", "run": "r", "steps": 1, "autoencoder": {"block_out_channels": [32, 64]}}
    train = TrainConfig.from_section(section)
    from capstan.training.models.autoencoder.family import build as make

    real = sum(parameter.numel() for parameter in make(train.settings).parameters())
    assert parameters(train) == real
    huge = TrainConfig.from_section({"model": "diffusion", "run": "r", "steps": 1, "diffusion": {"autoencoder": "x"}})
    assert (parameters(huge) or 0) > 10**8
    for name in ("captioner", "vqgan", "vitvqgan"):
        assert (parameters(TrainConfig.from_section({"model": name, "run": "r", "steps": 1})) or 0) > 10**6
    given = {"model": "vqgan", "run": "r", "steps": 1, "vqgan": {"pretrained": "x"}}
    assert parameters(TrainConfig.from_section(given)) is None  # only its file tells


def test_counting_parameters_says_nothing_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    """transformers warns of special ids outside a small vocabulary; its default ones are CLIP's."""
    section = {"autoencoder": "x", "text": {"vocab_size": 600}}
    train = TrainConfig.from_section({"model": "diffusion", "run": "r", "steps": 1, "diffusion": section})
    assert parameters(train)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("zero", "expected"), [(0, 20), (1, 4 + 4 + 12 / 4), (2, 4 + 16 / 4), (3, 20 / 4)])
def test_what_zero_shares_between_four_workers(zero: int, expected: float) -> None:
    engine = {"zero": zero, "workers": 4}
    train = TrainConfig.from_section({"model": "autoencoder", "run": "r", "steps": 1, "batch": 4, "engine": engine})
    assert state_bytes(train, 1000) == pytest.approx(1000 * expected)


# Buckets and clocks --------------------------------------------------------------------------------------------------


class Late(BaseHTTPRequestHandler):
    offset_s = 0.0

    def do_HEAD(self) -> None:
        self.send_response_only(403)
        self.send_header("Date", formatdate(time.time() + self.offset_s, usegmt=True))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(("offset_s", "ok"), [(0, True), (-900, False), (900, False)])
def test_a_clock_that_is_off(offset_s: float, ok: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Late, "offset_s", offset_s)
    with HTTPServer(("127.0.0.1", 0), Late) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        finding = clock_against(f"http://127.0.0.1:{server.server_address[1]}")
    assert finding is not None
    assert finding.ok == ok
    if not ok:
        assert ("ahead of" if offset_s < 0 else "behind") in finding.seen
        assert "NTP" in finding.hint


def test_a_bucket_is_written_read_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with S3(tmp_path / "s3", "capstan-key", "capstan-secret") as s3:
        path = written(tmp_path, dataset="s3://bucket/ds", storage=s3.storage())
        for name, value in s3.env.items():
            monkeypatch.setenv(name, value)
        findings = by_name(recipe_findings(path))
        assert findings["dataset"].ok, findings
        assert findings["clock"].ok
        assert list((tmp_path / "s3" / "bucket").rglob("*.*")) == []
        missing = written(tmp_path, dataset="s3://no-such-bucket/ds", storage=s3.storage())
        refused = by_name(recipe_findings(missing))["dataset"]
    assert not refused.ok
    assert "the bucket" in refused.hint


# Targets -------------------------------------------------------------------------------------------------------------


def test_a_target_that_does_not_answer() -> None:
    target = make_target("lab", {"kind": "ray", "address": "http://127.0.0.1:9"})
    finding = by_name(target_findings(target))["lab: cluster"]
    assert not finding.ok
    assert "tunnel" in finding.hint


def test_another_version_of_ray() -> None:
    finding = same_ray("lab", "2.9.0")
    assert not finding.ok
    assert "pip install ray==2.9.0` here" in finding.hint


def test_doctor_says_it_all_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["doctor", str(written(tmp_path)), "--to", "local", "--json"])
    out, err = capsys.readouterr()
    summary = json.loads(out.splitlines()[-1])
    names = {finding["name"] for finding in summary["findings"]}
    assert {
        "python",
        "deepspeed",
        "cuda",
        "gpus",
        "torch extensions",
        "open files",
        "ports",
        "recipe",
        "dataset",
    } <= names
    assert summary["ok"] == all(finding["ok"] for finding in summary["findings"])
    assert err.count("\n") >= len(names)
