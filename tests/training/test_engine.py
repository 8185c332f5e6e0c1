"""Two processes train as one does, under DDP and every ZeRO stage; a checkpoint goes back exactly."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training.ema import decay_at
from training.engine import Engine

WORKER = Path(__file__).with_name("engine_worker.py")


def load_worker():
    spec = importlib.util.spec_from_file_location("engine_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def plain() -> dict:
    """The same training in plain torch, in one process."""
    worker = load_worker()
    model = worker.make_model()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    norms = []
    for step in range(worker.STEPS):
        x, y = worker.batch_of(step)
        (model(x) - y).square().mean().backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)))
        optimizer.step()
        optimizer.zero_grad()
        for name, p in model.named_parameters():
            average[name].lerp_(p.detach(), 1 - decay_at(0.9, step))
    return {"weights": dict(model.named_parameters()), "average": average, "norms": norms}


def torchrun(strategy: str, zero: int, out: Path, processes: int = 2, **environment: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, str(WORKER), strategy, str(zero), str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.mark.integration
@pytest.mark.parametrize(("strategy", "zero"), [("ddp", 0), *(("deepspeed", stage) for stage in range(4))])
def test_two_processes_train_as_one(strategy: str, zero: int, plain: dict, tmp_path: Path) -> None:
    said = torchrun(strategy, zero, tmp_path / "seen.pt")
    assert (f"ZeRO stage {zero}, world size 2" if strategy == "deepspeed" else "DDP, world size 2") in said
    seen = torch.load(tmp_path / "seen.pt")
    assert seen["norms"] == pytest.approx(plain["norms"], rel=1e-4)
    for kind in ("weights", "average"):
        assert seen[kind].keys() == plain[kind].keys()
        for name, tensor in seen[kind].items():
            assert torch.allclose(tensor, plain[kind][name], atol=1e-5), (kind, name)


@pytest.mark.integration
def test_no_compiler_is_needed(plain: dict, tmp_path: Path) -> None:
    built = tmp_path / "extensions"
    nowhere = {"CC": "/no/cc", "CXX": "/no/c++", "TORCH_EXTENSIONS_DIR": str(built)}
    torchrun("deepspeed", 2, tmp_path / "seen.pt", processes=1, **nowhere)
    seen = torch.load(tmp_path / "seen.pt")
    assert all(torch.allclose(tensor, plain["weights"][name], atol=1e-5) for name, tensor in seen["weights"].items())
    assert not built.exists()


def test_one_process_needs_no_launcher(plain: dict, tmp_path: Path) -> None:
    worker = load_worker()
    for _ in range(2):  # nor does an engine leave anything for the next one to trip over
        engine = Engine(worker.config("ddp", 0, str(tmp_path), 1))
        model = engine.prepare(worker.make_model())
        for step in range(worker.STEPS):
            x, y = worker.batch_of(step)
            for part in range(worker.PARTS):
                pieces = (tensor.chunk(worker.PARTS)[part] for tensor in (x, y))
                engine.backward((model(next(pieces)) - next(pieces)).square().mean(), last=part == worker.PARTS - 1)
        weights = engine.gather(engine.shards())
        engine.close()
        assert all(torch.allclose(tensor, plain["weights"][name], atol=1e-5) for name, tensor in weights.items())
