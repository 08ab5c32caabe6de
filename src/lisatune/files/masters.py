"""Exact weights of frozen blocks on disk: read by memory map, written to a file without a name.

A weight that has never trained is read from the model's own safetensors files, which nobody writes to. A
weight that has trained is written to a scratch file in a folder of the caller's choice. The file has no name,
so it is gone when the process ends, however it ends; checkpoints hold every weight, and a resumed run fills a
new file. Pages of either are in the system's file cache and count as free memory.
"""

import mmap
import os
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from lisatune.files.disk import explain_write_errors
from lisatune.files.tensors import have_equal_bits
from lisatune.lisa.frozen_weights import RamMasters

__all__ = ["DiskMasters"]

ALIGNMENT = mmap.ALLOCATIONGRANULARITY
"""Bytes at which a memory map can start."""


class DiskMasters:
    """A store of exact weights on disk, for `LISA(…, frozen_weights="int8", masters=…)`.

    `copy.deepcopy` of a model gives the copy a scratch file of its own in the same folder. A model that is
    saved whole holds the weights, and is loaded with them in host memory (`RamMasters`).

    Args:
        folder: where the scratch file is made, on the first write; it must exist. The file grows to the bytes
            of all weights that ever trained.
        sources: weights by parameter name that a file holds already, memory-mapped, such as those of
            `safetensors.safe_open(…).get_tensor`. A weight that is equal to its source is not written.

    Example:
        >>> import tempfile, torch
        >>> masters = DiskMasters(tempfile.gettempdir())
        >>> masters.keep("weight", torch.ones(2, 2))
        >>> masters.get("weight").sum()
        tensor(4.)
    """

    def __init__(self, folder: str | os.PathLike[str], sources: Mapping[str, Tensor] | None = None) -> None:
        self._folder = Path(folder)
        self._sources = dict(sources or {})
        self._written: dict[str, Tensor] = {}
        self._current: dict[str, Tensor] = {}
        self._offsets: dict[str, int] = {}
        self._file: int | None = None
        self._size = 0

    def keep(self, name: str, weight: Tensor) -> None:
        """Store a weight from any device; raises OSError if it cannot be written."""
        source = self._sources.get(name)
        weight = weight.detach().cpu().contiguous()
        if source is not None and (weight.data_ptr() == source.data_ptr() or have_equal_bits(weight, source)):
            self._current[name] = source
            return
        if name not in self._written:
            self._written[name] = self._map(name, weight)
        self._write(weight, self._offsets[name])
        self._current[name] = self._written[name]

    def get(self, name: str) -> Tensor:
        """Return the stored weight, memory-mapped. Never write into it."""
        return self._current[name]

    def take(self, name: str, device: torch.device) -> Tensor:
        """Return a copy of the weight on a device."""
        return self._current[name].to(device, copy=True)

    def host_bytes(self) -> int:
        """Return 0: the weights are on disk."""
        return 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = type(self)(self._folder, self._sources)
        for name, weight in self._current.items():
            twin.keep(name, weight)
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return _hold, (self._current,)

    def _map(self, name: str, weight: Tensor) -> Tensor:
        """Make the scratch file larger by a weight, and map the new part into memory."""
        if self._file is None:
            with explain_write_errors(self._folder, "folder"):
                self._file = _open_nameless(self._folder)
            weakref.finalize(self, os.close, self._file)
        start = self._size
        self._size += -(-max(weight.nbytes, 1) // ALIGNMENT) * ALIGNMENT
        with explain_write_errors(self._folder, "folder"):
            os.ftruncate(self._file, self._size)
            try:
                part = mmap.mmap(self._file, self._size - start, offset=start)
            except OSError as error:
                what = "its file system cannot map files into memory; set method.master: ram"
                raise OSError(error.errno, what) from error
        self._offsets[name] = start
        flat = torch.frombuffer(part, dtype=weight.dtype, count=weight.numel())
        return flat.view(weight.shape)

    def _write(self, weight: Tensor, start: int) -> None:
        """Write through the file, not through the map: a full disk is then an error and not a signal."""
        assert self._file is not None
        left = weight.reshape(-1).view(torch.uint8).numpy().data
        with explain_write_errors(self._folder, "folder"):
            while left:
                written = os.pwrite(self._file, left, start)
                start, left = start + written, left[written:]


def _hold(weights: Mapping[str, Tensor]) -> RamMasters:
    masters = RamMasters()
    for name, weight in weights.items():
        masters.keep(name, weight)
    return masters


def _open_nameless(folder: Path) -> int:
    file, path = tempfile.mkstemp(dir=folder, prefix=".lisatune-masters-")
    Path(path).unlink()
    return file
