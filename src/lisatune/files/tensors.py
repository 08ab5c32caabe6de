"""Safetensors files of tensors that are divided among ranks: no process ever holds a whole file.

To write a model, all ranks gather one tensor at a time, and rank 0 appends it to the file. To read, each rank
takes its own rows of each tensor. Ranks write their checkpoints together (`lisatune.files.parts`).
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lisatune.distributed.shards import full_tensor, is_sharded, like_shard, local_part
from lisatune.nn.coded import exact_parameters

__all__ = [
    "NAMES",
    "DividedTensor",
    "as_bytes",
    "check_storable",
    "collect",
    "describe_tensors",
    "gather_tensors",
    "have_equal_bits",
    "named_weights",
    "read_part",
    "sort_names",
    "write_file",
    "write_stream",
]

NAMES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of dtypes in a safetensors header, in the order in which the library sorts tensors."""


@dataclass(frozen=True)
class DividedTensor:
    """A tensor of which each rank holds a part."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    gather: Callable[[], Tensor]
    """Puts the whole tensor together; every rank must call it."""
    rows: tuple[int, Tensor] | None = None
    """Where this rank's rows begin, and the rows; None for what every rank has whole."""

    @property
    def part(self) -> Tensor:
        """This rank's rows, or all of what is not divided. Exchanges nothing with other ranks."""
        return self.gather() if self.rows is None else self.rows[1]


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's exact parameters (tied ones once) and persistent buffers by name."""
    passing = {
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    buffers = {name: buffer for name, buffer in model.named_buffers() if name not in passing}
    return {**exact_parameters(model), **buffers}


def describe_tensors(tensors: Mapping[str, Tensor]) -> dict[str, DividedTensor]:
    """Describe tensors of which this rank may hold only a part."""
    return {
        name: DividedTensor(tensor.dtype, tuple(tensor.shape), partial(full_tensor, tensor), _rows_of(tensor))
        for name, tensor in tensors.items()
    }


def check_storable(tensors: Mapping[str, DividedTensor]) -> None:
    """Refuse tensors that safetensors files cannot hold.

    Raises:
        TypeError: there is such a tensor.
    """
    for name, tensor in tensors.items():
        part = tensor.part
        if type(part) not in (Tensor, nn.Parameter) or part.layout != torch.strided:
            raise TypeError(f"cannot save {name}: {type(part).__name__} is not a plain dense tensor")
        if part.dtype not in NAMES:
            raise TypeError(f"cannot save {name}: safetensors files hold no {part.dtype}")


def _rows_of(tensor: Tensor) -> tuple[int, Tensor] | None:
    """Return where this rank's rows of a tensor begin, and the rows; None if it is not divided."""
    return (_find_rows(tensor)[0], local_part(tensor)) if is_sharded(tensor) else None


def _find_rows(divided: Any) -> tuple[int, int]:
    """Return the first of this rank's rows, and the row after its last one: FSDP2 cuts along rows alone."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, starts = compute_local_shape_and_global_offset(
        divided.shape, divided.device_mesh, divided.placements
    )
    return starts[0], starts[0] + sizes[0]


def gather_tensors(*files: Mapping[str, DividedTensor]) -> Iterator[Tensor]:
    """Gather the tensors of files one by one, in the order of `write_file`; every rank must call it."""
    for tensors in files:
        for name in _sort_names(tensors):
            yield tensors[name].gather()


def write_file(
    path: Path,
    tensors: Mapping[str, DividedTensor],
    wholes: Iterator[Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the next tensors of `wholes` to a file.

    Args:
        path: the file.
        tensors: what the file will hold, by name.
        wholes: gives the whole tensors in the order of `gather_tensors`; those of this file are taken.
        metadata: text for the header of the file.

    Raises:
        OSError: the file could not be written.
    """
    write_stream(path, {name: (t.dtype, t.shape) for name, t in tensors.items()}, wholes, metadata)


def write_stream(
    path: Path,
    kinds: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterator[Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a file from one tensor at a time: the same bytes as safetensors' `save_file`.

    Args:
        path: the file.
        kinds: dtype and shape of each tensor by name.
        tensors: gives the tensors in the order of `sort_names`; no more are taken.
        metadata: text for the header of the file.

    Raises:
        OSError: the file could not be written.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in sort_names({name: dtype for name, (dtype, _) in kinds.items()}):
        dtype, shape = kinds[name]
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in kinds:
            plain = next(tensors).cpu()
            file.write(as_bytes(plain).numpy().data)
            del plain  # before the next one is gathered


def collect(tensors: Mapping[str, DividedTensor], wholes: Iterator[Tensor]) -> dict[str, Tensor]:
    """Take the next tensors of `wholes`, all at once."""
    return {name: next(wholes) for name in _sort_names(tensors)}


def read_part(file: Any, name: str, like: Tensor | None) -> Tensor:
    """Read this rank's part of a stored tensor, divided as `like` is.

    The result may be a view of the file: clone it if it must outlive the file.

    Args:
        file: from `safetensors.safe_open`.
        name: name of the tensor in the file.
        like: a tensor that may be divided among ranks. None, or one that is not divided, gives the whole
            stored tensor.
    """
    if like is None or not is_sharded(like):
        whole: Tensor = file.get_tensor(name)
        return whole
    divided: Any = like
    stored = file.get_slice(name)
    if tuple(stored.get_shape()) != tuple(divided.shape):
        return like_shard(file.get_tensor(name), like)
    first, end = _find_rows(divided)
    rows: Tensor = stored[first:end]
    return rows


def sort_names(dtypes: Mapping[str, torch.dtype]) -> list[str]:
    """Sort as safetensors does: wide dtypes first, so that every tensor starts at a multiple of its width."""
    order = list(NAMES)
    return sorted(dtypes, key=lambda name: (order.index(dtypes[name]), name))


def _sort_names(tensors: Mapping[str, DividedTensor]) -> list[str]:
    return sort_names({name: tensor.dtype for name, tensor in tensors.items()})


def as_bytes(tensor: Tensor) -> Tensor:
    """Return a tensor's bytes, uint8 [nbytes]; a view if the tensor is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def have_equal_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one dtype, shape and equal bits; unlike `torch.equal` it tells -0 from 0."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(as_bytes(a), as_bytes(b))
