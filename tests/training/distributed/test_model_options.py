"""Switches change how a model computes, not what."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn

from capstan.pipeline.errors import RecipeError
from capstan.training.config import TrainConfig
from capstan.training.distributed import model_options

CPU = torch.device("cpu")


def config(**engine: Any) -> TrainConfig:
    section = {"model": "x:X", "run": "r", "steps": 1, "engine": {"strategy": "ddp", **engine}}
    return TrainConfig.model_validate(section)


def make_unet(dropout: float) -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    kinds = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    shape = {"block_out_channels": (32,), "layers_per_block": 1, "cross_attention_dim": 8, "attention_head_dim": 2}
    unet = UNet2DConditionModel(sample_size=8, in_channels=4, out_channels=4, dropout=dropout, **kinds, **shape)

    class Wrapped(nn.Module):  # as the families wrap what diffusers has
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, noisy: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            return self.unet(noisy, torch.tensor([5, 7]), encoder_hidden_states=text, return_dict=False)[0]

    return Wrapped().train()


def gradients(train: TrainConfig, dropout: float = 0.1) -> tuple[list[torch.Tensor], int]:
    """The gradient of every weight, and the bytes that were kept for the backward pass."""
    model = make_unet(dropout)
    model_options.apply(model, train, CPU)
    draw = torch.Generator().manual_seed(1)
    batch = {"noisy": torch.randn(2, 4, 8, 8, generator=draw), "text": torch.randn(2, 3, 8, generator=draw)}
    kept: list[int] = []
    torch.manual_seed(2)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.nbytes), t)[1], lambda t: t)
    with contextlib.nullcontext() if train.engine.compile else hooks:
        loss = model(**model_options.place(batch, train, CPU)).square().mean()
        during = sum(kept)
    loss.backward()
    return [parameter.grad for parameter in model.parameters()], during


def test_checkpointed_and_channels_last_models_learn_the_same() -> None:
    plain, kept = gradients(config())
    again, less = gradients(config(checkpointing=True))
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
    assert less < kept / 2
    plain, moved = (gradients(config(channels_last=last), dropout=0)[0] for last in (False, True))  # else other chance
    assert all(torch.allclose(one, other, rtol=1e-3, atol=1e-5) for one, other in zip(plain, moved, strict=True))


def test_images_and_kernels_are_laid_out_as_asked() -> None:
    batch = {"pictures": torch.zeros(2, 3, 4, 4), "text": torch.zeros(2, 3)}
    last = model_options.place(batch, config(channels_last=True), CPU)
    assert last["pictures"].is_contiguous(memory_format=torch.channels_last)
    assert model_options.place(batch, config(), CPU)["pictures"].is_contiguous()
    model = nn.Conv2d(3, 5, 3)
    model_options.apply(model, config(channels_last=True), CPU)
    assert model.weight.is_contiguous(memory_format=torch.channels_last)


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=r"train\.engine\.checkpointing: Linear has no"):
        model_options.apply(nn.Linear(1, 1), config(checkpointing=True), CPU)
    monkeypatch.setenv("CXX", "/no/c++")
    monkeypatch.setattr(model_options.shutil, "which", lambda name: None)
    with pytest.raises(RecipeError, match=r"train\.engine\.compile: requires g\+\+ or clang\+\+"):
        model_options.apply(nn.Linear(1, 1), config(compile=True), CPU)


@pytest.mark.slow
def test_a_compiled_model_learns_the_same() -> None:
    plain, compiled = (gradients(config(compile=on), dropout=0)[0] for on in (False, True))  # else other chance
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(plain, compiled, strict=True))
