"""Where DeepSpeed keeps a worker's part of the fp32 weights and of Adam's state, as state.py names it.

Stages 1 and 2 lay all weights of a parameter group end to end and cut that into one run a worker: `_hp_mapping` says
which elements of which weight lie where in the run. Stage 3 cuts every weight evenly. Either way the optimizer steps
long flat tensors. What the forward pass uses is another copy, which has to follow when the state is taken up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from capstan.training.distributed.state import WEIGHT, StateReader, StateSlice, adam_parts, adam_state

Named = Iterable[tuple[str, torch.nn.Parameter]]


def parts_of_stage_1_or_2(zero: Any, named: Named) -> Iterator[StateSlice]:
    """This worker's parts; `zero` is DeepSpeed's optimizer around torch's."""
    for name, parameter in named:
        link: Any = parameter._hp_mapping
        if link is None:  # lies on other workers
            continue
        flat = zero.single_partition_of_fp32_groups[link.param_group_index]
        here, there = link.hp_fragment_address, link.lp_fragment_address
        within = slice(here.start, here.start + here.numel)
        yield from adam_parts(name, there.start, flat, adam_state(zero.optimizer, flat), within, slice(None))


def parts_of_stage_3(zero: Any, named: Named, rank: int) -> Iterator[StateSlice]:
    """This worker's parts, without the elements that only fill the last workers' shares up."""
    for name, parameter in named:
        group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
        start, numel = rank * size, parameter.ds_numel  # type: ignore[attr-defined]
        if start >= numel:
            continue
        flat = zero.fp32_partitioned_groups_flat[group]
        within = slice(offset, offset + min(size, numel - start))
        yield from adam_parts(name, start, flat, adam_state(zero.optimizer, flat), within, slice(None))


def take_forward_weights(named: Named, pieces: StateReader, rank: int) -> None:
    """Let the weights that the forward pass uses be those that were written, where they are at present."""
    with torch.no_grad():
        for name, parameter in named:
            share: Any = getattr(parameter, "ds_tensor", None)  # stage 3
            numel = parameter.numel() if share is None else parameter.ds_numel  # type: ignore[attr-defined]
            if share is not None:
                start = rank * share.numel()
                held = max(0, min(share.numel(), numel - start))
                share.view(-1)[:held].copy_(pieces.read(WEIGHT, name, start, held))
            if parameter.numel() == numel:  # stage 3 keeps small weights whole
                parameter.copy_(pieces.read(WEIGHT, name, 0, numel).view_as(parameter))
