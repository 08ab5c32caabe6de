"""Measure and restore the state of an optimizer: bytes, elements, dtypes, and the part in host memory."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lisatune.distributed.shards import is_sharded, local_part
from lisatune.optim.adamw import AdamW
from lisatune.optim.state import is_host_state

__all__ = [
    "StateMeter",
    "host_state",
    "plain_tensors",
    "restore_dtypes",
    "state_bytes",
    "state_elements",
    "tensors_bytes",
]


def state_bytes(optimizer: Optimizer) -> int:
    """Count the bytes of all tensors in the optimizer's state, each parameter's step counter included."""
    return _bytes_of(optimizer.state.values())


def _bytes_of(states: Iterable[dict[str, Any]]) -> int:
    return tensors_bytes(v for state in states for v in state.values() if isinstance(v, torch.Tensor))


def state_elements(optimizer: Optimizer) -> int:
    """Count the elements of the state that is shaped like its parameter or its rows: AdamW's two moments.

    The moments of a projected gradient count in their low-rank shape; its basis does not count. Neither does
    the remainder of a bf16 weight, which is part of the weight.
    """
    lasting: tuple[str, ...] = getattr(optimizer, "lasting_state", ())
    return sum(
        value.numel()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
        and (
            value.shape == _local_shape(parameter)
            or (value.ndim == 2 and ("row_ids" in state or ("basis" in state and key != "basis")))
        )
        and key not in lasting
    )


def _local_shape(parameter: Tensor) -> torch.Size:
    return local_part(parameter).shape if is_sharded(parameter) else parameter.shape


class StateMeter:
    """Measures the optimizer's state after every step, before a draw can release any of it."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.bytes = 0
        self.elements = 0
        self.beside: tuple[Optimizer, ...] = ()
        """Optimizers of what is added to the model, whose state counts too."""
        optimizer.register_step_post_hook(self._measure)

    def _measure(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        all_of_them = (optimizer, *self.beside)
        self.bytes, self.elements = (sum(map(count, all_of_them)) for count in (state_bytes, state_elements))


def host_state(optimizer: Optimizer) -> list[torch.Tensor]:
    """Return the state that `state_device: cpu` keeps in host memory, even if there is no other memory."""
    if not isinstance(optimizer, AdamW):
        return []
    return [
        value
        for group in optimizer.param_groups
        for p in group["params"]
        for key, value in optimizer.state.get(p, {}).items()
        if is_host_state(group, key)
    ]


def restore_dtypes(optimizer: Optimizer, saved: Mapping[int, Mapping[str, Any]]) -> None:
    """Give loaded state the dtypes that it was saved in.

    `Optimizer.load_state_dict` casts every tensor to the dtype of its parameter: float32 moments of bf16
    weights lose bits, and a remainder of integers loses its meaning. `lisatune.AdamW` prevents that itself.

    Args:
        optimizer: has just loaded a state_dict.
        saved: the `state` of that state_dict, by the parameter's number; it is not changed.
    """
    if isinstance(optimizer, AdamW):
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, entry in saved.items():
        loaded = optimizer.state.get(parameters[number], {})
        for key, value in entry.items():
            if isinstance(value, Tensor) and key in loaded and loaded[key].dtype != value.dtype:
                loaded[key] = value.detach().to(loaded[key].device, copy=True)


def tensors_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes that the tensors' values take. Storage that several tensors share counts once.

    A tensor made of other tensors counts as those: 8-bit moments as codes and scales, a sharded tensor as
    this rank's part.
    """
    # By the storage's own address: tensors on the meta device all have the data pointer 0.
    storages = {}
    for tensor in tensors:
        for plain in plain_tensors(tensor):
            storage = plain.untyped_storage()
            storages[storage._cdata] = storage
    return sum(storage.nbytes() for storage in storages.values())


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensors inside a tensor: codes and scales, ids and rows, a rank's part, or itself."""
    if is_traceable_wrapper_subclass(tensor):
        parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        for part in parts:
            if isinstance(part, Tensor):  # a sharded tensor also names its mesh
                yield from plain_tensors(part)
    elif tensor.layout == torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    else:
        yield tensor
