"""A model divided among ranks by torch's FSDP2, and what has to be known about its parameters.

Each block is a unit of its own and the ends are one: a rank holds a slice of every parameter, and the whole
of a block only while that block computes. Of a frozen block no gradient is made, exchanged or kept.

    fsdp        slices over all ranks: weights, gradients and optimizer state are divided by their number
    replicate   the same with a mesh of (ranks, 1): every rank holds everything, gradients are added up

Between two steps the model must be in slices: parameters that an evaluation has left whole are other objects,
and freezing these would freeze nothing. `shards.reshard` sees to that.

Gradients are in the weights' dtype, also while they are added up over ranks.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.optim import Optimizer

from lisatune.layers import find_layers
from lisatune.loss import CausalLMLoss
from lisatune.recipe import Recipe
from lisatune.shards import reshard

__all__ = ["ShardedLoss", "check_optimizer", "check_recipe", "shard"]


def shard(
    model: nn.Module,
    *,
    device: torch.device,
    how: Literal["fsdp", "replicate"],
    fill: Callable[[], None] | None = None,
) -> None:
    """Divide a model among the ranks, block by block onto `device`, in place.

    Build the optimizer after this.

    Args:
        model: with the same weights on every rank; or on the meta device, to be filled.
        device: of this rank.
        how: what is divided.
        fill: puts weights into a model on the meta device, once each rank has storage for its part.
    """
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    ranks = get_world_size()
    with unset_fake_temporarily():  # a mesh is made of real numbers, also in a plan
        if how == "replicate":
            mesh = init_device_mesh(device.type, (ranks, 1), mesh_dim_names=("replicate", "shard"))
        else:
            mesh = init_device_mesh(device.type, (ranks,))
    for path in find_layers(model).blocks:
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
    model._apply(lambda tensor: tensor)  # type: ignore[no-untyped-call]  # FSDP2 takes notice of them


class ShardedLoss(CausalLMLoss):
    """The loss of a sharded model, which FSDP2 takes for its forward pass.

    Args:
        model: a sharded model; every rank must make its loss.
        prove: as of `CausalLMLoss`.
    """

    def __init__(self, model: nn.Module, *, prove: bool = True) -> None:
        from torch.distributed.fsdp import register_fsdp_forward_method

        super().__init__(model, prove=prove)
        reshard(model)
        self.model._sharded_loss = super().__call__
        register_fsdp_forward_method(self.model, "_sharded_loss")

    def check_packing(self) -> None:
        """As of `CausalLMLoss`; every rank must call it."""
        super().check_packing()
        reshard(self.model)

    def __call__(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Sum the token losses of this rank's batch; every rank must call it."""
        result: tuple[Tensor, Tensor] = self.model._sharded_loss(batch)
        return result


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse state that can't be cut along a weight's rows, or would differ from one rank's.

    Raises:
        ValueError: names the option.
    """
    for group in optimizer.param_groups:
        if group.get("rows"):
            raise ValueError(
                "method.ends with rows does not work on several ranks yet: a divided embedding has no sparse "
                "gradient; leave rows out"
            )
        for key, allowed in (("moments", "fp32"), ("state_device", None), ("rounding", ("exact", "nearest"))):
            value = group.get(key, allowed)
            if value != allowed and value not in (allowed or ()):
                raise ValueError(
                    f"{key} {value!r} does not work on several ranks yet, be it of the optimizer or of "
                    "method.ends; use moments fp32 and rounding exact, with state_device null"
                )


def check_recipe(recipe: Recipe) -> None:
    """Refuse what does not work on several ranks.

    Raises:
        ValueError: names the recipe's key and what to do.
    """
    if not recipe.method.shards:
        raise ValueError(f"method.name: {recipe.method.name} runs in one process only; use lisa or full")
    if recipe.run.compile:
        raise ValueError("run.compile does not work on several ranks yet; set it to false")
    if recipe.optimizer.in_backward:
        raise ValueError(
            "optimizer.in_backward works on one rank only: gradients of several ranks come in after "
            "backward; set it to false"
        )
    if recipe.run.report_to:
        raise ValueError("run.report_to works on one rank only; read metrics.jsonl, or leave it out")
