"""The kernel for GPUs against the chain that it stands for, in Triton's interpreter where there is no GPU."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import lisatune.optim.state
from lisatune import AdamW
from lisatune.optim import adamw, adamw_triton, codecs

pytest.importorskip("triton")
# A block of zeros in 8 bits is 0 / 0; numpy, which computes in the interpreter, warns of that.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")

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


def train_many(
    patch: pytest.MonkeyPatch, *, together: bool, in_backward: bool = False, **options: Any
) -> Any:
    """Make two steps of parameters in two groups; return what is stored, and the chunks of each launch."""
    launches: list[int] = []

    def update_together(group: Any, chunks: Any) -> None:
        launches.append(len(chunks))
        adamw_triton.update_together(group, chunks)

    patch.setattr(adamw, "can_update", lambda group, p: True)
    patch.setattr(adamw, "update_together", update_together)
    patch.setattr(adamw_triton, "SMALL", 1200 if together else 0)
    patch.setattr(lisatune.optim.state, "SMALLEST_8BIT", 1000)
    random = torch.Generator().manual_seed(0)
    shapes = [(1,), (257,), (0,), (30, 40), (1200,), (1201,), (40, 30), (1,), (30, 40)]
    makes = [(torch.bfloat16, shape) for shape in shapes] + [(torch.float32, (2, 513))] * 2
    parameters = [
        nn.Parameter(torch.randn(shape, generator=random).to(DEVICE, dtype)) for dtype, shape in makes
    ]
    parameters[6].data = parameters[6].data.t()  # not contiguous
    second = {"params": parameters[7:], "lr": 3e-3, "weight_decay": 0.0, "betas": (0.8, 0.95), "seed": 7}
    optimizer = AdamW([{"params": parameters[:7]}, second], lr=1e-2, weight_decay=0.1, **options)
    if in_backward:
        optimizer.update_in_backward()
    for step in range(2):
        gradients = [torch.randn(p.shape, generator=random).to(p) for p in parameters]
        used = [i for i in range(len(parameters)) if (step, i) != (0, 3)]  # one counts a step less
        torch.stack([(parameters[i] * gradients[i]).sum().float() for i in used]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    stored = [[p.detach(), *(value for _, value in sorted(optimizer.state[p].items()))] for p in parameters]
    return stored, launches


@pytest.mark.parametrize(("rounding", "moments"), list(itertools.product(ROUNDINGS, MOMENTS)))
def test_small_parameters_share_a_launch_that_changes_no_number(
    rounding: Any, moments: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"rounding": rounding, "moments": moments}
    one_each, none = train_many(monkeypatch, together=False, **options)
    shared, launches = train_many(monkeypatch, together=True, **options)
    assert none == []
    # Without the empty one, the large one, the one that is not contiguous, and what torch's kernel takes.
    expected = {"fp32": [4, 2], "bf16": [4, 2, 2], "8bit": [2, 2, 1, 1, 2]}[moments]
    assert launches[-len(expected) :] == expected  # of the last step
    for mine, want in zip(shared, one_each, strict=True):
        assert len(mine) == len(want)
        assert all(torch.equal(a, b) for a, b in zip(mine, want, strict=True))


def test_updates_in_backward_and_state_in_host_memory_launch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    shared, _ = train_many(monkeypatch, together=True)
    alone, launches = train_many(monkeypatch, together=True, in_backward=True)
    assert set(launches) == {1}
    brought, none = train_many(monkeypatch, together=True, state_device="cpu")
    assert none == []
    for one, other, third in zip(shared, alone, brought, strict=True):
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(one, other, third, strict=True))


def test_kernel_starts_on_the_card_that_holds_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    current, started = [0], []

    @contextmanager
    def device_index(index: int | None) -> Iterator[None]:
        current.append(current[-1] if index is None else index)
        yield
        current.pop()

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *_, **__: started.append(current[-1])

    monkeypatch.setattr(torch.accelerator, "device_index", device_index)
    monkeypatch.setattr(adamw_triton, "_kernel", Kernel())
    with FakeTensorMode():
        for card in (1, 0):
            weight = nn.Parameter(torch.ones(300, device=f"cuda:{card}", dtype=torch.bfloat16))
            state = {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
            group = AdamW([weight], rounding="stochastic", moments="bf16").param_groups[0]
            chunk = weight, weight, state, torch.ones((), device=weight.device), 0, 0
            adamw_triton.update_together(group, [chunk])
    assert started == [1, 0]
