"""AdamW over the rows that a step reads: equal to AdamW with a parameter for each row, whatever it stores."""

import io
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from lisatune import AdamW

VOCABULARY, WIDTH = 40, 32


class Twin:
    """Lazy AdamW done plainly: a dense matrix, every row with its own moments and its own count of steps.

    `rows` is the longest that the table may get; what it forgets starts anew.
    """

    def __init__(self, weight: Tensor, **options: float) -> None:
        self.weight = weight.detach().clone()
        self.options = options
        self.m, self.v = torch.zeros_like(self.weight), torch.zeros_like(self.weight)
        self.steps = torch.zeros(len(weight), 1, dtype=torch.float64)
        self.used = [0] * len(weight)
        self.rows = self.now = 0

    def step(self, gradient: Tensor, ids: Sequence[int]) -> None:
        self.now += 1
        self.rows = max(self.rows, min(len(ids), len(self.weight)))
        here = torch.zeros(len(self.weight), 1, dtype=torch.bool)
        here[sorted(set(ids))] = True
        lr, decay, eps = (self.options[name] for name in ("lr", "weight_decay", "eps"))
        beta1, beta2 = 0.9, 0.999
        self.steps = torch.where(here, self.steps + 1, self.steps)
        self.m = torch.where(here, self.m.lerp(gradient, 1 - beta1), self.m)
        self.v = torch.where(here, (self.v * beta2).addcmul(gradient, gradient, value=1 - beta2), self.v)
        size = (lr / (1 - beta1**self.steps)).float()
        spread = (1 - beta2**self.steps).sqrt().float()
        moved = self.weight * (1 - lr * decay) - self.m * size / (self.v.sqrt() / spread + eps)
        self.weight = torch.where(here, moved, self.weight)
        self._forget(set(ids))

    def _forget(self, ids: set[int]) -> None:
        for row in ids:
            self.used[row] = self.now
        kept = sorted((row for row in range(len(self.weight)) if self.steps[row]), key=lambda r: self.used[r])
        for row in kept[: max(len(kept) - self.rows, 0)]:
            self.steps[row] = self.m[row] = self.v[row] = self.used[row] = 0


def embedding(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Embedding:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Embedding(VOCABULARY, WIDTH, sparse=True).to(dtype)


def backward(module: nn.Embedding, ids: Sequence[int], step: int) -> Tensor:
    """Leave the gradient of a loss in the weight; return the same densely."""
    factor = torch.randn(len(ids), WIDTH, generator=torch.Generator().manual_seed(step))
    (module(torch.tensor(ids)) * factor.to(module.weight.dtype)).sum().backward()
    assert module.weight.grad is not None
    return module.weight.grad.to_dense()


def ids_of(step: int, count: int) -> list[int]:
    """Ids as text has them: a few come often, most seldom."""
    chances = 1 / torch.arange(1, VOCABULARY + 1).float()
    return torch.multinomial(
        chances, count, replacement=True, generator=torch.Generator().manual_seed(step)
    ).tolist()


@pytest.mark.parametrize("counts", [(30,), (6, 14, 3), (100,)], ids=["alike", "longer and shorter", "all"])
@pytest.mark.parametrize("chunk_size", [None, 256])
def test_rows_move_as_in_lazy_adamw_bit_for_bit(counts: tuple[int, ...], chunk_size: int | None) -> None:
    module = embedding()
    options = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-8}
    twin = Twin(module.weight, **options)
    optimizer = AdamW(module.parameters(), rows=True, chunk_size=chunk_size, **options)
    for step in range(12):
        ids = ids_of(step, counts[step % len(counts)])
        gradient = backward(module, ids, step)
        optimizer.step()
        optimizer.zero_grad()
        twin.step(gradient, ids)
        assert torch.equal(module.weight.detach(), twin.weight), f"step {step}"
        assert len(optimizer.state[module.weight]["exp_avg"]) == twin.rows <= VOCABULARY


