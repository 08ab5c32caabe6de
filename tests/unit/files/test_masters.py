"""Exact weights on disk: read where they are, written to a file without a name."""

import copy
import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lisatune.files.masters import DiskMasters

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_comes_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    masters = DiskMasters(tmp_path)
    weights = {name: torch.randn(shape, dtype=dtype) for name, shape in {"a": (3, 5), "b": (700, 9)}.items()}
    for name, weight in weights.items():
        masters.keep(name, weight)
    masters.keep("a", weights["a"] + 1)
    assert torch.equal(masters.get("a"), weights["a"] + 1)
    assert torch.equal(masters.get("b"), weights["b"])
    assert masters.host_bytes() == 0


def test_a_taken_weight_is_a_copy(tmp_path: Path) -> None:
    masters = DiskMasters(tmp_path)
    masters.keep("a", torch.ones(4, 4))
    masters.take("a", CPU).zero_()
    assert torch.equal(masters.get("a"), torch.ones(4, 4))


def test_a_weight_that_is_in_a_file_already_is_not_written(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        masters = DiskMasters(tmp_path / "missing", {"a": file.get_tensor("a")})
    masters.keep("a", torch.ones(4, 4))  # a folder that is missing shows that nothing is written
    assert torch.equal(masters.get("a"), torch.ones(4, 4))
    with pytest.raises(OSError, match=r"cannot write .*missing"):
        masters.keep("a", torch.zeros(4, 4))
    assert torch.equal(masters.get("a"), torch.ones(4, 4))


def test_a_changed_weight_leaves_its_source_as_it_is_and_may_become_equal_again(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        source = file.get_tensor("a")
    masters = DiskMasters(tmp_path, {"a": source})
    masters.keep("a", torch.zeros(4, 4))
    assert masters.get("a").sum() == 0
    assert source.sum() == 16
    masters.keep("a", torch.ones(4, 4))
    assert masters.get("a").data_ptr() == source.data_ptr()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"], "the scratch file has no name"


def test_negative_zero_is_another_number(tmp_path: Path) -> None:
    masters = DiskMasters(tmp_path, {"a": torch.zeros(2, 2)})
    masters.keep("a", -torch.zeros(2, 2))
    assert bool(torch.signbit(masters.get("a")).all())


def test_a_copy_writes_to_a_file_of_its_own(tmp_path: Path) -> None:
    masters = DiskMasters(tmp_path, {"source": torch.ones(2, 2)})
    masters.keep("a", torch.zeros(4, 4))
    masters.keep("source", torch.ones(2, 2))
    twin = copy.deepcopy(masters)
    twin.keep("a", torch.ones(4, 4))
    assert (masters.get("a").sum(), twin.get("a").sum()) == (0, 16)
    masters.keep("a", torch.full((4, 4), 2.0))
    assert (masters.get("a").sum(), twin.get("a").sum()) == (32, 16)
    assert twin.get("source").data_ptr() == masters.get("source").data_ptr(), "nobody writes to a source"


def test_a_store_that_is_saved_is_loaded_into_memory(tmp_path: Path) -> None:
    masters = DiskMasters(tmp_path)
    masters.keep("a", torch.zeros(4, 4))
    torch.save(masters, tmp_path / "masters.pt")
    loaded = torch.load(tmp_path / "masters.pt", weights_only=False)
    loaded.keep("a", torch.ones(4, 4))
    assert (masters.get("a").sum(), loaded.get("a").sum()) == (0, 16)
    assert loaded.host_bytes() == 64


def test_a_full_disk_is_an_error_and_not_a_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    masters = DiskMasters(tmp_path)
    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(OSError, match="No space left on device; free space or name another folder"):
        masters.keep("a", torch.ones(4, 4))


def test_a_file_system_without_maps_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr("mmap.mmap", fail)
    with pytest.raises(OSError, match=r"cannot map files into memory; set method\.master: ram"):
        DiskMasters(tmp_path).keep("a", torch.ones(4, 4))
