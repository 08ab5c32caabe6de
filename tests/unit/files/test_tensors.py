"""On several ranks a gathered tensor is freed before the next one is gathered."""

import weakref
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lisatune.distributed import ranks
from lisatune.files.tensors import describe_tensors, gather_tensors, write_file

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
