"""Tensors that are not all here."""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lisatune.distributed.shards import has_values, local_part


def test_plain_tensors_hold_numbers() -> None:
    weight = nn.Parameter(torch.zeros(2, 3))
    for each in (weight, weight.data, weight[0], local_part(weight), torch.empty(0)):
        assert has_values(each)


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_fake_tensors_and_those_on_meta_hold_none(device: str) -> None:
    with FakeTensorMode():
        fake = torch.zeros(2, 3, device=device)
        kinds: list[Tensor] = [fake, nn.Parameter(fake), local_part(nn.Parameter(fake))]
    kinds.append(torch.zeros(2, 3, device="meta"))
    assert not any(has_values(each) for each in kinds)
