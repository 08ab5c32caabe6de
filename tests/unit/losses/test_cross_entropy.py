"""Loss and gradients are those of plain cross-entropy over the full logits."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy

from lisatune.losses import cross_entropy as module
from lisatune.losses.cross_entropy import TokenChunks, VocabularySlices, linear_cross_entropy

N, H, V = 37, 16, 901
"""Chunks of 9 tokens and slices of 300 rows leave one over."""


def cap(logits: Tensor) -> Tensor:
    return torch.tanh(logits * 0.5 / 3) * 3


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, V, (N,), generator=rng)


def token_chunks(hidden: Tensor, weight: Tensor, target: Tensor, transform: object) -> Tensor:
    return TokenChunks.apply(hidden, weight, target, 9, transform, hidden.dtype)


def vocabulary_slices(hidden: Tensor, weight: Tensor, target: Tensor, transform: object) -> Tensor:
    return VocabularySlices.apply(hidden, weight, target, transform, hidden.dtype).sum()


def results(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    """The loss and its gradients, under a factor as the mean has."""
    return [loss.detach(), *torch.autograd.grad(loss * 0.37, leaves)]


ORDERS = pytest.mark.parametrize("order", [token_chunks, vocabulary_slices])


@pytest.fixture(autouse=True)
def _several_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of 300 rows, and pieces of 128."""
    monkeypatch.setattr(module, "SLICE_ELEMENTS", 300 * N)
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 128)


@ORDERS
@pytest.mark.parametrize("transform", [None, cap], ids=["plain", "capped"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, 1e-12),
        (torch.float32, 1e-5),
        # One rounding to 8 bits of a product that plain autograd rounds as well.
        (torch.bfloat16, 1e-2),
    ],
)
def test_loss_and_gradients_equal_full_logits(
    order: Callable[..., Tensor],
    transform: Callable[[Tensor], Tensor] | None,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    hidden, weight, target = inputs(dtype)
    logits = (hidden @ weight.T) if transform is None else transform(hidden @ weight.T)
    wide = torch.promote_types(dtype, torch.float32)
    want = results(cross_entropy(logits.to(wide), target, reduction="sum"), hidden, weight)
    got = results(order(hidden, weight, target, transform), hidden, weight)
    assert got[0].dtype == wide
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@ORDERS
@pytest.mark.parametrize("frozen", [0, 1], ids=["hidden", "head"])
def test_what_is_frozen_gets_no_gradient_and_the_other_the_same(
    order: Callable[..., Tensor], frozen: int
) -> None:
    leaves = inputs()[:2]
    target = inputs()[2]
    want = results(order(*leaves, target, None), *leaves)
    leaves[frozen].requires_grad_(False)
    got = results(order(*leaves, target, None), leaves[1 - frozen])
    torch.testing.assert_close(got, [want[0], want[2 - frozen]], rtol=0, atol=0)


@ORDERS
def test_no_position_gives_a_zero_with_zero_gradients(order: Callable[..., Tensor]) -> None:
    hidden, weight, target = inputs()
    loss, *grads = results(order(hidden[:0], weight, target[:0], None), weight)
    assert loss == 0
    assert not grads[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_follows_from_the_dtype_of_a_head_that_trains(dtype: torch.dtype) -> None:
    hidden, weight, target = inputs(dtype)
    made_by = linear_cross_entropy(hidden, weight, target).grad_fn
    if dtype == torch.bfloat16:  # each token's loss, then their sum
        made_by = made_by.next_functions[0][0]
    expected = "TokenChunks" if dtype == torch.float32 else "VocabularySlices"
    assert expected in type(made_by).__name__
    loss = linear_cross_entropy(hidden, weight.detach(), target)
    assert "TokenChunks" in type(loss.grad_fn).__name__
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, target), loss, rtol=1e-6, atol=0)


def test_autocast_computes_products_in_bf16_and_gradients_in_float32() -> None:
    hidden, weight, target = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = results(cross_entropy((hidden @ weight.T).float(), target, reduction="sum"), hidden, weight)
        got = results(linear_cross_entropy(hidden, weight, target, chunk_size=8), hidden, weight)
    assert {each.dtype for each in got} == {torch.float32}
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=0)  # the logits are the same bf16 numbers
    for ours, theirs in zip(got[1:], want[1:], strict=True):
        assert (ours - theirs).abs().max() <= 1e-2 * theirs.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_tokens_lose_nothing_to_bf16_sums(dtype: torch.dtype) -> None:
    """One label for all tokens: its row of the gradient is a sum of 4096 numbers of one sign."""
    hidden = torch.ones(4096, 4, dtype=dtype)
    weight = torch.zeros(500, 4, dtype=dtype, requires_grad=True)
    linear_cross_entropy(hidden, weight, torch.zeros(4096, dtype=torch.long)).backward()
    assert weight.grad[0, 0].item() == pytest.approx(-4096 * (1 - 1 / 500), rel=4e-3)


def test_a_second_backward_is_refused_in_a_sentence() -> None:
    hidden, weight, target = inputs()
    loss = linear_cross_entropy(hidden, weight, target)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="ran through this loss before; compute the loss again"):
        loss.backward()


def test_the_heads_gradient_is_handed_over_and_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, target = inputs()
    loss = linear_cross_entropy(hidden, weight, target)
    made = loss.grad_fn.gradients[1].data_ptr()
    loss.backward()
    assert weight.grad.data_ptr() == made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_tensors_can_trace_it(dtype: torch.dtype) -> None:
    with FakeTensorMode():
        hidden = torch.empty(N, H, dtype=dtype, requires_grad=True)
        weight = torch.empty(V, H, dtype=dtype, requires_grad=True)
        linear_cross_entropy(hidden, weight, torch.empty(N, dtype=torch.long)).backward()
    assert weight.grad.shape == (V, H)


@pytest.mark.parametrize("trains", [True, False])
def test_each_tokens_loss_has_a_gradient_of_its_own(trains: bool) -> None:
    hidden, weight, target = inputs()
    weight.requires_grad_(trains)
    leaves = [hidden, weight] if trains else [hidden]
    factors = torch.linspace(-1, 2, N)
    each = linear_cross_entropy(hidden, weight, target, each=True)
    want = cross_entropy(hidden @ weight.T, target, reduction="none")
    torch.testing.assert_close(each, want, rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad((each * factors).sum(), leaves)
    expected = torch.autograd.grad((want * factors).sum(), leaves)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
