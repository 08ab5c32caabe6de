"""On several ranks a gathered tensor is freed before the next one is gathered."""

import weakref
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lisatune.distributed import ranks
from lisatune.files.tensors import (
    NAMES,
    describe_tensors,
    gather_tensors,
    sort_names,
    write_file,
    write_stream,
)

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "int": torch.arange(4),
    "scalar": torch.tensor(2.0),
    "empty": torch.empty(0, 3),
}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_one_tensor_is_there_at_a_time(tmp_path: Path, rank: int, fails: bool) -> None:
    files = describe_tensors(TENSORS)
    storages: list[weakref.ref[torch.UntypedStorage]] = []
    held = []

    def copies() -> Iterator[Tensor]:
        for tensor in gather_tensors(files):
            held.append(sum(storage() is not None for storage in storages))
            copy = tensor.clone()
            storages.append(weakref.ref(copy.untyped_storage()))
            yield copy
            del copy

    def write(wholes: Iterator[Tensor]) -> None:
        if fails:
            raise OSError("the disk is full")
        write_file(tmp_path / "some.safetensors", files, wholes)

    with (
        mock.patch.object(ranks, "count", return_value=2),
        mock.patch.object(ranks, "rank", return_value=rank),
        mock.patch.object(ranks, "max_over_ranks", side_effect=lambda number: number),
    ):
        if fails and rank == 0:
            with pytest.raises(OSError, match="the disk is full"):
                ranks.consume_on_rank0(copies(), write)
        else:
            ranks.consume_on_rank0(copies(), write)

    assert len(held) == len(TENSORS)
    if rank == 0 and not fails:
        written = load_file(tmp_path / "some.safetensors")
        assert written.keys() == TENSORS.keys()
        assert all(torch.equal(written[name], tensor) for name, tensor in TENSORS.items())
    assert not any(held)


def test_files_have_the_bytes_that_safetensors_itself_writes(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.zeros(3 * dtype.itemsize, dtype=torch.uint8).view(dtype) for dtype in NAMES}
    tensors |= TENSORS | {"é": torch.ones(2, 2)}
    save_file(tensors, tmp_path / "theirs.safetensors")
    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    order = sort_names({name: tensor.dtype for name, tensor in tensors.items()})
    write_stream(tmp_path / "ours.safetensors", kinds, (tensors[name] for name in order))
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
