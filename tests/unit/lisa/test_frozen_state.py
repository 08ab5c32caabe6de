"""State of frozen blocks: what an optimizer says must last is neither released nor rounded."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.optimization import Adafactor

import tiny
from lisatune import LISA, AdamW
from lisatune.lisa.frozen_state import FrozenState, HostState
from lisatune.optim.meter import tensors_bytes

POLICIES = ("drop", "reset", "second_moment", "cpu", "keep")


class SplitSGD(Optimizer):
    """SGD on bf16 weights that are the upper half of fp32 weights; the lower half is the remainder.

    The momentum is written and not read, so that policies may differ in it without any effect.
    """

    lasting_state = ("remainder",)

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "remainder" not in state:
                    state["remainder"] = torch.zeros_like(p, dtype=torch.int16)
                exact = join(p, state["remainder"]) - group["lr"] * p.grad.float()
                upper, lower = split(exact)
                p.copy_(upper)
                state["remainder"].copy_(lower)
                state["momentum"] = p.grad.float()


def split(exact: Tensor) -> tuple[Tensor, Tensor]:
    """Cut fp32 numbers into the bf16 numbers below them (towards zero) and 16 bits."""
    halves = exact.contiguous().view(torch.int16).reshape(*exact.shape, 2)
    return halves[..., 1].contiguous().view(torch.bfloat16), halves[..., 0].contiguous()


def join(upper: Tensor, lower: Tensor) -> Tensor:
    halves = torch.stack([lower, upper.contiguous().view(torch.int16)], dim=-1)
    return halves.reshape(-1).view(torch.float32).reshape(upper.shape)


def attach(model: nn.Module, **options: Any) -> tuple[Optimizer, LISA]:
    optimizer = SplitSGD(model.parameters())
    return optimizer, LISA(model, optimizer, **{"active": 2, "period": 3, "sampler": "uniform", **options})


def exact_weights(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    state = optimizer.state_dict()["state"]
    lower = [state.get(i, {}).get("remainder") for i, _ in enumerate(model.parameters())]
    return [
        p.detach().float() if rest is None else join(p.detach(), rest)
        for p, rest in zip(model.parameters(), lower, strict=True)
    ]


@pytest.fixture
def model() -> nn.Module:
    return tiny.llama(tied=True).bfloat16()


@pytest.mark.parametrize("state", ["drop", "reset", "cpu"])
def test_lasting_state_outlives_every_freeze(model: nn.Module, state: str) -> None:
    twin = copy.deepcopy(model)
    optimizer, _ = attach(model, state=state)
    other, _ = attach(twin, state="keep")
    tiny.fit(model, optimizer, 14)
    tiny.fit(twin, other, 14)
    tiny.assert_same_weights(model, twin)
    for mine, theirs in zip(exact_weights(model, optimizer), exact_weights(twin, other), strict=True):
        assert torch.equal(mine, theirs)
    assert any((entry["remainder"] != 0).any() for entry in optimizer.state_dict()["state"].values())


@pytest.mark.parametrize("state", ["drop", "reset"])
def test_all_other_state_is_released_and_lasting_state_leaves_the_device(
    model: nn.Module, state: str
) -> None:
    optimizer, lisa = attach(model, state=state)
    tiny.fit(model, optimizer, 8)
    trained = lisa.trainable_parameters()
    assert set(optimizer.state) == set(trained)
    assert lisa.state_bytes() == sum((2 + 4) * p.numel() for p in trained)
    entries = optimizer.state_dict()["state"]
    frozen = [i for i, p in enumerate(model.parameters()) if p not in set(trained) and i in entries]
    assert frozen
    assert all(set(entries[i]) == {"remainder"} for i in frozen)


def test_reset_leaves_lasting_state_where_it_is(model: nn.Module) -> None:
    optimizer, lisa = attach(model, state="reset", active=4)
    tiny.fit(model, optimizer, 3)  # has just drawn
    ends = lisa.layers.end_parameters(model).values()
    assert all(set(optimizer.state[p]) == {"remainder"} for p in ends)
    assert all(set(entry) == {"remainder"} for entry in optimizer.state.values())


@pytest.mark.parametrize(("state", "step"), [("drop", 2), ("drop", 3), *((state, 7) for state in POLICIES)])
def test_resume_keeps_every_remainder(state: str, step: int) -> None:
    model = tiny.llama(tied=True).bfloat16()
    optimizer, _ = attach(model, state=state)
    tiny.fit(model, optimizer, step)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    resumed = tiny.llama(tied=True, seed=1).bfloat16()
    other, _ = attach(resumed, state=state)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    before = copy.deepcopy(saved[1]["state"])
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    for each, its_optimizer in ((model, optimizer), (resumed, other)):
        tiny.fit(each, its_optimizer, range(step, 14))
    tiny.assert_same_weights(resumed, model)
    for mine, theirs in zip(exact_weights(resumed, other), exact_weights(model, optimizer), strict=True):
        assert torch.equal(mine, theirs)
    for index, entry in before.items():
        assert all(torch.equal(saved[1]["state"][index][key], value) for key, value in entry.items())


@pytest.mark.parametrize("state", POLICIES)
def test_detach_gives_lasting_state_of_frozen_blocks_back(model: nn.Module, state: str) -> None:
    optimizer, lisa = attach(model, state=state)
    tiny.fit(model, optimizer, 10)
    before = exact_weights(model, optimizer)
    lisa.detach()
    for mine, theirs in zip(exact_weights(model, optimizer), before, strict=True):
        assert torch.equal(mine, theirs)
    ever = {i for i, visits in enumerate(lisa.visits) if visits}
    held = {p for i in ever for p in lisa.layers.block_parameters(model)[i].values()}
    assert set(optimizer.state) == held | set(lisa.layers.end_parameters(model).values())
    tiny.fit(model, optimizer, range(10, 12))  # as full fine-tuning


@pytest.mark.parametrize("state", ["drop", "reset", "cpu"])
def test_adamw_with_exact_weights_keeps_their_remainders(model: nn.Module, state: str) -> None:
    optimizer = AdamW(model.parameters(), lr=1e-3)
    lisa = LISA(model, optimizer, period=2, state=state, ends="every:2", verify="full")
    before: dict[nn.Parameter, Tensor] = {}
    trained = set(lisa.trainable_parameters())
    rested = 0

    def after(step: int) -> None:
        nonlocal trained, rested
        entries = optimizer.state_dict()["state"]
        for i, p in enumerate(model.parameters()):
            remainder = entries.get(i, {}).get("remainder")
            if p in before and p not in trained:
                assert torch.equal(remainder, before[p])
                rested += 1
            if remainder is not None:
                before[p] = remainder.clone()
        trained = set(lisa.trainable_parameters())

    tiny.fit(model, optimizer, 12, after=after)
    assert len(before) == len(list(model.parameters()))
    assert rested > 100
    assert all(bool(remainder.any()) for remainder in before.values() if remainder.ndim > 1)


def test_optimizers_without_lasting_state_keep_nothing(untied_llama: nn.Module) -> None:
    optimizer = torch.optim.AdamW(untied_llama.parameters())
    lisa = LISA(untied_llama, optimizer, period=3)
    tiny.fit(untied_llama, optimizer, 8)
    assert len(optimizer.state_dict()["state"]) == len(lisa.trainable_parameters())
    lisa.detach()
    assert len(optimizer.state) == len(optimizer.state_dict()["state"]) < len(list(untied_llama.parameters()))


@pytest.mark.parametrize("moments", [None, "fp32", "bf16", "8bit"])  # None: torch's AdamW
def test_second_moments_are_inherited_and_first_ones_start_at_zero(moments: str | None) -> None:
    model = tiny.llama(hidden=64)  # matrices of 4096 elements and more: 8-bit moments of fewer are float32
    optimizer: Optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    if moments is not None:
        optimizer = AdamW(model.parameters(), moments=moments)
    tiny.fit(model, optimizer, 3)
    frozen = FrozenState(optimizer, "second_moment")
    p = model.model.layers[0].mlp.up_proj.weight
    before = dict(optimizer.state[p])
    frozen.freeze(p)
    assert p not in optimizer.state
    assert frozen.nbytes() == tensors_bytes(v for k, v in before.items() if k == "step" or "exp_avg_sq" in k)
    frozen.thaw(p)
    after = optimizer.state[p]
    assert all(torch.equal(after[key], before[key]) for key in before if "exp_avg_sq" in key)
    assert float(after["step"]) == 3
    tiny.backward(model, 3)
    optimizer.step()
    assert float(after["step"]) == 4
    assert p.grad is not None
    if moments in (None, "fp32"):  # of no gradient but the last
        torch.testing.assert_close(after["exp_avg"], 0.1 * p.grad)
    assert after.keys() == before.keys()


@pytest.mark.parametrize(
    ("build", "inherited"),
    [
        (lambda p: torch.optim.AdamW(p, amsgrad=True), {"exp_avg_sq", "max_exp_avg_sq"}),
        (torch.optim.NAdam, {"exp_avg_sq", "mu_product"}),
        (lambda p: Adafactor(p, lr=1e-3, relative_step=False), {"exp_avg_sq_row", "exp_avg_sq_col", "RMS"}),
        (lambda p: Adafactor(p, lr=1e-3, relative_step=False, beta1=0.9), set()),  # would miss its exp_avg
    ],
    ids=["amsgrad", "nadam", "adafactor", "adafactor-beta1"],
)
def test_relatives_of_adam_find_all_state_that_they_look_for(
    build: Callable[[Any], Optimizer], inherited: set[str]
) -> None:
    model = tiny.llama()
    optimizer = build(model.parameters())
    lisa = LISA(model, optimizer, period=1, state="second_moment", verify="full")
    tiny.fit(model, optimizer, 7)
    frozen = next(i for i in range(6) if i not in lisa.active_blocks and lisa.visits[i])
    names = [name for name, _ in model.named_parameters()]
    kept = optimizer.state_dict()["state"].get(names.index(f"model.layers.{frozen}.mlp.up_proj.weight"), {})
    assert kept.keys() - {"step"} == inherited
    assert lisa.periods_proven == 7


def test_an_optimizer_without_second_moments_inherits_nothing(untied_llama: nn.Module) -> None:
    optimizer = torch.optim.SGD(untied_llama.parameters(), lr=1e-2, momentum=0.9)
    lisa = LISA(untied_llama, optimizer, period=2, state="second_moment")
    tiny.fit(untied_llama, optimizer, 5)
    assert lisa.host_bytes() == 0


def test_host_state_gives_back_what_it_took() -> None:
    host, parameter = HostState(), nn.Parameter(torch.zeros(2))
    state = {"step": torch.tensor(3.0), "exp_avg": torch.ones(2), "note": "kept"}
    host.put(parameter, state)
    assert host.nbytes() == 4 + 8
    assert host.get(parameter) == state
    taken = host.take(parameter)
    assert taken is not None
    assert taken == state
    assert taken is not state
    assert host.take(parameter) is None
    assert host.get(parameter) is None
    assert host.nbytes() == 0


def test_host_state_moves_every_tensor_back_to_its_own_device() -> None:
    host, parameter = HostState(), nn.Parameter(torch.zeros(2, device="meta"))
    host.put(parameter, {"step": torch.tensor(3.0)})
    taken = host.take(parameter)
    assert taken is not None
    assert taken["step"].device.type == "cpu"


def test_host_state_forgets() -> None:
    host, parameter = HostState(), nn.Parameter(torch.zeros(2))
    host.put(parameter, {"exp_avg": torch.ones(2)})
    host.clear()
    assert host.take(parameter) is None
