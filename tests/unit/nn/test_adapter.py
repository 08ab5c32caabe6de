"""One low-rank term beside a linear layer."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lisatune.nn.adapter import Adapter

X_NI = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1))


def adapted(
    dtype: torch.dtype = torch.float32, *, rank: int = 2, bias: bool = True
) -> tuple[nn.Linear, Adapter]:
    """Make a layer [4, 6] whose adapter is not zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.Linear(6, 4, bias=bias, dtype=dtype)
        adapter = Adapter(layer, rank=rank, scale=2.0, generator=torch.Generator().manual_seed(2))
        nn.init.normal_(adapter.B, std=0.1)
    return layer, adapter


def plain(layer: nn.Linear, adapter: Adapter, x: Tensor) -> Tensor:
    """Compute the same with torch's own operations."""
    weight = layer.weight + adapter.scale * (adapter.B @ adapter.A).to(layer.weight.dtype)
    return nn.functional.linear(x, weight, layer.bias)


def test_a_new_adapter_adds_nothing_and_is_named_by_its_generator() -> None:
    layer = nn.Linear(6, 4)
    before = layer(X_NI)
    adapter = Adapter(layer, rank=2, scale=2.0, generator=torch.Generator().manual_seed(2))
    assert torch.equal(layer(X_NI), before)
    assert torch.equal(adapter.A, adapted()[1].A)
    assert float(adapter.A.detach().abs().max()) <= 6**-0.5
    assert {name for name, _ in layer.named_parameters()} == {"weight", "bias"}


def test_output_and_gradients_are_those_of_the_merged_weight() -> None:
    layer, adapter = adapted(torch.float64)
    layer.requires_grad_(False)
    x = X_NI.double().requires_grad_()
    inputs = [x, adapter.A, adapter.B]
    got = torch.autograd.grad(layer(x).square().sum(), inputs)
    want = torch.autograd.grad(plain(layer, adapter, x).square().sum(), inputs)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_model_may_change_what_its_layer_returns_in_place() -> None:
    """Llama 4 adds its routed experts to what its shared expert returns."""
    layer, adapter = adapted(torch.float64)
    x = X_NI.double().requires_grad_()
    got = torch.autograd.grad(layer(x).mul_(3).square().sum(), [x, adapter.A, adapter.B])
    want = torch.autograd.grad((layer(x) * 3).square().sum(), [x, adapter.A, adapter.B])
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("trains", [True, False])
def test_backward_keeps_the_input_itself_if_the_adapter_trains_and_no_token_otherwise(trains: bool) -> None:
    layer, adapter = adapted(torch.bfloat16)
    layer.requires_grad_(False)
    for p in (adapter.A, adapter.B):
        p.requires_grad_(trains)
    kept: list[Tensor] = []
    x = X_NI.bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = layer(x)
    own = [t for t in kept if t.data_ptr() in {x.data_ptr()}]
    assert bool(own) == trains
    of_tokens = [
        t for t in kept if t.numel() >= 15 and t.data_ptr() not in {p.data_ptr() for p in layer.parameters()}
    ]
    assert all(t.data_ptr() in {x.data_ptr(), adapter.A.data_ptr(), adapter.B.data_ptr()} for t in of_tokens)
    out.sum().backward()
    assert (adapter.A.grad is not None) == trains
    assert x.grad is not None


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputing_changes_no_gradient(reentrant: bool) -> None:
    grads = []
    for recomputes in (False, True):
        layer, adapter = adapted()
        x = X_NI.clone().requires_grad_()
        out = checkpoint(layer, x, use_reentrant=reentrant) if recomputes else layer(x)
        out.square().sum().backward()
        grads.append((adapter.A.grad, adapter.B.grad, x.grad))
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


def test_autocast_computes_in_bf16_and_keeps_float32_gradients() -> None:
    layer, adapter = adapted()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(X_NI)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), plain(layer, adapter, X_NI), rtol=0.05, atol=0.02)
    out.sum().backward()
    assert adapter.A.grad is not None
    assert adapter.A.grad.dtype == torch.float32


def test_float16_is_refused_because_of_loss_scalers_but_can_be_evaluated() -> None:
    layer, _ = adapted()
    with torch.autocast("cpu", dtype=torch.float16), torch.no_grad():
        layer(X_NI)
    with (
        torch.autocast("cpu", dtype=torch.float16),
        pytest.raises(ValueError, match="cannot train in float16"),
    ):
        layer(X_NI)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_gives_the_merged_weight_rounded_once(dtype: torch.dtype) -> None:
    layer, adapter = adapted(dtype)
    base = layer.weight.detach().clone()
    exact = base.double() + 2.0 * (adapter.B.detach().double() @ adapter.A.detach().double())
    assert torch.equal(layer.state_dict()["weight"], exact.to(dtype))
    assert torch.equal(layer.weight, base)
    assert layer.state_dict(keep_vars=True)["weight"] is layer.weight
    twin = nn.Linear(6, 4, dtype=dtype)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin.weight, exact.to(dtype))
    adapter.merge()
    assert torch.equal(layer.weight, exact.to(dtype))
    assert torch.equal(layer.state_dict()["weight"], exact.to(dtype))


def test_loading_the_merged_weight_changes_nothing_and_another_one_replaces_the_sum() -> None:
    layer, adapter = adapted()
    base, up = layer.weight.detach().clone(), adapter.B.detach().clone()
    layer.load_state_dict(layer.state_dict())
    assert torch.equal(layer.weight, base)
    assert torch.equal(adapter.B, up)
    other = nn.Linear(6, 4)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(X_NI), other(X_NI))
    assert adapter.is_new


def test_a_copy_has_an_adapter_of_its_own() -> None:
    layer, adapter = adapted()
    twin = copy.deepcopy(layer)
    adapter.clear()
    assert not torch.equal(layer(X_NI), twin(X_NI))
    assert torch.equal(twin.state_dict()["weight"], adapted()[0].state_dict()["weight"])


def test_a_layer_is_as_before_when_its_adapter_is_removed() -> None:
    layer, adapter = adapted()
    adapter.remove()
    assert torch.equal(layer(X_NI), nn.functional.linear(X_NI, layer.weight, layer.bias))
    assert torch.equal(layer.state_dict()["weight"], layer.weight)
    assert set(vars(layer)) == set(vars(nn.Linear(6, 4)))
