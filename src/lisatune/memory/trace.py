"""Trace the training step that needs most memory, with fake tensors."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lisatune.distributed.ranks import ranks_are_fake
from lisatune.distributed.shards import part_of, part_to_update
from lisatune.lisa.correction import find_correction
from lisatune.memory.costly_draws import list_costly_draws
from lisatune.memory.equal_blocks import FewerBlocks, set_aside
from lisatune.memory.fake import norms_are_one
from lisatune.memory.tracker import StepMemory
from lisatune.methods.build import Built
from lisatune.optim.adamw import AdamW
from lisatune.optim.group import Group
from lisatune.optim.rows import make_gradient
from lisatune.optim.state import prepare as prepare_state

__all__ = ["make_state", "trace_costliest"]


def trace_costliest(
    built: Built,
    batches: list[dict[str, Tensor]],
    blocks: tuple[int, ...] | None,
    steps: int,
    micro_steps: int,
    is_too_large: Callable[[StepMemory], bool],
) -> StepMemory:
    """Trace a step of each draw that could need most memory. The draw that does stays active.

    The first draw that is too large ends the search.
    """
    schedule = built.schedule
    possible = schedule.possible_draws(steps)
    if not possible:
        return _trace(built, batches, micro_steps)
    draws = [blocks] if blocks is not None else list_costly_draws(possible, built)
    # A block that freezes may leave state behind, so every block that can train makes its state first.
    schedule.hold(sorted({block for draw in possible for block in draw}))
    make_state(built, batches[0]["input_ids"].numel() * micro_steps)
    traced = {}
    for draw in draws:
        schedule.hold(draw)
        traced[draw] = replace(_trace(built, batches, micro_steps), host_bytes=schedule.host_bytes())
        if is_too_large(traced[draw]):
            break
    costliest = max(traced, key=lambda draw: traced[draw].peak_bytes)
    schedule.hold(costliest)
    return traced[costliest]


def _trace(
    built: Built, batches: list[dict[str, Tensor]], micro_steps: int, *, leaves_out: bool = True
) -> StepMemory:
    """Trace a step. Of more micro-steps than batches, the last ones are traced.

    `leaves_out`: trace a few blocks of each run of equal frozen ones, if that is exact.
    """
    ids = batches[0]["input_ids"].numel()
    make_state(built, ids * micro_steps)
    if micro_steps > len(batches):
        for group, p in _find_row_parameters(built):  # of the micro-steps before
            make_gradient(group, p, ids * (micro_steps - len(batches)))
    paths = built.layers.blocks if leaves_out and not ranks_are_fake() else ()
    blocks = [built.model.get_submodule(path) for path in paths]
    with FewerBlocks(built.model, built.step.optimizer, blocks) as tracker:
        built.step.backward(batches)
        built.step.clip()
        aside = set_aside(built.step.optimizer) if blocks else []
        with norms_are_one():
            built.step.update()
        aside.clear()
        memory = tracker.end_step()
    return memory if tracker.is_exact else _trace(built, batches, micro_steps, leaves_out=False)


def _find_row_parameters(built: Built) -> Iterator[tuple[Mapping[str, Any], nn.Parameter]]:
    """Yield the parameters of which only rows train, each with its param group."""
    for group in built.step.optimizer.param_groups:
        yield from ((group, p) for p in group["params"] if group.get("rows") and p.requires_grad)


def make_state(built: Built, ids: int) -> None:
    """Let the optimizer make the state of every parameter that trains.

    Args:
        built: the model and its optimizer.
        ids: number of token ids in a step; all count as different.
    """
    optimizer, correction = built.step.optimizer, find_correction(built.model)
    is_ours, lacks_state = isinstance(optimizer, AdamW), False
    for group in optimizer.param_groups:
        for p in group["params"]:
            if not p.requires_grad or (correction is not None and correction.is_stateless(p)):
                continue
            if group.get("rows"):
                make_gradient(group, p, ids)
            elif not is_ours and optimizer.state.get(p):
                continue
            else:
                p.grad = torch.empty_like(p)
            lacks_state = True
            if is_ours:  # of which only a part may be missing
                state, size = optimizer.state[p], part_of(p).size
                prepare_state(cast(Group, group), part_to_update(p), state, size=size)
    if lacks_state and not is_ours:
        with norms_are_one():
            optimizer.step()
    if correction is not None:
        correction.make_state()
    built.step.skip()
