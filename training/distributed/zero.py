"""A worker's fp32 weights and Adam state inside DeepSpeed, as StateSlices

Stages 1 and 2 concatenate all weights of a parameter group and give each worker one range: `_hp_mapping` locates the
elements of each weight in the range. Stage 3 splits every weight evenly. In both cases the optimizer steps long flat
tensors. The forward pass uses another copy, which must be updated when a state is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from capstan.training.distributed.state import WEIGHT, StateReader, StateSlice, adam_slices, adam_state

Named = Iterable[tuple[str, torch.nn.Parameter]]


def slices_of_stage_1_or_2(zero: Any, named: Named) -> Iterator[StateSlice]:
    """Yield this worker's slices; `zero` is DeepSpeed's optimizer around torch's."""
    for name, parameter in named:
        link: Any = parameter._hp_mapping
        if link is None:  # held by other workers
            continue
        flat = zero.single_partition_of_fp32_groups[link.param_group_index]
        here, target = link.hp_fragment_address, link.lp_fragment_address
        within = slice(here.start, here.start + here.numel)
        yield from adam_slices(name, target.start, flat, adam_state(zero.optimizer, flat), within, slice(None))


def slices_of_stage_3(zero: Any, named: Named, rank: int) -> Iterator[StateSlice]:
    """Yield this worker's slices, without the padding of the last workers' shares."""
    for name, parameter in named:
        group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
        start, numel = rank * size, parameter.ds_numel  # type: ignore[attr-defined]
        if start >= numel:
            continue
        flat = zero.fp32_partitioned_groups_flat[group]
        within = slice(offset, offset + min(size, numel - start))
        yield from adam_slices(name, start, flat, adam_state(zero.optimizer, flat), within, slice(None))


def load_forward_weights(named: Named, reader: StateReader, rank: int) -> None:
    """Copy the saved weights into those of the forward pass, as far as this worker holds them."""
    with torch.no_grad():
        for name, parameter in named:
            share: Any = getattr(parameter, "ds_tensor", None)  # stage 3
            numel = parameter.numel() if share is None else parameter.ds_numel  # type: ignore[attr-defined]
            if share is not None:
                start = rank * share.numel()
                held = max(0, min(share.numel(), numel - start))
                share.view(-1)[:held].copy_(reader.read(WEIGHT, name, start, held))
            if parameter.numel() == numel:  # stage 3 keeps small weights whole
                parameter.copy_(reader.read(WEIGHT, name, 0, numel).view_as(parameter))
