"""Tensors of which this process holds a part (DTensor), or the shape alone, as in a memory plan.

Every function also accepts plain tensors.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from lisatune.distributed import ranks

__all__ = [
    "Part",
    "Sharding",
    "count_copies",
    "exchange_late",
    "full_tensor",
    "has_values",
    "holds_first_copy",
    "is_sharded",
    "is_stand_in",
    "like_rows",
    "like_shard",
    "local_part",
    "local_rows",
    "part_of",
    "part_to_update",
    "reshard",
    "row_bounds",
    "set_local_gradient",
    "shard",
    "stand_in",
]


Sharding = Literal["fsdp", "replicate", "hsdp"]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is this rank's part of a larger one."""
    if ranks.count() == 1:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers. On the meta device, or in a memory plan, it has only a shape."""
    return tensor.untyped_storage().device.type != "meta"


def stand_in(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Make zeros of a shape on the CPU that take the memory of one number, in place of values to come."""
    return torch.zeros((), dtype=dtype).expand(*shape)


def is_stand_in(tensor: Tensor) -> bool:
    """Whether a tensor is a `stand_in` of more than one number."""
    return tensor.numel() > 1 and not any(tensor.stride())


def local_part(tensor: Any) -> Tensor:
    """Return this rank's part of a tensor, detached from the graph; for a plain tensor, all of it."""
    plain = tensor.detach()
    with torch.no_grad():  # else torch makes a view, which a sparse gradient does not have
        part: Tensor = plain.to_local() if is_sharded(plain) else plain
    return part


def part_to_update(parameter: nn.Parameter) -> Tensor:
    """Return this rank's part of a parameter, with its part of the gradient; a plain parameter unchanged."""
    if not is_sharded(parameter):
        return parameter
    part = local_part(parameter)
    part.grad = local_part(parameter.grad)
    return part


def set_local_gradient(parameter: Any, part: Tensor) -> None:
    """Give a parameter this rank's part of a gradient, dense or sparse; a plain one all of it."""
    if not is_sharded(parameter):
        parameter.grad = part
        return
    from torch.distributed.tensor import DTensor

    divided: Any = DTensor  # which takes no sparse part by its `from_local`
    parameter.grad = divided(part, parameter._spec, requires_grad=False)


@dataclass(frozen=True)
class Part:
    """Which elements of a whole tensor this rank has: consecutive ones, because FSDP2 cuts between rows."""

    bounds: tuple[int, ...]
    """Where each rank's elements begin in the flat tensor, and at last the number of all elements."""

    index: int
    """Number of this rank's part, from 0."""

    group: "distributed.ProcessGroup | None"
    """Ranks that hold the tensor together; None if all of it is here."""

    @property
    def start(self) -> int:
        """Elements of the whole tensor before the first one here."""
        return self.bounds[self.index]

    @property
    def size(self) -> int:
        """Elements of the whole tensor."""
        return self.bounds[-1]

    def sum(self, values: Tensor) -> Tensor:
        """Add `values` up over the parts, in place; every rank must call it."""
        if self.group is not None:
            distributed.all_reduce(values, group=self.group)
        return values

    def gather(self, number: int, device: torch.device) -> list[int]:
        """Return the number of each part, of which `number` is this one's; every rank must call it."""
        numbers = torch.zeros(len(self.bounds) - 1, dtype=torch.int64, device=device)
        numbers[self.index] = number
        return [int(each) for each in self.sum(numbers).tolist()]


