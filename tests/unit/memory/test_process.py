import psutil
import torch
from torch.testing._internal.two_tensor import TwoTensor

from lisatune.memory.process import device_peak_bytes, peak_resident_bytes, reset_device_peak, resident_bytes
from lisatune.optim.meter import tensors_bytes

MIB = 2**20


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
