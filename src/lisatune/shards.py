"""Tensors that are divided among ranks (DTensor): this rank's part, and the whole.

Plain tensors pass through all of it as they are.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lisatune import ranks

__all__ = [
    "full_tensor",
    "is_sharded",
    "like_shard",
    "local_part",
    "part_to_update",
    "reshard",
    "units",
    "whole_state",
]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is this rank's part of a larger one."""
    if ranks.count() == 1:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local_part(tensor: Any) -> Tensor:
    """Return this rank's part of a tensor, without its history; of a plain tensor the whole."""
    plain = tensor.detach()
    part: Tensor = plain.to_local() if is_sharded(plain) else plain
    return part


def part_to_update(parameter: nn.Parameter) -> Tensor:
    """Return this rank's part of a parameter, with that of its gradient; a plain parameter as it is."""
    if not is_sharded(parameter):
        return parameter
    part = local_part(parameter)
    part.grad = local_part(parameter.grad)
    return part


def full_tensor(tensor: Any) -> Tensor:
    """Put a tensor together from all ranks' parts; every rank must call it. A plain one comes as it is."""
    plain = tensor.detach()
    whole: Tensor = plain.full_tensor() if is_sharded(plain) else plain
    return whole


def like_shard(whole: Tensor, parameter: Any) -> Tensor:
    """Cut this rank's part out of a tensor that every rank has, as `parameter` is cut."""
    from torch.distributed.tensor import distribute_tensor

    if not is_sharded(parameter) or whole.shape != parameter.shape:
        return whole
    there = whole.to(parameter.device)
    # No source rank: every rank cuts its own copy, nothing is sent.
    parts: Any = distribute_tensor(there, parameter.device_mesh, parameter.placements, src_data_rank=None)
    local: Tensor = parts.to_local()
    return local.clone()


def whole_state(value: Tensor, parameter: Any) -> Tensor:
    """Put optimizer state together whose parts are cut as `parameter` is; every rank must call it."""
    from torch.distributed.tensor import DTensor

    if not is_sharded(parameter) or value.ndim == 0:
        return value
    return DTensor.from_local(
        value,
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    ).full_tensor()


def units(model: nn.Module) -> Iterator[Any]:
    """Walk over the modules whose parameters come and go together."""
    return (module for module in model.modules() if hasattr(module, "reshard"))


def reshard(model: nn.Module) -> None:
    """Give back parameters that the last forward pass left whole: before anything looks at parameters."""
    for unit in units(model) if ranks.count() > 1 else ():
        unit.reshard()
