"""Safetensors files that several ranks write together, each its own rows, without gathering.

    NAME-00001-of-00002.safetensors     the rows of the first rank, and what is not divided
    NAME-00002-of-00002.safetensors     those of the second

index.json says how many files there are, and for each tensor its whole shape and where each rank's rows
begin. `open_tensors` reads any rows from whichever files hold them, so any number of ranks can read them, and
also files that one rank has written.

torch's own writer (HuggingFaceStorageWriter in `torch.distributed.checkpoint`) holds a second copy of all
that a rank writes, and knows neither optimizer state by name nor hashes.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lisatune.files.tensors import DividedTensor, sort_names, write_stream

__all__ = ["INDEX", "Rows", "index_rows", "open_tensors", "part_name", "part_starts", "write_rows"]

INDEX = "index.json"


def part_name(name: str, number: int, count: int) -> str:
    """Name the file of part `number`, from 0, of `count`."""
    return f"{name}-{number + 1:05d}-of-{count:05d}.safetensors"


def write_rows(path: Path, tensors: Mapping[str, DividedTensor], *, is_first: bool) -> None:
    """Write this rank's rows of tensors. Exchanges nothing with other ranks, so any thread may call it.

    Args:
        path: the file.
        tensors: whole tensors by name.
        is_first: also write tensors that are not divided.

    Raises:
        OSError: the file could not be written.
    """
    parts = {name: tensor.part for name, tensor in tensors.items() if tensor.rows is not None or is_first}
    order = sort_names({name: part.dtype for name, part in parts.items()})
    kinds = {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()}
    write_stream(path, kinds, (parts[name] for name in order))


def index_rows(tensors: Mapping[str, DividedTensor], starts: list[list[int]]) -> dict[str, Any]:
    """Describe tensors for index.json.

    Args:
        tensors: whole tensors by name.
        starts: of each file, where its rows of each tensor begin, in the order of `tensors`.
    """
    return {
        name: {
            "shape": list(tensor.shape),
            "starts": [each[i] for each in starts] if tensor.rows is not None else [0],
        }
        for i, (name, tensor) in enumerate(tensors.items())
    }


class Rows:
    """A tensor of which several files hold the rows; reads as a slice of a safetensors file does."""

    def __init__(self, files: list[Any], name: str, shape: list[int], starts: list[int]) -> None:
        self._slices = [file.get_slice(name) for file in files[: len(starts)]]
        self._name, self._shape, self.starts = name, shape, starts
        held = [each.get_shape() for each in self._slices]
        ends = [start + rows[0] for start, rows in zip(starts, held, strict=True)]
        if [0, *ends] != [*starts, shape[0]] or any(rows[1:] != shape[1:] for rows in held):
            raise LookupError(f"the rows of {name} are not those that {INDEX} names")

    def get_shape(self) -> list[int]:
        """Return the shape of the whole tensor."""
        return self._shape

    def get_dtype(self) -> str:
        """Return its dtype by safetensors' name."""
        return str(self._slices[0].get_dtype())

    def __getitem__(self, rows: slice) -> Tensor:
        """Read the rows from `rows.start` up to `rows.stop`."""
        bounds = [*self.starts, self._shape[0]]
        pieces = [
            each[max(rows.start, first) - first : min(rows.stop, end) - first]
            for each, first, end in zip(self._slices, bounds, bounds[1:], strict=False)
            if max(rows.start, first) < min(rows.stop, end)
        ]
        if not pieces:
            empty: Tensor = self._slices[0][0:0]
            return empty
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class _Parts:
    """Several safetensors files that read as one."""

    def __init__(self, files: list[Any], index: Mapping[str, Any]) -> None:
        self._files, self._index = files, index

    def keys(self) -> list[str]:
        return list(self._index)

    def get_slice(self, name: str) -> Any:
        tensor = self._index[name]
        if len(tensor["starts"]) == 1:  # not divided
            return self._files[0].get_slice(name)
        return Rows(self._files, name, list(tensor["shape"]), list(tensor["starts"]))

    def get_tensor(self, name: str) -> Tensor:
        rows = self.get_slice(name)
        whole: Tensor = (
            rows[0 : rows.get_shape()[0]] if isinstance(rows, Rows) else self._files[0].get_tensor(name)
        )
        return whole


def part_starts(file: Any, name: str) -> list[int]:
    """Return at which rows of a tensor the parts begin that ranks have written; [0] if it is one part.

    Args:
        file: from `open_tensors`.
        name: name of the tensor in the file.
    """
    rows = file.get_slice(name)
    return rows.starts if isinstance(rows, Rows) else [0]


@contextmanager
def open_tensors(folder: Path, name: str) -> Iterator[Any]:
    """Open the tensors called `name` in a folder, in one file or in several; reads as `safe_open` does.

    Raises:
        OSError, ValueError, LookupError, TypeError: a file is missing or damaged.
    """
    from safetensors import safe_open

    with ExitStack() as stack:
        if not (folder / INDEX).is_file():
            yield stack.enter_context(safe_open(folder / f"{name}.safetensors", framework="pt"))
            return
        index = json.loads((folder / INDEX).read_text())
        count = index["parts"]
        paths = [folder / part_name(name, number, count) for number in range(count)]
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
        yield _Parts(files, index[name])
