"""The kernel for GPUs against the chain that it stands for, in Triton's interpreter where there is no GPU."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lisatune import AdamW
from lisatune.optim import adamw, codecs

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Torch's kernel on CUDA takes 1 - beta2 in float32: 1.3e-5 off. That on the CPU takes it in double, as ours.
RELATIVE, OTHERS = (2e-5, 0.05) if DEVICE == "cuda" else (1e-5, 0.01)
ROUNDINGS = ("exact", "stochastic", "nearest")
MOMENTS = ("fp32", "bf16", "8bit")
SIZES = (1, 255, 257, 5000)
CASES = [
    *((torch.bfloat16, *kind) for kind in itertools.product(ROUNDINGS, MOMENTS, SIZES)),
    *((torch.float32, "exact", "bf16", size) for size in SIZES),
    (torch.float32, "exact", "8bit", 5000),  # smaller ones have moments in float32, and torch's kernel
]


@pytest.fixture(autouse=True)
def _bitsandbytes(request: pytest.FixtureRequest) -> None:
    if "8bit" in request.node.name:
        pytest.importorskip("bitsandbytes")


def train(
    patch: pytest.MonkeyPatch, kernel: bool, start: Tensor, gradients: list[Tensor], **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Make a step with each gradient; return the weight and its state."""
    used = []

    def can_update(group: dict[str, Any], p: Tensor) -> bool:
        used.append(kernel)
        return kernel

    patch.setattr(adamw, "can_update", can_update)
    weight = nn.Parameter(start.clone().to(DEVICE))
    optimizer = AdamW([weight], chunk_size=2048, **{"lr": 1e-2, "weight_decay": 0.1, **options})
    for gradient in gradients:
        weight.grad = gradient.to(DEVICE, weight.dtype)
        optimizer.step()
    assert used, "neither was taken"
    return weight.detach().cpu(), {name: value.cpu() for name, value in optimizer.state[weight].items()}


def make_gradients(size: int, steps: int = 4) -> list[Tensor]:
    """Random, of very different sizes; the first 512 of the first step are zero."""
    gradients = [torch.randn(size) * 10.0 ** (step % 3 - 2) for step in range(steps)]
    gradients[0][:512] = 0
    return gradients


@pytest.mark.parametrize(("dtype", "rounding", "moments", "size"), CASES)
def test_kernel_does_what_the_chain_does(
    dtype: torch.dtype, rounding: Any, moments: Any, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, gradients = torch.randn(size).to(dtype), make_gradients(size)
    options = {"rounding": rounding, "moments": moments, "seed": 3}
    mine, state = train(monkeypatch, True, start, gradients, **options)
    chain, want = train(monkeypatch, False, start, gradients, **options)
    assert not torch.equal(mine, start)
    # An update that differs in its last bit seldom decides a rounding.
    differs = (mine - chain).abs() > 1e-6 * chain.abs()
    assert differs.float().mean() < OTHERS
    torch.testing.assert_close(mine, chain, rtol=2**-7, atol=5 * RELATIVE)
    assert state.keys() == want.keys()
    for name, value in state.items():
        if value.dtype in (torch.uint8, torch.bfloat16):
            assert (value != want[name]).float().mean() < OTHERS
        elif name == "remainder":
            joined = [torch.empty(size), torch.empty(size)]
            codecs.join_remainder(mine, value, joined[0])
            codecs.join_remainder(chain, want[name], joined[1])
            torch.testing.assert_close(*joined, rtol=RELATIVE / 10, atol=RELATIVE / 1000)
        else:
            atol = 1e-7 * float(want[name].abs().max())
            torch.testing.assert_close(value, want[name], rtol=RELATIVE, atol=atol)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_what_is_no_number_stays_none_and_infinity_is_the_largest_number(
    rounding: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = torch.tensor([1.0, 3.38e38, -3.38e38]).to(torch.bfloat16)
    steps = [torch.tensor([torch.nan, -1.0, 1.0])]
    for kernel in (True, False):
        options = {"rounding": rounding, "moments": "bf16", "lr": 1e38, "weight_decay": 0.0}
        weight, _ = train(monkeypatch, kernel, start, steps, **options)
        assert weight[0].isnan()
        largest = torch.inf if rounding == "nearest" else codecs.LARGEST_BF16
        assert weight[1:].tolist() == [largest, -largest]


def test_lr_may_be_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    start, gradients = torch.randn(300).to(torch.bfloat16), make_gradients(300)
    weight, _ = train(monkeypatch, True, start, gradients)
    monkeypatch.setattr(adamw, "can_update", lambda group, p: True)
    other = nn.Parameter(start.clone().to(DEVICE))
    optimizer = AdamW([other], lr=torch.tensor(1e-2), weight_decay=0.1, chunk_size=2048)
    for gradient in gradients:
        other.grad = gradient.to(DEVICE, other.dtype)
        optimizer.step()
    assert torch.equal(weight, other.detach().cpu())
