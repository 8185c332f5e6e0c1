"""Slices of tensors, however cut, are joined exactly; missing elements are noticed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from capstan.pipeline.errors import CapstanError
from capstan.training.distributed.loss_scale import LossScale
from capstan.training.distributed.state import StateReader, StateSlice, collect_state, even_share


def write(folder: Path, *cuts: list[tuple[int, int]], whole: torch.Tensor) -> StateReader:
    """Write a file per worker, each with these ranges of `whole`."""
    for rank, runs in enumerate(cuts):
        slices = [StateSlice("weight", "w", low, whole.view(-1)[low:high]) for low, high in runs]
        content = {"parts": collect_state(slices), "buffers": {}, "worker": {}}
        torch.save(content, folder / f"worker-{rank}.pt")
    return StateReader(sorted(folder.glob("worker-*.pt")))


def test_any_run_is_read_out_of_any_cut(tmp_path: Path) -> None:
    whole = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    reader = write(tmp_path, [(0, 3)], [(3, 11), (11, 12)], [(12, 20)], whole=whole)
    for low in range(20):
        for high in range(low, 21):
            assert torch.equal(reader.read("weight", "w", low, high - low), whole.view(-1)[low:high])
    target = torch.zeros(2, 4).to(memory_format=torch.contiguous_format)
    StateSlice("weight", "w", 8, target).load_from(reader)
    assert torch.equal(target, whole[2:4])
    last = torch.zeros(1, 5, 2, 2).to(memory_format=torch.channels_last)
    StateSlice("weight", "w", 0, last).load_from(reader)
    assert torch.equal(last.reshape(-1), whole.view(-1))


def test_elements_that_nobody_wrote_are_missed(tmp_path: Path) -> None:
    reader = write(tmp_path, [(0, 3)], [(4, 6)], whole=torch.arange(6.0))
    assert reader.read("weight", "w", 4, 2).tolist() == [4, 5]
    with pytest.raises(CapstanError, match="has no weight of w"):
        reader.read("weight", "w", 2, 2)
    with pytest.raises(CapstanError, match="has no weight of v"):
        reader.read("weight", "v", 0, 1)


def test_a_file_holds_its_own_elements_alone(tmp_path: Path) -> None:
    write(tmp_path, [(0, 10)], whole=torch.zeros(1_000_000))
    assert (tmp_path / "worker-0.pt").stat().st_size < 10_000


@pytest.mark.parametrize(("numel", "world"), [(1, 4), (7, 3), (8, 2), (5, 1)])
def test_even_shares_cover_everything_once(numel: int, world: int) -> None:
    shares = [range(numel)[even_share(numel, rank, world)] for rank in range(world)]
    assert [index for share in shares for index in share] == list(range(numel))


def test_the_loss_scale_grows_shrinks_and_gives_up() -> None:
    scale = LossScale(4.0, 1999)
    scale.update(overflowed=False)
    assert (scale.scale, scale.good) == (8.0, 0)
    scale.update(overflowed=True)
    assert (scale.scale, scale.exhausted) == (4.0, False)
    for _ in range(9):
        scale.update(overflowed=True)
    assert scale.exhausted