def part_of(parameter: Any) -> Part:
    """Say which elements of a parameter are on this rank; of a plain one, all."""
    rows = len(parameter) if parameter.ndim else 1
    placements = parameter.placements if is_sharded(parameter) else ()
    for dim, placement in enumerate(placements):
        count = parameter.device_mesh.size(dim)
        if placement.is_shard() and count > 1:
            width, most = parameter.shape[1:].numel(), -(-rows // count)
            bounds = tuple(min(i * most, rows) * width for i in range(count + 1))
            mesh = parameter.device_mesh
            return Part(bounds, mesh.get_local_rank(dim), mesh.get_group(dim))
    return Part((0, parameter.numel()), 0, None)


def row_bounds(parameter: Tensor) -> list[int]:
    """Return where each rank's rows of a parameter begin, and at last the number of all rows."""
    width = max(parameter.shape[1:].numel(), 1)
    return [bound // width for bound in part_of(parameter).bounds]


def local_rows(parameter: Tensor, span: tuple[int, int]) -> slice:
    """Say which rows of this rank's part are among the rows from A to B of the whole; maybe none."""
    bounds, index = row_bounds(parameter), part_of(parameter).index
    first, end = (min(max(row, bounds[index]), bounds[index + 1]) for row in (span[0], span[1] + 1))
    return slice(first - bounds[index], end - bounds[index])


def full_tensor(tensor: Any) -> Tensor:
    """Join all ranks' parts of a tensor; every rank must call it. A plain tensor is only detached."""
    plain = tensor.detach()
    whole: Tensor = plain.full_tensor() if is_sharded(plain) else plain
    return whole


def holds_first_copy(tensors: Iterable[Tensor]) -> bool:
    """Whether this rank is one of those that together hold the first copy of the tensors."""
    divided: list[Any] = [tensor for tensor in tensors if is_sharded(tensor)]
    for tensor in divided[:1]:
        dims = [dim for dim, placement in enumerate(tensor.placements) if placement.is_replicate()]
        return all(tensor.device_mesh.get_local_rank(dim) == 0 for dim in dims)
    return ranks.is_rank0()


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


def like_rows(rows: Tensor, parameter: Any) -> Tensor:
    """Let some rows of this rank's part stand for a tensor that is divided like `parameter`.

    Its shape means nothing, but its norm is that of all ranks' rows.
    """
    from torch.distributed.tensor import DTensor

    if not is_sharded(parameter):
        return rows
    return DTensor.from_local(
        rows,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def reshard(model: nn.Module) -> None:
    """Release parameters that the last forward pass left whole. Call it before reading parameters."""
    for module in _divided_modules(model):
        module.reshard()


def count_copies(how: Sharding, copies: int | None = None) -> int:
    """Count the copies of the model that all ranks hold together.

    Args:
        how: "fsdp": one, divided among all ranks. "replicate": one on every rank. "hsdp": as many as `copies`
            says, each divided among ranks that are neighbours.
        copies: of "hsdp". Default: one on each machine.

    Raises:
        ValueError: the copies cannot be divided equally among the ranks, or there is only one.
    """
    number = ranks.count()
    if how != "hsdp":
        return number if how == "replicate" else 1
    if copies is None:
        copies = number // ranks.on_this_machine()
        if copies == 1:
            raise ValueError(
                f"run.sharding hsdp keeps a copy of the model on each machine, and all {number} ranks are on "
                "one; set run.copies, such as 2, or use fsdp"
            )
    if number % copies:
        raise ValueError(
            f"run.copies {copies} does not divide {number} ranks; start a multiple of {copies} ranks, or set "
            f"a divisor of {number}"
        )
    return copies


def exchange_late(model: nn.Module, *, is_last: bool) -> None:
    """Let copies of a model add up their gradients only in the last micro-step of a step.

    Call it before each backward pass. Ranks that divide one copy always exchange theirs, or each would hold
    whole gradients.
    """
    for module in _divided_modules(model):
        module.set_requires_all_reduce(is_last, recurse=False)


def _divided_modules(model: nn.Module) -> Iterator[Any]:
    """Yield the modules that FSDP2 gathers and divides."""
    if ranks.count() == 1:
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            yield module


def shard(
    model: nn.Module,
    blocks: Sequence[str],
    *,
    device: torch.device,
    how: Sharding = "fsdp",
    copies: int | None = None,
    fill: Callable[[], None] | None = None,
) -> None:
    """Divide a model among the ranks, block by block onto `device`, in place.

    Build the optimizer after this.

    Args:
        model: has the same weights on every rank, or is on the meta device and will be filled.
        blocks: paths of its blocks (`LayerMap.blocks`); each is gathered on its own.
        device: of this rank.
        how, copies: as for `count_copies`.
        fill: puts weights into a model on the meta device, once each rank has storage for its part.

    Raises:
        ValueError: as in `count_copies`, or what trains in a block has several dtypes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    num_ranks, number = ranks.count(), count_copies(how, copies)
    shape: tuple[int, ...] = (num_ranks,)
    names: tuple[str, ...] = ("shard",)
    if number > 1:  # neighbours divide a copy
        shape, names = (number, num_ranks // number), ("replicate", "shard")
    if ranks.ranks_are_fake():  # torch keeps what it computed for a mesh, and looks it up by these names:
        names = tuple(f"fake_{name}" for name in names)  # real ranks would all take themselves for rank 0
    with unset_fake_temporarily():  # a mesh is made of real numbers, also in a plan
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    for path in blocks:
        _check_dtypes(path, model.get_submodule(path))
        fully_shard(model.get_submodule(path), mesh=mesh)
    fully_shard(model, mesh=mesh)
    if fill is not None:
        _allocate(model, device)
        fill()


def _check_dtypes(path: str, block: nn.Module) -> None:
    dtypes = {str(p.dtype).removeprefix("torch.") for p in block.parameters() if p.requires_grad}
    if len(dtypes) > 1:
        raise ValueError(
            f"what trains in {path} is in {' and '.join(sorted(dtypes))}, and FSDP2 needs one dtype there on "
            "several ranks; set run.precision to bf16-mixed or fp32"
        )


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
