"""FLOPs against closed forms, and what a record makes of them."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from capstan.training.monitoring.flops import FlopCount, peak_flops, shape_of


def counted(step, batch) -> float:
    count = FlopCount()
    with count.counting(batch):
        step(batch["x"]).sum().backward()
    assert count.of(batch) == pytest.approx(count.known[shape_of(batch)] * len(batch["x"]))
    return count.of(batch)


@pytest.mark.parametrize("again", [None, False, True])
def test_a_product_takes_two_forward_and_four_backward_and_recomputing_nothing(again):
    layers = [torch.nn.Linear(32, 32) for _ in range(3)]

    def step(x):
        for layer in layers:
            x = layer(x) if again is None else checkpoint(layer, x, use_reentrant=again)
        return x

    assert counted(step, {"x": torch.randn(4, 32, requires_grad=True)}) == 3 * 6 * 4 * 32 * 32


def test_frozen_parts_count_as_far_as_they_run():
    frozen, trained = torch.nn.Conv2d(3, 8, 3, padding=1).requires_grad_(False), torch.nn.Linear(8, 5)

    def step(x):
        with torch.no_grad():
            x = frozen(x)
        return trained(x.mean((2, 3)))

    convolution, product = 2 * 4 * 8 * 16 * 16 * 3 * 9, 2 * 4 * 8 * 5
    assert counted(step, {"x": torch.randn(4, 3, 16, 16)}) == convolution + 2 * product  # nothing flows further back


def test_attention_counts():
    def step(x):
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    forward = 2 * 2 * (2 * 4) * 16 * 16 * 8
    assert counted(step, {"x": torch.randn(2, 4, 16, 8, requires_grad=True)}) == pytest.approx(3.5 * forward)


def test_a_shape_is_counted_once_and_changes_no_bit():
    model, count = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5)), FlopCount()
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        with count.counting({"x": torch.ones(4, 8)}):
            results.append(model(torch.ones(4, 8)))
    assert torch.equal(*results)
    with count.counting({"x": torch.ones(2, 8)}):  # fewer samples of a known shape
        pass
    assert list(count.known) == ["x 8"]
    assert count.of({"x": torch.ones(2, 8)}) == 2 * 2 * 8 * 8


def test_peaks_are_found_by_a_devices_name():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp32") == 19.5e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp32", tf32=True) == 156e12
    assert peak_flops("Tesla T4", "fp16") == 65e12
    assert peak_flops("NVIDIA A1000", "bf16") is None
