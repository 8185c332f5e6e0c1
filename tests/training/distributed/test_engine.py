"""Any number of processes trains as one does, under DDP and every ZeRO stage; a checkpoint goes back exactly, and to
another number of processes with every number in it.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import warm_python

from capstan.pipeline.ports import free_port
from capstan.training.distributed.ema import decay_at
from capstan.training.distributed.state import StateReader

WORKER = Path(__file__).with_name("engine_worker.py")


def load_worker():
    spec = importlib.util.spec_from_file_location("engine_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NAMES = [*load_worker().STRATEGIES, *load_worker().HALF, *load_worker().BF16]


@pytest.fixture(scope="module")
def plain() -> dict:
    """The same training in plain torch, in one process."""
    return train_plainly(bf16=False, shares=1)


@pytest.fixture(scope="module")
def plain_bf16() -> dict:
    """The same with bf16 in the forward pass: what two workers compute of two parts each, averaged in fp32."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return train_plainly(bf16=True, shares=4)
    finally:
        torch.set_num_threads(threads)


def train_plainly(bf16: bool, shares: int) -> dict:
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
        for x_share, y_share in zip(x.chunk(shares), y.chunk(shares), strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                guessed = model(x_share).float()
            ((guessed - y_share).square().mean() / shares).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)))
        optimizer.step()
        optimizer.zero_grad()
        for name, p in model.named_parameters():
            average[name].lerp_(p.detach(), 1 - decay_at(0.9, step))
    return {"weights": dict(model.named_parameters()), "average": average, "norms": norms}


def run_workers(phase: str, folder: Path, before: Path, processes: int, **environment: str) -> str:
    """Let `processes` workers train under every strategy, each time as a new group; return rank 0's log."""
    ports = ",".join(str(free_port()) for _ in NAMES)
    common = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    common |= {"OMP_NUM_THREADS": "1", **environment}
    environments = [os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    command = [sys.executable, str(WORKER), phase, str(folder), str(before), ports]
    return warm_python.run_together(command, environments, timeout=480)[0]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes train from the start. There is no compiler where they run."""
    folder = tmp_path_factory.mktemp("two")
    nowhere = {"CC": "/no/cc", "CXX": "/no/c++", "TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    (folder / "logs").write_text(run_workers("train", folder, folder, 2, **nowhere))
    return folder


@pytest.fixture(scope="module")
def one(two: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process goes on from what two have left."""
    folder = tmp_path_factory.mktemp("one")
    (folder / "logs").write_text(run_workers("resume", folder, two, 1))
    return folder


@pytest.fixture(scope="module")
def two_again(one: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes go on from what one has left of what two had left."""
    folder = tmp_path_factory.mktemp("again")
    run_workers("resume", folder, one, 2)
    return folder


def assert_like(folder: Path, plain: dict) -> None:
    """As plain torch: to rounding; in half precision on the whole, since Adam makes much of a gradient near zero."""
    seen, half = torch.load(folder / "seen.pt"), folder.name.startswith(("fp16", "bf16"))
    assert_close(seen, plain, half)


def assert_close(seen: dict, plain: dict, half: bool) -> None:
    assert seen["norms"] == pytest.approx(plain["norms"][-len(seen["norms"]) :], rel=0.05 if half else 1e-4)
    for kind in ("weights", "average"):
        assert seen[kind].keys() == plain[kind].keys()
        for name, tensor in seen[kind].items():
            off = (tensor - plain[kind][name]).abs()
            assert (off.mean() < 1e-3) if half else (off.max() < 1e-5), (kind, name, off.max())


def state(folder: Path, plain: dict) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint holds of each weight, put together."""
    reader = StateReader(sorted(folder.glob("checkpoints/step-*/worker-*.pt")))
    sizes = {name: tensor.numel() for name, tensor in plain["weights"].items()}
    kinds = ("weight", "exp_avg", "exp_avg_sq", "average")
    whole = {f"{kind} {name}": reader.read(kind, name, 0, sizes[name]) for kind in kinds for name in sizes}
    return whole | {f"step {name}": reader.read("step", name, 0, 1) for name in sizes}


@pytest.mark.integration
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_as_one(name: str, two: Path, plain: dict) -> None:
    assert_like(two / name, plain)


@pytest.mark.integration
@pytest.mark.parametrize("name", NAMES)
def test_another_number_of_processes_goes_on(name: str, two: Path, one: Path, two_again: Path, plain: dict) -> None:
    before, between, after = (state(folder / name, plain) for folder in (two, one, two_again))
    assert float(before["step 3.weight"]) == 3
    assert all(torch.equal(before[key], between[key]) and torch.equal(before[key], after[key]) for key in before)
    for folder in (one, two_again):
        assert_like(folder / name, plain)


@pytest.mark.integration
@pytest.mark.parametrize("name", load_worker().BF16)
def test_gradients_of_bf16_are_averaged_in_fp32(name: str, two: Path, plain_bf16: dict) -> None:
    assert_close(torch.load(two / name / "seen.pt"), plain_bf16, half=False)


@pytest.mark.integration
def test_what_runs_is_said_and_no_compiler_is_needed(two: Path, one: Path) -> None:
    logs = (two / "logs").read_text()
    for stage, count in ((0, 2), (1, 2), (2, 4), (3, 4)):
        assert logs.count(f"ZeRO stage {stage}, world size 2") == count
    assert logs.count("DDP, world size 2") == 3
    assert "written by 2 workers of ZeRO 2, with 1 worker of ZeRO 2" in (one / "logs").read_text()
    assert not (two / "extensions").exists()


def test_importing_deepspeed_skips_what_is_slow_and_hides_nothing_afterwards() -> None:
    code = (
        "import sys, torch; from capstan.training.distributed.engine import _import_deepspeed\n"
        "compile_ = torch.compile; deepspeed = _import_deepspeed()\n"
        "assert torch.compile is compile_ and 'mlflow' not in sys.modules and hasattr(deepspeed, 'initialize')\n"
        "import mlflow; assert callable(mlflow.log_metric)\n"
        "from deepspeed.runtime.zero.muon.original_muon import muon_update; assert callable(muon_update)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_process_needs_no_launcher(plain: dict, tmp_path: Path) -> None:
    worker = load_worker()
    for _ in range(2):  # nor does an engine leave anything for the next one to trip over
        training = worker.Training(worker.config({"strategy": "ddp"}, str(tmp_path), 1))
        training.steps(0, worker.STEPS)
        weights = training.seen()["weights"]
        training.engine.close()
        assert all(torch.allclose(tensor, plain["weights"][name], atol=1e-5) for name, tensor in weights.items())
