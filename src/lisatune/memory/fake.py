"""Fake tensors have a shape and no memory. With them a training step that would not fit can be traced.

All floats are fake, on a fake "cpu". Attention then takes the fused kernel, as on CUDA; the meta device has
no such kernel. Token ids, labels and positions are real and small, because some code reads them: to count the
tokens that carry loss, or to find where a packed record begins.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import arg_tree_leaves

from lisatune.memory.torch_private import ASKS_DEVICE
from lisatune.optim.meter import plain_tensors

__all__ = ["fake_storage", "fake_tensors", "norms_are_one"]

aten = torch.ops.aten

_norms_are_one: ContextVar[bool] = ContextVar("norms_are_one", default=False)

INDEXING = (
    aten.index.Tensor,
    aten._unsafe_index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
)
"""Operations on a mask. The mask's values decide the output's shape."""

SPARSE = (aten.clone.default, aten._coalesce.default, aten.add_.Tensor)
"""Operations of which torch's fake sparse tensors get the number of rows wrong."""

ON_META = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten.detach.default,
    aten.mm.default,
    aten.bmm.default,
    aten._to_copy.default,
}
"""A third of a step's operations. The meta device computes their shapes in C++, four times as fast as
`FakeTensorMode` finds them in its cache."""


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Make new tensors fake inside the `with`. Operations on real tensors alone stay real.

    The caller's random number generators do not advance.
    """
    with torch.random.fork_rng(devices=[]), FakeTensorMode(allow_non_fake_inputs=True), _RealIds():  # type: ignore[no-untyped-call]
        yield


@contextmanager
def norms_are_one() -> Iterator[None]:
    """Let an optimizer read numbers, such as norms by which it scales a step; all are 1. A model must not."""
    token = _norms_are_one.set(True)
    try:
        yield
    finally:
        _norms_are_one.reset(token)


def fake_storage(model: nn.Module) -> None:
    """Replace a model's parameters and buffers by fake ones on the CPU. Tied ones stay tied."""
    twins: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or isinstance(tensor, FakeTensor):
                    continue
                if tensor not in twins:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    twins[tensor] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                tensors[name] = twins[tensor]  # type: ignore[assignment]


class _RealIds(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes on real tensors if all are real, and reads real masks for fake tensors."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is ASKS_DEVICE:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else function(*args)
        tensors = [each for each in arg_tree_leaves(*args, **kwargs) if isinstance(each, Tensor)]
        if function in ON_META and "device" not in kwargs and all(type(t) is FakeTensor for t in tensors):
            return _compute_on_meta(function, args, kwargs)
        if tensors and not any(_is_fake(each) for each in tensors):
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        if function is aten._local_scalar_dense.default and tensors[0].dtype == torch.bool:
            return True  # asks whether values are finite: yes; other questions are rare
        if function is aten._local_scalar_dense.default and _norms_are_one.get():
            return 1.0
        if function in SPARSE and args[0].layout == torch.sparse_coo:
            return _compute_sparse(function, args)
        if function is aten.add.Tensor and len(tensors) == 2 and tensors[1].layout == torch.sparse_coo:
            return torch.empty_like(tensors[0])  # a dense gradient, and rows of the micro-steps before
        if function in INDEXING:
            args = (args[0], _find_indices(args[1]), *args[2:])
        return function(*args, **kwargs)


def _is_fake(tensor: Tensor) -> bool:
    """Return whether a tensor is fake or made of fake tensors."""
    return isinstance(tensor, FakeTensor) or any(
        isinstance(each, FakeTensor) for each in plain_tensors(tensor)
    )


def _compute_on_meta(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Do one of ON_META. The output is on the fake device of the inputs."""
    fake: FakeTensor = args[0]
    with in_kernel_invocation_manager(fake.fake_mode):
        out = function(*args, **kwargs)
    return FakeTensor(fake.fake_mode, out, fake.fake_device)


def _compute_sparse(function: Any, args: tuple[Any, ...]) -> Tensor:
    """Do one of SPARSE with the right number of rows. All ids count as different."""
    tensor = args[0]
    rows = tensor._nnz() + (args[1]._nnz() if function is aten.add_.Tensor else 0)
    if function is aten._coalesce.default:
        rows = min(rows, len(tensor))
    ids_1n = torch.empty(1, rows, dtype=torch.int64, device=tensor.device)
    values_nD = torch.empty(rows, *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
    is_coalesced = function is aten._coalesce.default or (rows == tensor._nnz() and tensor.is_coalesced())
    made = torch.sparse_coo_tensor(
        ids_1n, values_nD, tensor.shape, check_invariants=False, is_coalesced=is_coalesced
    )
    if function is aten.add_.Tensor:
        tensor.data = made
        return cast(Tensor, tensor)
    return made


def _find_indices(indices: Any) -> list[Tensor | None]:
    """Replace real masks by the indices at which they are true."""
    numbers: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype != torch.bool or isinstance(index, FakeTensor):
            numbers.append(index)
        else:
            with unset_fake_temporarily():
                numbers += index.nonzero().unbind(1)
    return numbers
