"""Safetensors files of tensors that are divided among ranks: no process ever holds a whole file.

Writing puts one tensor together at a time, on all ranks, and the first one writes it behind the last. Reading
takes of each tensor the rows that are this rank's. On one rank the files are safetensors' own business.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lisatune.distributed import ranks
from lisatune.distributed.shards import full_tensor, is_sharded, like_shard, whole_state

__all__ = [
    "Divided",
    "collect",
    "divided_states",
    "divided_tensors",
    "gathered",
    "lasting_tensors",
    "read_part",
    "write_file",
]

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Divided:
    """A tensor that is going to be put together."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    gather: Callable[[], Tensor]
    """Puts it together; every rank must call it."""

    @property
    def num_bytes(self) -> int:
        """Size of the whole."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def lasting_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters (tied ones once) and persistent buffers by name."""
    persistent = model.state_dict(keep_vars=True).keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return {**dict(model.named_parameters()), **buffers}


def divided_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Divided]:
    """Describe tensors of which this rank may have a part."""
    return {
        name: Divided(tensor.dtype, tuple(tensor.shape), partial(full_tensor, tensor))
        for name, tensor in tensors.items()
    }


def divided_states(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Divided]:
    """The same for optimizer state named "PARAMETER//KEY", which is cut as its parameter is."""
    divided = {}
    for key, tensor in tensors.items():
        parameter = parameters[key.rpartition("//")[0]]
        is_part = is_sharded(parameter) and tensor.ndim > 0
        shape = parameter.shape if is_part else tensor.shape
        divided[key] = Divided(tensor.dtype, tuple(shape), partial(whole_state, tensor, parameter))
    return divided


def gathered(*files: Mapping[str, Divided]) -> Iterator[Tensor]:
    """Put together what is to be written, tensor by tensor, in the order of `write_file`; collective."""
    for tensors in files:
        for name in _order(tensors):
            yield tensors[name].gather()


def write_file(
    path: Path,
    tensors: Mapping[str, Divided],
    wholes: Iterator[Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a file of the tensors that `wholes` gives next.

    Raises:
        OSError: it could not be written.
        TypeError: one is not a plain dense tensor.
    """
    if ranks.count() == 1:
        from safetensors.torch import save_file

        save_file(_storable(collect(tensors, wholes)), path)
        return
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in _order(tensors):
        start, end = end, end + tensors[name].num_bytes
        described = {"dtype": NAMES[tensors[name].dtype], "shape": list(tensors[name].shape)}
        header[name] = {**described, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in tensors:
            plain = next(wholes).contiguous().cpu().reshape(-1)
            file.write(plain.view(torch.uint8).numpy().data)
            del plain  # before the next is put together


def collect(tensors: Mapping[str, Divided], wholes: Iterator[Tensor]) -> dict[str, Tensor]:
    """Take the tensors that `wholes` gives next, all at once."""
    return {name: next(wholes) for name in _order(tensors)}


def read_part(file: Any, name: str, like: Tensor | None) -> Tensor:
    """Read this rank's part of a stored tensor that is cut as `like` is; the whole where that isn't cut.

    It may be a view of the file: copy what is to be kept.

    Args:
        file: from `safetensors.safe_open`.
        name: of the tensor.
        like: of a stored tensor's shape, or it is taken as one that is not cut.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if like is None or not is_sharded(like):
        whole: Tensor = file.get_tensor(name)
        return whole
    divided: Any = like
    stored = file.get_slice(name)
    if tuple(stored.get_shape()) != tuple(divided.shape):
        return like_shard(file.get_tensor(name), like)
    sizes, starts = compute_local_shape_and_global_offset(
        divided.shape, divided.device_mesh, divided.placements
    )
    rows: Tensor = stored[starts[0] : starts[0] + sizes[0]]  # FSDP2 cuts along rows alone
    return rows


def _order(tensors: Mapping[str, Divided]) -> list[str]:
    """As safetensors has it: wide numbers first, so that all lie at multiples of their size."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Plain dense tensors, none sharing memory with another: what safetensors accepts."""
    storable: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
            raise TypeError(f"can't save {name}: {type(tensor).__name__} is not a plain dense tensor")
        dense = tensor.detach().contiguous()
        address = dense.untyped_storage().data_ptr()
        storable[name] = dense.clone() if address in seen else dense
        seen.add(address)
    return storable
