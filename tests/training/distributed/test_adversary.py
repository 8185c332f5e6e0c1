"""Two models trained against each other: resumed after a kill between their steps; two processes equal to one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import records

from capstan.pipeline.config import Recipe
from capstan.training.models.autoencoder.discriminator import PatchAdversary
from capstan.training.trainer import fit

WORKER = Path(__file__).with_name("adversary_worker.py")
SMALL = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
VQGAN = SMALL | {"latent_channels": 4, "codes": 32}


def make_recipe(dataset: Path, run: Path, model: str, settings: dict[str, Any], **section: Any) -> Recipe:
    discriminator = {"start": 2, "channels": 4, "layers": 1}
    base = {"model": model, "run": str(run), "steps": 8, "batch": 8, "accumulate": 2, "log_every": 1, "warmup": 2}
    base |= {"checkpoint": {"every": 3}, "engine": {"strategy": "ddp", "threads": 1}, "ema": 0.9, "lr": 1e-3}
    return Recipe(dataset=str(dataset), train={**base, model: settings | {"discriminator": discriminator}, **section})


def rival(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "step-000008" / "rival.pt", weights_only=True)


@pytest.mark.parametrize(("model", "settings"), [("vqgan", VQGAN), ("autoencoder", SMALL)])
def test_resumes_after_a_kill_between_the_two_steps(model, settings, squares, tmp_path, monkeypatch) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert fit(make_recipe(squares, whole, model, settings))["steps"] == 8
    loss, calls = PatchAdversary.loss, []

    def dies(self: PatchAdversary) -> Any:
        """Fail in step 4, after the first model's step and before the second's."""
        calls.append(None)
        if len(calls) == 2 * (4 - 2) + 2:
            raise RuntimeError("killed")
        return loss(self)

    with monkeypatch.context() as patch:
        patch.setattr(PatchAdversary, "loss", dies)
        with pytest.raises(RuntimeError, match="killed"):
            fit(make_recipe(squares, run, model, settings))
    assert fit(make_recipe(squares, run, model, settings))["steps"] == 8
    assert "resuming from" in (run / "train.log").read_text()
    assert records(run) == records(whole)
    assert "discriminator" not in records(run)[1]
    assert {"discriminator", "adversarial_weight", "rival_grad_norm"} <= records(run)[2].keys()
    ours, theirs = (load_file(folder / "product" / "diffusion_pytorch_model.safetensors") for folder in (run, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = rival(run), rival(whole)
    assert all(torch.equal(ours["model"][name], theirs["model"][name]) for name in theirs["model"])
    moments = [state["optimizer"]["state"] for state in (ours, theirs)]
    for number, state in moments[1].items():
        assert all(torch.equal(moments[0][number][name], value) for name, value in state.items())
    assert int(moments[0][0]["step"]) == 6  # of eight, two before its start


def load_worker() -> Any:
    spec = importlib.util.spec_from_file_location("adversary_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plain() -> dict[str, torch.Tensor]:
    """Train as the workers do, in plain torch: the balance is the mean over both halves."""
    worker = load_worker()
    model, rival = worker.make_models()
    decay = [{"params": [model.weight], "weight_decay": 0.01}, {"params": [model.bias], "weight_decay": 0.0}]
    optimizers = torch.optim.AdamW(decay, lr=0.01), torch.optim.Adam(rival.parameters(), lr=0.01, betas=(0.5, 0.9))
    balances = []
    for step in range(worker.STEPS):
        halves = worker.batch_of(step).chunk(2)
        made = [model(x) for x in halves]
        ours = [(m - x).square().mean() for m, x in zip(made, halves, strict=True)]
        theirs = [-rival(m).mean() for m in made]
        norms = [
            [torch.autograd.grad(v, model.weight, retain_graph=True)[0].norm() for v in vs] for vs in (ours, theirs)
        ]
        balance = 0.8 * sum(a / (b + 1e-4) for a, b in zip(*norms, strict=True)) / 2
        balances.append(balance.detach())
        (sum(ours) / 2 + balances[-1] * sum(theirs) / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), worker.CLIP)
        optimizers[0].step()
        rival.zero_grad()
        shown = torch.cat(made).detach()
        (0.5 * ((1 - rival(torch.cat(halves))).relu().mean() + (1 + rival(shown)).relu().mean())).backward()
        torch.nn.utils.clip_grad_norm_(rival.parameters(), worker.CLIP)
        optimizers[1].step()
        model.zero_grad()
    models = {"model": model, "rival": rival}
    weights = {f"{name}.{key}": w for name, part in models.items() for key, w in part.state_dict().items()}
    return {**weights, "balances": torch.stack(balances)}


@pytest.mark.integration
@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(WORKER), str(tmp_path / "seen.pt")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=480,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen, expected = torch.load(tmp_path / "seen.pt"), plain()
    assert seen.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(seen[name], expected[name], atol=1e-5, rtol=1e-4)
