"""What a sampler may read of each block, against the same numbers computed slowly."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from lisatune import LISA, AdamW, Sampler, find_layers, param_groups
from lisatune.lisa.statistics import BlockStatistics
from toy_members import LargestGradient

PERIOD, STEPS = 3, 9


class Recording(LargestGradient):
    """Keeps what it was given."""

    def draw(self, period: int, *, seed: int, statistics: BlockStatistics) -> tuple[int, ...]:
        given.append(statistics)
        return super().draw(period, seed=seed, statistics=statistics)


given: list[BlockStatistics] = []


def norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float((each.detach().double() ** 2).sum()) for each in tensors))


def build(**options: Any) -> tuple[torch.nn.Module, torch.optim.Optimizer, LISA]:
    model = tiny.llama()
    optimizer = torch.optim.AdamW(param_groups(model, find_layers(model)), lr=1e-2)
    return model, optimizer, LISA(model, optimizer, period=PERIOD, **options)


def test_norms_are_those_of_the_last_period_of_a_block() -> None:
    given.clear()
    model, optimizer, lisa = build(sampler=Recording(6, 2))
    blocks = [list(block.values()) for block in find_layers(model).block_parameters(model)]
    want = {
        "weight_norm": [norm(block) for block in blocks],
        "gradient_norm": [math.nan] * 6,
        "update_norm": [math.nan] * 6,
        "visits": [0.0] * 6,
    }
    for name, values in want.items():
        torch.testing.assert_close(getattr(given[-1], name), torch.tensor(values).double(), equal_nan=True)
    for period in range(STEPS // PERIOD):
        active = lisa.active_blocks
        gradients: dict[int, list[float]] = {block: [] for block in active}
        updates: dict[int, list[float]] = {block: [] for block in active}
        for step in range(PERIOD):
            tiny.backward(model, PERIOD * period + step)
            before = {block: [p.detach().clone() for p in blocks[block]] for block in active}
            for block in active:
                gradients[block].append(norm([p.grad for p in blocks[block] if p.grad is not None]))
            optimizer.step()
            optimizer.zero_grad()
            for block in active:
                changes = [p - was for p, was in zip(blocks[block], before[block], strict=True)]
                updates[block].append(norm(changes))
        for block in active:
            want["weight_norm"][block] = norm(blocks[block])
            want["gradient_norm"][block] = math.sqrt(sum(g * g for g in gradients[block]) / PERIOD)
            want["update_norm"][block] = math.sqrt(sum(u * u for u in updates[block]) / PERIOD)
            want["visits"][block] += 1
        for name, values in want.items():
            torch.testing.assert_close(
                getattr(given[-1], name), torch.tensor(values).double(), equal_nan=True, rtol=1e-5, atol=1e-7
            )


def test_nothing_is_collected_where_no_sampler_asks() -> None:
    _, optimizer, _ = build(active=2)
    assert "statistics" not in optimizer.state_dict()["lisa"]


def test_only_what_is_read_is_collected_and_passed() -> None:
    class Visits(Sampler):
        num_blocks, active, reads = 6, 1, ("visits",)

        def draw(self, period: int, *, seed: int, statistics: BlockStatistics) -> tuple[int, ...]:  # type: ignore[override]
            assert statistics.gradient_norm is statistics.weight_norm is statistics.update_norm is None
            assert statistics.visits is not None
            return (int(statistics.visits.argmin()),)

        def inclusion(self) -> tuple[float, ...]:
            return (1 / 6,) * 6

    model, optimizer, lisa = build(sampler=Visits())
    for step in range(18):
        tiny.backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    assert lisa.visits == [1] * 6
    assert lisa.planned_visits(18) == (1,) * 6
    assert not lisa.coverage_is_exact


@pytest.mark.parametrize("stop", range(1, 8))
def test_a_state_dict_taken_at_any_step_continues_with_the_same_draws(stop: int) -> None:
    model, optimizer, lisa = build(sampler=LargestGradient(6, 2))
    drawn = []
    saved: dict[str, Any] = {}
    weights: dict[str, Tensor] = {}
    for step in range(STEPS):
        if step == stop:
            saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
        tiny.backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
        drawn.append(lisa.active_blocks)
    other, second, again = build(sampler=LargestGradient(6, 2))
    other.load_state_dict(weights)
    second.load_state_dict(saved)
    for step in range(stop, STEPS):
        tiny.backward(other, step)
        second.step()
        second.zero_grad()
        assert again.active_blocks == drawn[step]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    ours, theirs = (o.state_dict()["lisa"]["statistics"] for o in (optimizer, second))
    assert ours["steps"] == theirs["steps"]
    for name, norms in ours["norms"].items():
        torch.testing.assert_close(norms, theirs["norms"][name], rtol=0, atol=0, equal_nan=True)


def test_a_sampler_cannot_read_what_is_not_collected() -> None:
    class Unknown(LargestGradient):
        reads = ("loss",)  # type: ignore[assignment]

    with pytest.raises(ValueError, match=r"a sampler cannot read 'loss'; it can read visits, weight_norm"):
        build(sampler=Unknown(6, 2))


def test_update_in_backward_is_refused_because_gradients_are_gone() -> None:
    model = tiny.llama()
    optimizer = AdamW(param_groups(model, find_layers(model)), lr=1e-2)
    optimizer.update_in_backward()
    with pytest.raises(ValueError, match="cannot be measured with update in backward"):
        LISA(model, optimizer, sampler=LargestGradient(6, 2))


def test_numbers_that_need_no_gradient_can_be_read_with_update_in_backward() -> None:
    class Weights(LargestGradient):
        reads = ("weight_norm", "visits")

        def draw(self, period: int, *, seed: int, statistics: BlockStatistics) -> tuple[int, ...]:  # type: ignore[override]
            assert statistics.weight_norm is not None
            return (int(statistics.weight_norm.argmax()),)

    model = tiny.llama()
    optimizer = AdamW(param_groups(model, find_layers(model)), lr=1e-2)
    optimizer.update_in_backward()
    LISA(model, optimizer, sampler=Weights(6, 1))


def test_the_last_draw_is_kept_so_that_warm_up_knows_what_thawed() -> None:
    model, optimizer, lisa = build(sampler=LargestGradient(6, 2), warmup=1)
    for step in range(PERIOD):
        tiny.backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    assert (lisa.previous_blocks, lisa.active_blocks) == ((0, 1), (2, 3))
    assert optimizer.state_dict()["lisa"]["previous_blocks"] == [0, 1]
