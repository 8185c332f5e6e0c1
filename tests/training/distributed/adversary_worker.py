"""One of two workers of test_adversary: a linear model and a linear adversary, trained for a few steps.

Usage: adversary_worker.py OUT. Rank 0 writes both models' weights and the balance of their gradients to OUT.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from capstan.training.config import TrainConfig
from capstan.training.distributed.engine import Engine
from capstan.training.models.autoencoder.config import DiscriminatorSettings
from capstan.training.models.autoencoder.discriminator import PatchAdversary

STEPS, BATCH, CLIP = 4, 8, 0.5


def make_models() -> tuple[torch.nn.Linear, torch.nn.Linear]:
    """Return model and adversary; without normalisation over the batch, which would depend on the worker."""
    torch.manual_seed(0)
    return torch.nn.Linear(6, 6), torch.nn.Linear(6, 1)


def batch_of(step: int) -> torch.Tensor:
    return torch.randn(BATCH, 6, generator=torch.Generator().manual_seed(step))


def main(out: Path) -> None:
    section = {"model": "x:X", "run": str(out.parent), "steps": STEPS, "batch": BATCH, "clip": CLIP}
    engine = Engine(TrainConfig.model_validate(section | {"engine": {"strategy": "ddp", "workers": 2}}))
    model, rival = make_models()
    adversary = PatchAdversary(DiscriminatorSettings(start=0))
    adversary.model = rival
    wrapped = engine.prepare(model)
    adversary.attach(engine)
    balances = []
    for step in range(STEPS):
        engine.set_lr(0.01)
        adversary.set_step(step, 0.01)
        x = batch_of(step).chunk(2)[engine.rank]
        made = wrapped(x)
        reconstruction = (made - x).square().mean()
        opposed, metrics = adversary.adversarial_loss(made, x, reconstruction, model.weight)
        balances.append(metrics["adversarial_weight"].detach())
        engine.backward(reconstruction + opposed, last=True)
        adversary.step(last=True)
    if engine.is_main:
        models = {"model": model, "rival": rival}
        weights = {f"{name}.{key}": w for name, part in models.items() for key, w in part.state_dict().items()}
        torch.save({**weights, "balances": torch.stack(balances)}, out)
    engine.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
