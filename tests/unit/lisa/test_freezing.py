"""FreezeOut: when each block freezes, and how its learning rate falls until then."""

import itertools
import math

import pytest
import torch

import tiny
from lisatune import LISA, find_layers, param_groups
from lisatune.lisa.freezing import FreezeOut

STEPS, BLOCKS = 200, 6


def paper(block: int, step: int, lr: float, *, start: float, cubic: bool, scaled: bool) -> float:
    """Equation 1 and section 2, for layer i = block + 1 of L = N + 1."""
    t_i = start + (1 - start) * (block + 1) / (BLOCKS + 1)
    t_i = t_i**3 if cubic else t_i
    t = step / STEPS
    if t >= t_i:
        return 0.0
    return 0.5 * (lr / t_i if scaled else lr) * (1 + math.cos(math.pi * t / t_i))


@pytest.mark.parametrize("cubic", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_rates_times_the_cosine_of_the_run_are_the_papers(cubic: bool, scaled: bool) -> None:
    sampler = FreezeOut(BLOCKS, STEPS, 10, 0.5, cubic, scaled)
    for step in range(STEPS):
        head = 0.5 * 3e-4 * (1 + math.cos(math.pi * step / STEPS))
        expected = [paper(b, step, 3e-4, start=0.5, cubic=cubic, scaled=scaled) for b in range(BLOCKS)]
        assert [head * rate for rate in sampler.rates(step)] == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_scaled_blocks_all_go_as_far() -> None:
    sampler = FreezeOut(BLOCKS, 5000, 1)
    heads = [0.5 * (1 + math.cos(math.pi * step / 5000)) for step in range(5000)]
    totals = [
        sum(h * r[b] for h, r in zip(heads, map(sampler.rates, range(5000)), strict=True)) for b in range(6)
    ]
    assert totals == pytest.approx([2500] * 6, rel=1e-3)


def test_blocks_freeze_from_below_and_never_thaw() -> None:
    sampler = FreezeOut(BLOCKS, STEPS, 10)
    draws = [sampler.draw(period, seed=0) for period in range(STEPS // 10)]
    assert draws[0] == tuple(range(BLOCKS))
    for before, after in itertools.pairwise(draws):
        assert set(after) <= set(before)
        assert after == tuple(range(BLOCKS - len(after), BLOCKS))
    assert draws[-1] == (), "the head alone trains at the end"
    assert sampler.until(0) == pytest.approx((0.8 + 0.2 / 7) ** 3)
    assert sampler.inclusion()[0] < sampler.inclusion()[5] < 1


def test_a_step_takes_the_rates_of_its_time_and_the_groups_keep_theirs() -> None:
    model = tiny.llama()
    groups = param_groups(model, find_layers(model))
    optimizer = torch.optim.SGD(groups, lr=0.1)
    sampler = FreezeOut(BLOCKS, 12, 2, 0.5)
    seen: list[list[float]] = []
    with LISA(model, optimizer, period=2, sampler=sampler, ends="head", lr_scaling="none") as lisa:
        optimizer.register_step_pre_hook(
            lambda o, *_: seen.append([g["lr"] for g in o.param_groups if g["layer"] != "ends"])
        )
        for step in range(12):
            tiny.fit(model, optimizer, range(step, step + 1))
            assert {group["lr"] for group in optimizer.param_groups} == {0.1}
        assert lisa.active_blocks == ()
        assert lisa.periods_proven == 6
    for step, rates in enumerate(seen):
        factors = sampler.rates(step)
        for block in (b for b in range(BLOCKS) if factors[b] > 0):
            assert rates[block] == pytest.approx(0.1 * factors[block])


@pytest.mark.parametrize("wrong", [{"start": 0.0}, {"start": 1.0}, {"total_steps": 0}])
def test_values_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        FreezeOut(**({"num_blocks": 4, "total_steps": 10} | wrong))  # type: ignore[arg-type]
