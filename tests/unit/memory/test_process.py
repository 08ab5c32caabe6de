import resource
from pathlib import Path

import psutil
import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from lisatune.memory import process
from lisatune.memory.process import (
    available_bytes,
    device_peak_bytes,
    limit_bytes,
    peak_resident_bytes,
    reset_device_peak,
    resident_bytes,
)
from lisatune.optim.meter import tensors_bytes

MIB = 2**20
CPU = torch.device("cpu")


class System:
    """A /sys/fs/cgroup and a /proc/self in a folder."""

    def __init__(self, folder: Path) -> None:
        self.groups, self.own = folder / "groups", folder / "own"
        self.own.mkdir()

    def join(self, *lines: str) -> None:
        (self.own / "cgroup").write_text("".join(f"{line}\n" for line in lines))

    def limit(self, group: str, most: str, used: int, cache: int, version: int = 2) -> None:
        """Give a group a limit of `most`, of which `used` is used, `cache` of it by page cache."""
        names = ("max", "current") if version == 2 else ("limit_in_bytes", "usage_in_bytes")
        folder = self.groups / group if version == 2 else self.groups / "memory" / group
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in zip(names, (most, used), strict=True):
            (folder / f"memory.{name}").write_text(f"{text}\n")
        line = "inactive_file" if version == 2 else "total_inactive_file"
        (folder / "memory.stat").write_text(f"anon 1\n{line} {cache}\n")

    def use(self, **sizes: int) -> None:
        lines = [f"{name}:\t{size // 1024} kB\n" for name, size in sizes.items()]
        (self.own / "status").write_text("Name:\tpython\n" + "".join(lines))


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> System:
    """A system without control groups, on a machine of any size."""
    made = System(tmp_path)
    monkeypatch.setattr(process, "CGROUPS", made.groups)
    monkeypatch.setattr(process, "PROC", made.own)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return made


def test_without_limits_the_machine_is_the_limit(system: System) -> None:
    total = psutil.virtual_memory().total
    assert limit_bytes(CPU) == total
    assert 0 < (available_bytes(CPU) or 0) <= total


def test_groups_of_version_2_bound_with_those_above_them(system: System) -> None:
    system.join("0::/a/b")
    system.limit("a/b", "max", 5, 0)
    assert limit_bytes(CPU) == psutil.virtual_memory().total
    system.limit("a", str(100 * MIB), 30 * MIB, 10 * MIB)
    assert (limit_bytes(CPU), available_bytes(CPU)) == (100 * MIB, 80 * MIB)
    system.limit("a/b", str(50 * MIB), 60 * MIB, 0)
    assert (limit_bytes(CPU), available_bytes(CPU)) == (50 * MIB, 0)
    system.join("0::/elsewhere")
    assert limit_bytes(CPU) == psutil.virtual_memory().total


def test_groups_of_version_1_bound(system: System) -> None:
    system.join("5:cpu,memory:/job", "3:pids:/job")
    system.limit("job", "9", 4, 2, version=1)
    assert (limit_bytes(CPU), available_bytes(CPU)) == (9, 7)


@pytest.mark.parametrize(("name", "line"), [("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")])
def test_limits_of_the_process_bound(
    system: System, monkeypatch: pytest.MonkeyPatch, name: str, line: str
) -> None:
    limits = {getattr(resource, name): (64 * MIB, resource.RLIM_INFINITY)}
    monkeypatch.setattr(resource, "getrlimit", lambda key: limits.get(key, (resource.RLIM_INFINITY,) * 2))
    system.use(**{"VmSize": 3 * MIB, "VmData": 3 * MIB} | {line: 24 * MIB})
    assert (limit_bytes(CPU), available_bytes(CPU)) == (64 * MIB, 40 * MIB)


def test_processes_share_a_group_and_not_their_own_limits(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    system.join("0::/job")
    system.limit("job", str(100 * MIB), 20 * MIB, 0)
    assert available_bytes(CPU, processes=2) == 40 * MIB
    monkeypatch.setattr(resource, "getrlimit", lambda _: (30 * MIB, 30 * MIB))
    system.use(VmSize=5 * MIB, VmData=MIB)
    assert available_bytes(CPU, processes=2) == 25 * MIB


def test_nothing_is_known_of_other_devices() -> None:
    assert available_bytes(torch.device("mps")) is None
    assert limit_bytes(torch.device("mps")) is None


def test_resident_memory_is_in_bytes_and_its_peak_is_no_less() -> None:
    block = torch.ones(64 * MIB, dtype=torch.uint8)  # in KiB or pages, all of this process would be less
    assert block.nbytes < resident_bytes() < psutil.virtual_memory().total
    assert resident_bytes() <= peak_resident_bytes() + MIB < psutil.virtual_memory().total


def test_the_cpu_has_no_device_count() -> None:
    reset_device_peak(torch.device("cpu"))
    assert device_peak_bytes(torch.device("cpu")) is None


def test_shared_storage_counts_once() -> None:
    a = torch.zeros(10, dtype=torch.bfloat16)
    assert tensors_bytes([a, a[:5], a.view(2, 5), torch.zeros(3)]) == 20 + 12
    assert tensors_bytes([]) == 0
    meta = torch.zeros(4, 5, device="meta")
    assert tensors_bytes([meta, meta.view(20), torch.zeros(7, device="meta")]) == 80 + 28


def test_tensors_made_of_others_count_as_these() -> None:
    pair = TwoTensor(torch.zeros(4), torch.zeros(4))
    assert tensors_bytes([pair, TwoTensor(pair.a, torch.zeros(4))]) == 48