def test_rows_that_every_step_reads_go_as_in_torchs_adamw() -> None:
    module = embedding()
    dense = nn.Parameter(module.weight.detach().clone())
    options = {"lr": 1e-2, "weight_decay": 0.1}
    optimizer, twin = AdamW(module.parameters(), rows=True, **options), torch.optim.AdamW([dense], **options)
    for step in range(8):
        dense.grad = backward(module, [*range(VOCABULARY), 3, 3], step)
        optimizer.step()
        optimizer.zero_grad()
        twin.step()
    torch.testing.assert_close(
        module.weight.detach(), dense.detach(), rtol=0, atol=1e-6
    )  # of 8 steps of 1e-2


def test_micro_steps_are_merged_as_they_come_and_make_one_step() -> None:
    module, whole = embedding(), embedding()
    optimizer, twin = (AdamW(each.parameters(), lr=1e-2, rows=True) for each in (module, whole))
    halves = ids_of(0, 12), ids_of(1, 12)
    for i, ids in enumerate(halves):
        backward(module, ids, i)
        assert module.weight.grad is not None
        assert module.weight.grad.is_coalesced()
    assert module.weight.grad._nnz() == len({*halves[0], *halves[1]})
    first = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(0))
    second = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(1))
    (whole(torch.tensor(halves[0] + halves[1])) * torch.cat([first, second])).sum().backward()
    optimizer.step()
    twin.step()
    torch.testing.assert_close(module.weight, whole.weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("at", [1, 5, 8])
def test_resume_is_bit_equal(at: int) -> None:
    def run(module: nn.Embedding, optimizer: AdamW, steps: range) -> None:
        for step in steps:
            backward(module, ids_of(step, 20), step)
            optimizer.step()
            optimizer.zero_grad()

    def start(dtype: torch.dtype, seed: int) -> tuple[nn.Embedding, AdamW]:
        module = embedding(dtype, seed)
        return module, AdamW(module.parameters(), lr=1e-2, rows=True, rounding="stochastic")

    for dtype in (torch.float32, torch.bfloat16):
        straight = start(dtype, 0)
        run(*straight, range(at))
        file = io.BytesIO()
        torch.save([each.state_dict() for each in straight], file)
        run(*straight, range(at, 10))
        file.seek(0)
        resumed = start(dtype, 1)
        for each, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
            each.load_state_dict(state)
        run(*resumed, range(at, 10))
        assert torch.equal(straight[0].weight, resumed[0].weight)
        states = (optimizer.state[module.weight] for module, optimizer in (straight, resumed))
        one, other = states
        assert {key: value.dtype for key, value in one.items()} == {key: v.dtype for key, v in other.items()}
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_bf16_rows_are_right_on_average_and_never_stand_still() -> None:
    """1000 steps of 1e-5 from 1: to nearest, spacing 2^-8 below 1, not one would show."""
    module = embedding(torch.bfloat16)
    nn.init.ones_(module.weight)
    optimizer = AdamW(module.parameters(), lr=1e-5, rows=True, rounding="stochastic", weight_decay=0)
    for _ in range(1000):
        module(torch.arange(VOCABULARY // 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved, rested = module.weight.detach().float().split(VOCABULARY // 2)
    assert torch.all(rested == 1)
    # Of 640 weights, each 2^-8 lower with a chance of 2.56: the mean is right to 0.0039 * sqrt(2.56 / 640).
    assert 1 - moved.mean().item() == pytest.approx(1e-2, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"moments": "8bit"}, "rows: True has moments fp32, got '8bit'"),
        ({"state_device": "cpu"}, "rows: True has state_device None, got 'cpu'"),
        ({"rounding": "exact"}, "the remainder would be as large as"),
    ],
)
def test_state_as_large_as_the_weight_is_refused(options: dict[str, str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        AdamW(embedding(torch.bfloat16).parameters(), **{"rows": True, "rounding": "stochastic", **options})


def test_gradients_of_the_other_kind_are_refused() -> None:
    module = embedding()
    backward(module, [1, 2], 0)
    with pytest.raises(ValueError, match="sparse gradient only in a param group with rows: True"):
        AdamW(module.parameters()).step()
    module.weight.grad = torch.ones_like(module.weight)
    with pytest.raises(ValueError, match="takes sparse gradients, and got a dense one"):
        AdamW(module.parameters(), rows=True).step()
    with pytest.raises(ValueError, match=r"one of \[32\]"):
        AdamW(nn.LayerNorm(32).parameters(), rows=True)
