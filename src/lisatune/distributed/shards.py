"""Tensors of which this process holds a part (DTensor), or the shape alone, as in a memory plan.

Every function also accepts plain tensors.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from lisatune.distributed import ranks

__all__ = [
    "full_tensor",
    "has_values",
    "is_sharded",
    "like_shard",
    "local_part",
    "part_to_update",
    "reshard",
    "shard",
    "whole_state",
]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is this rank's part of a larger one."""
    if ranks.count() == 1:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers. On the meta device, or in a memory plan, it has only a shape."""
    return tensor.untyped_storage().device.type != "meta"


def local_part(tensor: Any) -> Tensor:
    """Return this rank's part of a tensor, detached from the graph; for a plain tensor, all of it."""
    plain = tensor.detach()
    part: Tensor = plain.to_local() if is_sharded(plain) else plain
    return part


def part_to_update(parameter: nn.Parameter) -> Tensor:
    """Return this rank's part of a parameter, with its part of the gradient; a plain parameter unchanged."""
    if not is_sharded(parameter):
        return parameter
    part = local_part(parameter)
    part.grad = local_part(parameter.grad)
    return part


def full_tensor(tensor: Any) -> Tensor:
    """Join all ranks' parts of a tensor; every rank must call it. A plain tensor is only detached."""
    plain = tensor.detach()
    whole: Tensor = plain.full_tensor() if is_sharded(plain) else plain
    return whole


def like_shard(whole: Tensor, parameter: Any) -> Tensor:
    """Cut this rank's part out of a tensor that every rank has whole, divided like `parameter`."""
    from torch.distributed.tensor import distribute_tensor

    if not is_sharded(parameter) or whole.shape != parameter.shape:
        return whole
    there = whole.to(parameter.device)
    # No source rank: every rank cuts its own copy, nothing is sent.
    parts: Any = distribute_tensor(there, parameter.device_mesh, parameter.placements, src_data_rank=None)
    local: Tensor = parts.to_local()
    return local.clone()


def whole_state(value: Tensor, parameter: Any) -> Tensor:
    """Join the parts of optimizer state that is divided like `parameter`; every rank must call it."""
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


def reshard(model: nn.Module) -> None:
    """Release parameters that the last forward pass left whole. Call it before reading parameters."""
    modules: Iterable[Any] = model.modules() if ranks.count() > 1 else ()
    for module in modules:
        if hasattr(module, "reshard"):  # FSDP2 has taken it
            module.reshard()


def shard(
    model: nn.Module,
    blocks: Sequence[str],
    *,
    device: torch.device,
    how: Literal["fsdp", "replicate"],
    fill: Callable[[], None] | None = None,
) -> None:
    """Divide a model among the ranks, block by block onto `device`, in place.

    Build the optimizer after this.

    Args:
        model: has the same weights on every rank, or is on the meta device and will be filled.
        blocks: paths of its blocks (`LayerMap.blocks`); each is gathered on its own.
        device: of this rank.
        how: "fsdp" divides every parameter among the ranks; "replicate" keeps all of it on every rank.
        fill: puts weights into a model on the meta device, once each rank has storage for its part.
    """
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    num_ranks = get_world_size()
    with unset_fake_temporarily():  # a mesh is made of real numbers, also in a plan
        if how == "replicate":
            mesh = init_device_mesh(device.type, (num_ranks, 1), mesh_dim_names=("replicate", "shard"))
        else:
            mesh = init_device_mesh(device.type, (num_ranks,))
    for path in blocks:
        fully_shard(model.get_submodule(path), mesh=mesh)
    fully_shard(model, mesh=mesh)
    if fill is not None:
        _allocate(model, device)
        fill()


def _allocate(model: nn.Module, device: torch.device) -> None:
    """Give parameters on the meta device storage of their own. Ties stay ties."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                places.setdefault(parameter, []).append((module, name))
    for parameter, owners in places.items():
        made = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
        for module, name in owners:
            module._parameters[name] = made
    model._apply(lambda tensor: tensor)  # type: ignore[no-untyped-call]  # FSDP2 then sees the new parameters
