"""The measurements of a GPU: a dry run on the CPU goes through their code; pieces resume; wheels are chosen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from repo import ROOT

FAST, SLOW = "tests,unet,CLIP,CoCa,latents,VLM", "dit"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def dry_run(folder: Path, only: str) -> dict[str, Any]:
    """Run the measurements at toy size in a process of its own; return what they left, by name."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--toy", "--json", str(folder / "gpu.json")]
    command += ["--folder", str(folder / "data"), "--only", only]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = json.loads((folder / "gpu.json").read_text())
    assert found["device"] == "toy sizes, no figures"
    bad = {name: entry for name, entry in found["measurements"].items() if entry["status"] != "done"}
    assert not bad, "\n".join(entry["error"] for entry in bad.values())
    assert done.returncode == 0
    assert "MFU" not in done.stdout, "a dry run claims no figures"
    return found["measurements"]


@pytest.mark.integration
def test_a_dry_run_goes_through_every_kind_of_measurement(tmp_path: Path) -> None:
    found = dry_run(tmp_path, FAST)
    assert {name.split(",")[0] for name in found} == {
        "tests clip_model",
        "unet 860 M",
        "CLIP scoring",
        "CoCa captions",
        "latents",
        "VLM of 7 B",
    }
    rows = {row["what"] for entry in found.values() for row in entry["rows"]}
    assert {"MFU", "cached, step compiled", "bare loop", "bare autoencoder", "tokens"} <= rows


@pytest.mark.slow
def test_a_dry_run_trains_transformers_and_encodes_ahead(tmp_path: Path) -> None:
    assert set(dry_run(tmp_path, SLOW)) == {"dit 611 M, bf16", "mmdit 2 B, text ahead"}


def test_without_a_gpu_it_says_what_to_do(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    import torch

    from benchmarks.gpu.__main__ import main

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu", "--json", str(tmp_path / "x.json"), "--folder", str(tmp_path / "f")])
    assert main() == 2
    assert "Fix: run this on a machine with one, or add --toy" in capsys.readouterr().err


def test_every_limit_fits_into_a_piece_of_ten_minutes() -> None:
    from benchmarks.gpu.plan import MEASUREMENTS

    assert len({one.name for one in MEASUREMENTS}) == len(MEASUREMENTS)
    assert max(one.budget_s for one in MEASUREMENTS) <= 10 * 60


def test_every_network_and_switch_is_a_valid_recipe_at_its_real_size(tmp_path: Path, monkeypatch: Any) -> None:
    from benchmarks.gpu import data, steps
    from benchmarks.gpu.results import Scale
    from capstan.training.config import TrainConfig

    monkeypatch.setattr(data, "autoencoder", lambda _: tmp_path / "autoencoder")
    monkeypatch.setattr(data, "text_encoder", lambda _, name: tmp_path / name)
    for network in steps.NETWORKS:
        for last, (switch, _, _) in enumerate(steps.SWITCHES):
            train = TrainConfig.from_section(steps.section_of(network, last, Scale(False, tmp_path)))
            assert train.settings.preset == network.preset
            assert train.engine.channels_last == (network.name.startswith("unet") and last >= 2)
            assert (train.data.latents, train.data.text_states).count("auto") == max(0, min(2, last - 3)), switch


def test_a_measurement_out_of_time_or_failed_is_kept_and_tried_again(tmp_path: Path, monkeypatch: Any) -> None:
    from benchmarks.gpu import __main__ as command
    from benchmarks.gpu.results import Measurement, Results, Scale

    scale = Scale(False, tmp_path)
    endless = Measurement("CLIP scoring", 0.01, lambda _: [])
    assert command.apart(endless, scale)[0] == "out of time"
    monkeypatch.setattr(sys, "executable", "/bin/false")
    status, rows, error = command.apart(Measurement("CLIP scoring", 60, lambda _: []), scale)
    assert (status, rows, error) == ("failed", [], "exit code 1")
    results = Results(tmp_path / "r.json", "a GPU", {"torch": "2", "date": "today"})
    results.add("CLIP scoring", status, 1.0, rows, error)
    again = Results(tmp_path / "r.json", "a GPU", {"torch": "2", "date": "today"})
    assert again.open("CLIP scoring")
    assert again.tried("CLIP scoring")
    again.add("CLIP scoring", "done", 1.0, [])
    assert not Results(tmp_path / "r.json", "a GPU", {"torch": "2", "date": "today"}).open("CLIP scoring")


def test_the_table_says_what_was_met_missed_and_not_measured(tmp_path: Path) -> None:
    from benchmarks.gpu.plan import derived
    from benchmarks.gpu.results import Results, Row, as_data, table

    results = Results(tmp_path / "r.json", "NVIDIA H200", {"torch": "2.15", "date": "2026-11-29"})
    for switch, rate in (("compile", 100.0), ("latents ahead", 150.0)):
        rows = [Row("MFU", 0.39, goal=0.4, facts={"images_per_s": rate}), Row("waiting", 0.01, goal=0.05, below=True)]
        results.add(f"unet 860 M, {switch}", "done", 1.0, as_data(rows))
    text = table(results, ["unet 860 M, compile", "CLIP scoring"], derived(results))
    first, _, mfu, waiting, scoring, together = text.splitlines()
    assert first == "NVIDIA H200 · torch 2.15 · 2026-11-29"
    assert "≥ 0.4 MISSED" in mfu
    assert "≤ 0.05 met" in waiting
    assert "not measured yet" in scoring
    assert "1.5  ×" in together
    assert "≥ 1.4 met" in together


def test_results_of_another_device_are_not_mixed(tmp_path: Path) -> None:
    from benchmarks.gpu.results import Results

    Results(tmp_path / "r.json", "NVIDIA H100", {}).add("x", "done", 1.0, [])
    with pytest.raises(SystemExit, match="name another file for NVIDIA H200"):
        Results(tmp_path / "r.json", "NVIDIA H200", {})


def test_wheels_are_those_that_the_machine_s_own_torch_lacks(tmp_path: Path) -> None:
    from benchmarks.gpu.wheels import install, lacking, names_in

    have = names_in("numpy==2.0\nPyYAML==6.0\ntorch @ file:///torch.whl\n")
    needed = {"numpy": "2.4", "pyyaml": "6.0", "torch": "2.15", "nvidia-nccl-cu13": "2", "triton": "3", "ray": "2.60.0"}
    assert lacking(needed | {"torchmetrics": "1.8", "capstan-t2i": "0.1"}, have) == ["ray==2.60.0", "torchmetrics==1.8"]
    with pytest.raises(SystemExit, match="run `make gpu-wheels`"):
        install(tmp_path, tmp_path / "site")
