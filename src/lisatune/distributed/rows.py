"""Gradients of a few rows of a matrix that FSDP2 has divided among ranks.

FSDP2 adds up whole gradients and cuts them. To train a few rows only, each rank takes these rows of its own
gradient as soon as autograd has it, and the ranks exchange them: each gets what all have for the rows that it
holds, as the mean over the ranks, which is FSDP2's. FSDP2 then finds no gradient of that matrix.

Shapes: V rows of the matrix, D its width, n rows with a gradient.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils.hooks import RemovableHandle

from lisatune.distributed import ranks
from lisatune.distributed.shards import (
    is_sharded,
    local_part,
    local_rows,
    part_of,
    row_bounds,
    set_local_gradient,
)

__all__ = ["exchange_rows", "exchange_span", "take_gradients"]


def take_gradients(
    embedding: nn.Module,
    owners: Mapping[nn.Parameter, nn.Module],
    exchange: Callable[[Tensor, nn.Parameter], Tensor],
) -> RemovableHandle:
    """From now on exchange the gradients of divided matrices in place of FSDP2.

    Args:
        embedding: is called first in each forward pass, when FSDP2 has gathered the matrices.
        owners: the module whose `weight` each divided matrix is.
        exchange: gets this rank's gradient [V, D], which it may change, and the divided matrix; returns the
            sparse gradient of the rows that this rank holds.

    Returns:
        Its `remove` ends that.
    """
    watched: dict[nn.Parameter, RemovableHandle] = {}

    def watch(*_: Any) -> None:
        for parameter, module in owners.items():
            whole: Any = module.weight
            if is_sharded(whole):
                raise RuntimeError(
                    "ends with rows needs embedding and head in one unit of FSDP2, and they are gathered at "
                    "different times; leave both to the model's own fully_shard"
                )
            if whole.requires_grad and whole not in watched:  # one tensor for the whole run
                watched[whole] = whole.register_post_accumulate_grad_hook(
                    lambda whole, parameter=parameter: take(whole, parameter)
                )

    @torch.no_grad()
    def take(whole: Tensor, parameter: nn.Parameter) -> None:
        assert whole.grad is not None
        gradient, whole.grad = whole.grad, None
        mine = exchange(gradient, parameter)
        if parameter.grad is not None:  # of the micro-steps before
            mine = local_part(parameter.grad) + mine
        set_local_gradient(parameter, mine)
        for hook in list((parameter._post_accumulate_grad_hooks or {}).values()):  # as FSDP2 does
            hook(parameter)

    return embedding.register_forward_pre_hook(watch)


def exchange_rows(gradient: Tensor, parameter: Any) -> Tensor:
    """Exchange sparse gradients, of which each rank has other rows; every rank must call it.

    Args:
        gradient: this rank's, sparse [V, D]; it may be changed.
        parameter: the matrix [V, D], divided among the ranks between its rows.

    Returns:
        Sparse [rows here, D], not merged: a row comes once from each rank that has it.
    """
    merged = gradient.coalesce()
    ids_n, values_nD = merged._indices()[0], merged._values().div_(ranks.count())
    bounds, index = row_bounds(parameter), part_of(parameter).index
    if ranks.ranks_are_fake():  # the most that can arrive: all ids of all ranks differ and are of this part
        count = min(len(ids_n) * ranks.count(), local_part(parameter).shape[0])
        ids_n, values_nD = ids_n.new_empty(count), values_nD.new_empty(count, values_nD.shape[1])
        return _make_sparse(ids_n, values_nD, parameter)
    mesh = parameter.device_mesh
    dims = sorted(range(mesh.ndim), key=lambda dim: not parameter.placements[dim].is_shard())
    for dim in dims:  # first to the ranks of this copy, then to the other copies
        group = mesh.get_group(dim)
        if parameter.placements[dim].is_shard():
            ends = torch.tensor(bounds[1:], device=ids_n.device)
            owners_n = torch.bucketize(ids_n, ends, right=True)
            counts = torch.bincount(owners_n, minlength=mesh.size(dim))
            ids_n, values_nD = _send(ids_n, values_nD, counts, group)
        else:
            ids_n, values_nD = _gather(ids_n, values_nD, mesh.get_local_rank(dim), group)
    return _make_sparse(ids_n - bounds[index], values_nD, parameter)


def exchange_span(gradient: Tensor, parameter: Any, *, span: tuple[int, int]) -> Tensor:
    """Exchange the rows from A to B of dense gradients; every rank must call it.

    Args:
        gradient: this rank's, dense [V, D].
        parameter: the matrix [V, D], divided among the ranks between its rows.
        span: A and B, 0 <= A <= B < V, equal on every rank.

    Returns:
        Sparse [rows here, D]: those of them that this rank holds.
    """
    (first, last), mesh = span, parameter.device_mesh
    values_nD = gradient[first : last + 1] / ranks.count()
    for dim in range(mesh.ndim):
        distributed.all_reduce(values_nD, group=mesh.get_group(dim))
    here = local_rows(parameter, span)
    begin = row_bounds(parameter)[part_of(parameter).index]
    ids_n = torch.arange(here.start, here.stop, device=gradient.device)
    return _make_sparse(ids_n, values_nD[here.start + begin - first : here.stop + begin - first], parameter)


def _make_sparse(ids_n: Tensor, values_nD: Tensor, parameter: Any) -> Tensor:
    shape = local_part(parameter).shape
    return torch.sparse_coo_tensor(ids_n.unsqueeze(0), values_nD, shape, check_invariants=False)


def _send(ids_n: Tensor, values_nD: Tensor, counts: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Send each rank of a group its rows, which follow each other; return those that arrive."""
    arriving = torch.empty_like(counts)
    distributed.all_to_all_single(arriving, counts, group=group)
    sent, taken = counts.tolist(), arriving.tolist()
    ids = ids_n.new_empty(sum(taken))
    values = values_nD.new_empty(sum(taken), values_nD.shape[1])
    distributed.all_to_all_single(ids, ids_n, taken, sent, group=group)
    distributed.all_to_all_single(values, values_nD, taken, sent, group=group)
    return ids, values


def _gather(ids_n: Tensor, values_nD: Tensor, mine: int, group: Any) -> tuple[Tensor, Tensor]:
    """Return the rows of all ranks of a group, in the order of the ranks."""
    count = distributed.get_world_size(group)
    sizes = torch.zeros(count, dtype=torch.int64, device=ids_n.device)
    sizes[mine] = len(ids_n)
    distributed.all_reduce(sizes, group=group)
    all_ids, all_values = [], []
    for source, size in enumerate(sizes.tolist()):
        ids = ids_n if source == mine else ids_n.new_empty(size)
        values = values_nD if source == mine else values_nD.new_empty(size, values_nD.shape[1])
        for tensor in (ids, values):
            distributed.broadcast(tensor, group_src=source, group=group)
        all_ids.append(ids)
        all_values.append(values)
    return torch.cat(all_ids), torch.cat(all_values)
