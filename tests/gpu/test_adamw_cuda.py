"""AdamW on CUDA: the same numbers as on the CPU, and state in host memory that is brought over in time."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from lisatune import AdamW
from lisatune.optim import adamw
from lisatune.optim.adamw_triton import update_chunk, update_together

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

KINDS = list(itertools.product(("exact", "stochastic", "nearest"), ("fp32", "bf16", "8bit", "factored")))


def train(device: str, dtype: torch.dtype, **options: Any) -> tuple[torch.Tensor, AdamW]:
    start = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0))
    weight = nn.Parameter(start.to(device, dtype))
    optimizer = AdamW([weight], lr=1e-3, **options)
    for step in range(5):
        gradient = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(step + 1))
        weight.grad = gradient.to(device, dtype)
        optimizer.step()
    return weight.detach().cpu(), optimizer


@pytest.mark.parametrize(("rounding", "moments"), KINDS)
def test_state_in_host_memory_changes_nothing(rounding: Any, moments: Any) -> None:
    if moments == "8bit":
        pytest.importorskip("bitsandbytes")
    options = {"rounding": rounding, "moments": moments, "chunk_size": 1 << 16}
    here, _ = train("cuda", torch.bfloat16, **options)
    brought, optimizer = train("cuda", torch.bfloat16, state_device="cpu", **options)
    assert torch.equal(here, brought)
    for state in optimizer.state_dict()["state"].values():
        for key, value in state.items():
            if key != "step" and moments != "factored":
                assert value.device.type == "cpu"
                assert value.is_pinned()


@pytest.mark.parametrize(("rounding", "moments"), KINDS)
def test_weights_are_near_those_of_the_cpu(rounding: Any, moments: Any) -> None:
    if moments == "8bit":
        pytest.importorskip("bitsandbytes")
    options = {"rounding": rounding, "moments": moments, "chunk_size": 1 << 16}
    on_cuda, _ = train("cuda", torch.bfloat16, **options)
    on_cpu, _ = train("cpu", torch.bfloat16, **options)
    differs = (on_cuda != on_cpu).float().mean()
    assert differs < 0.01  # the kernels differ in the last bit, which seldom decides a rounding


@pytest.mark.parametrize("moments", ["fp32", "bf16", "8bit"])
def test_one_kernel_makes_the_update(moments: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if moments == "8bit":
        pytest.importorskip("bitsandbytes")
    chunks = []
    monkeypatch.setattr(adamw, "update_chunk", lambda *args: chunks.append(update_chunk(*args)))
    train("cuda", torch.bfloat16, moments=moments, chunk_size=1 << 18)
    assert len(chunks) == 5 * 4


def train_small(device: str, *, is_group_each: bool = False, **options: Any) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    sizes = [64, 4096, 5000, 16 * 1024] * 16
    weights = [nn.Parameter(torch.randn(size, generator=random).to(device, torch.bfloat16)) for size in sizes]
    groups: Any = [{"params": [weight]} for weight in weights] if is_group_each else weights
    optimizer = AdamW(groups, lr=1e-3, **options)
    for _ in range(5):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=random).to(weight)
        optimizer.step()
    return [weight.detach().cpu() for weight in weights]


@pytest.mark.parametrize(
    ("rounding", "moments", "launches"),
    [("exact", "fp32", 1), ("stochastic", "bf16", 1), ("nearest", "fp32", 1), ("exact", "8bit", 2)],
)
def test_small_parameters_share_a_launch(
    rounding: Any, moments: Any, launches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if moments == "8bit":  # parameters below 4096 elements keep float32 moments: a second launch
        pytest.importorskip("bitsandbytes")
    options = {"rounding": rounding, "moments": moments}
    counted = []
    monkeypatch.setattr(adamw, "update_together", lambda *args: counted.append(update_together(*args)))
    on_cuda = train_small("cuda", **options)
    assert len(counted) == 5 * launches
    one_each = train_small("cuda", is_group_each=True, **options)
    assert len(counted) == 5 * (launches + 64)
    assert all(torch.equal(a, b) for a, b in zip(on_cuda, one_each, strict=True))
    differs = (torch.cat(on_cuda) != torch.cat(train_small("cpu", **options))).float().mean()
    assert differs < 0.01  # as above


def test_a_cuda_graph_repeats_the_update_of_small_parameters() -> None:
    def make() -> tuple[list[nn.Parameter], AdamW]:
        weights = [nn.Parameter(torch.ones(size, dtype=torch.bfloat16, device="cuda")) for size in (300, 500)]
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer = AdamW(weights, lr=1e-2)
        optimizer.step()
        return weights, optimizer

    want, optimizer = make()
    optimizer.step()
    optimizer.step()
    weights, recorded = make()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded.step()
    graph.replay()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(weights, want, strict=True))


@pytest.mark.parametrize("rounding", ["exact", "stochastic", "nearest"])
def test_nan_stays_nan_without_the_kernel(rounding: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "can_update", lambda group, p: False)
    weight = nn.Parameter(torch.ones(8, dtype=torch.bfloat16, device="cuda"))
    weight.grad = torch.full_like(weight, torch.nan)
    AdamW([weight], rounding=rounding).step()
    assert weight.isnan().all()


def test_float32_is_torchs_fused_adamw() -> None:
    mine, _ = train("cuda", torch.float32, weight_decay=0.01)
    weight = nn.Parameter(torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0)).cuda())
    optimizer = torch.optim.AdamW([weight], lr=1e-3, weight_decay=0.01, fused=True)
    for step in range(5):
        weight.grad = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(step + 1)).cuda()
        optimizer.step()
    assert torch.equal(mine, weight.detach().cpu())


def test_temporary_memory_is_that_of_chunks() -> None:
    weight = nn.Parameter(torch.ones(1 << 24, dtype=torch.bfloat16, device="cuda"))
    optimizer = AdamW([weight], chunk_size=1 << 16)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    assert torch.cuda.max_memory_allocated() - before < 64 * (1 << 16)
