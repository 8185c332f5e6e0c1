"""On a GPU every strategy, precision and switch trains as plain fp32 does, and a resumed run as one never stopped."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu import NEEDS_GPU
from repo import HELPERS
from tiny_runs import assert_same, make_recipe, records, weights

from capstan.training.launch import train

pytestmark = NEEDS_GPU

STEPS = 12
STRATEGIES: dict[str, dict[str, Any]] = {
    **{f"zero{stage}": {"strategy": "deepspeed", "zero": stage} for stage in range(4)},
    **{f"offload{stage}": {"strategy": "deepspeed", "zero": stage, "offload": True} for stage in (1, 2, 3)},
    "channels_last": {"channels_last": True},
    "compile": {"compile": True},
}
HALVES = [(precision, zero) for precision in ("bf16", "fp16") for zero in (None, 1, 2, 3)]


@pytest.fixture(autouse=True, scope="module")
def _importable():
    """Workers find the tiny family as this process does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HELPERS))
        yield


def run_of(dataset: Path, folder: Path, engine: dict[str, Any] | None = None, **section: Any) -> Path:
    """Train the tiny family in a process of its own, on the GPU; return the run."""
    engine = {"strategy": "ddp", "launcher": "local", **(engine or {})}
    train(make_recipe(dataset, folder / "run", engine=engine, steps=STEPS, **section))
    return folder / "run"


@pytest.fixture(scope="module")
def plain(squares: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in fp32, without DeepSpeed."""
    return run_of(squares, tmp_path_factory.mktemp("plain"))


def losses(run: Path) -> torch.Tensor:
    return torch.tensor([record["loss"] for record in records(run)])


def test_a_run_is_on_the_gpu(plain: Path) -> None:
    assert "world size 1, cuda" in (plain / "train.log").read_text()
    lines = [json.loads(line) for line in (plain / "log.jsonl").read_text().splitlines()]
    assert all(line["memory_gib"] > 0 for line in lines)


def test_one_worker_is_a_group_of_nccl(tmp_path: Path) -> None:
    """DeepSpeed wants a process group also for a single worker."""
    code = (
        "import torch.distributed as dist\n"
        "from capstan.training.config import TrainConfig\n"
        "from capstan.training.distributed.engine import Engine\n"
        "section = {'model': 'x:X', 'run': 'r', 'steps': 1, 'engine': {'strategy': 'deepspeed', 'zero': 2}}\n"
        "engine = Engine(TrainConfig.model_validate(section))\n"
        "print(dist.get_backend(), engine.device, engine.world)\n"
        "engine.close()\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "nccl cuda:0 1"


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_changes_rounding_alone(name: str, squares: Path, plain: Path, tmp_path: Path) -> None:
    """The product, and so the moving average that it is, and every loss."""
    run = run_of(squares, tmp_path, STRATEGIES[name])
    torch.testing.assert_close(losses(run), losses(plain), rtol=1e-3, atol=1e-5)
    expected = weights(plain)
    for key, found in weights(run).items():
        torch.testing.assert_close(
            found.cpu(), expected[key].cpu(), rtol=1e-2, atol=1e-3, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_the_product_is_the_moving_average(squares: Path, plain: Path, tmp_path: Path) -> None:
    last = weights(run_of(squares, tmp_path, ema=None))
    averaged = weights(plain)
    moved = [name for name, weight in averaged.items() if weight.ndim and not torch.equal(weight, last[name])]
    assert moved


@pytest.mark.parametrize(("precision", "zero"), HALVES)
def test_half_precision_learns_as_fp32_does(
    precision: str, zero: int | None, squares: Path, plain: Path, tmp_path: Path
) -> None:
    """fp16 may skip its first steps, until the loss scale fits; its average is then that of fewer steps."""
    engine = {} if zero is None else {"strategy": "deepspeed", "zero": zero}
    run = run_of(squares, tmp_path, engine, precision=precision)
    assert f"cuda:0, {precision}" in (run / "train.log").read_text()
    seen, expected = losses(run), losses(plain)
    assert seen.isfinite().all()
    assert seen[-1] < expected[0]
    torch.testing.assert_close(seen[0], expected[0], rtol=0.02, atol=1e-3)
    torch.testing.assert_close(seen[-1], expected[-1], rtol=0.3, atol=0.02)


@pytest.mark.parametrize("name", ["ddp", "zero2", "zero3", "bf16", "fp16"])
def test_a_resumed_run_is_bit_equal(name: str, squares: Path, tmp_path: Path) -> None:
    engine = STRATEGIES.get(name, {})
    section = {"precision": name} if name in ("bf16", "fp16") else {}
    run = run_of(squares, tmp_path, engine, **section)
    again = tmp_path / "again" / "run"
    shutil.copytree(run, again)
    # As it stood after step 8, and then was killed.
    (again / "finished.json").unlink()
    shutil.rmtree(again / "product")
    shutil.rmtree(again / "checkpoints" / f"step-{STEPS:06d}")
    run_of(squares, again.parent, engine, **section)
    assert "resum" in (again / "train.log").read_text()
    assert_same(again, run)
