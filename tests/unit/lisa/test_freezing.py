"""FreezeOut and AutoFreeze: when each block freezes, and how its learning rate falls until then."""

import itertools
import math
import warnings
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tiny
from lisatune import LISA, find_layers, param_groups
from lisatune.lisa.freezing import AutoFreeze, FreezeOut
from lisatune.lisa.statistics import BlockStatistics, collected_tensors
from lisatune.methods import METHODS
from lisatune.recipe import OptimizerConfig
from plans import peak_of

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


def statistics(change: list[float], frozen: int = 0) -> BlockStatistics:
    idle = [float(block < frozen) for block in range(len(change))]
    return BlockStatistics(gradient_change=torch.tensor(change).double(), idle=torch.tensor(idle).double())


@pytest.mark.parametrize(
    ("change", "frozen", "stays"),
    [
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 0, 3),  # below the median 0.35
        ([0.1, 0.5, 0.2, 0.3, 0.4, 0.6], 0, 1),  # the prefix ends at 0.5
        ([0.6, 0.1, 0.2, 0.3, 0.4, 0.5], 0, 0),
        ([0.0, 0.0, 0.1, 0.4, 0.3, 0.2], 2, 3),  # of what still trains
        ([0.0, 0.0, 0.0, 0.0, 0.0, 0.1], 5, 5),  # the last one stays
        ([math.nan] * 6, 0, 0),
    ],
)
def test_autofreeze_freezes_the_longest_prefix_below_the_percentile(
    change: list[float], frozen: int, stays: int
) -> None:
    drawn = AutoFreeze(BLOCKS).draw(3, seed=0, statistics=statistics(change, frozen))
    assert drawn == tuple(range(stays, BLOCKS))


def test_autofreeze_measures_as_the_paper_does() -> None:
    """Gradients are added up by hand, and the blocks that freeze follow from them."""
    model, period = tiny.llama(blocks=BLOCKS), 3
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    lisa = LISA(model, optimizer, period=period, sampler=AutoFreeze(BLOCKS, 90), lr_scaling="none")
    norms: dict[int, list[float]] = {block: [] for block in range(BLOCKS)}
    first = 0
    for step in range(4 * period):
        if step % period == 0:
            sums = dict.fromkeys(range(first, BLOCKS), 0.0)
            vectors = [
                torch.zeros(sum(p.numel() for p in block.parameters())) for block in model.model.layers
            ]
        tiny.backward(model, step)
        for block in sums:
            vectors[block] += torch.cat([p.grad.flatten() for p in model.model.layers[block].parameters()])
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % period == 0:
            for block in sums:
                norms[block].append(float(vectors[block].abs().sum()))
            if step + 1 >= 2 * period:
                changes = [abs(norms[b][-1] - norms[b][-2]) / norms[b][-2] for b in range(first, BLOCKS)]
                most = float(torch.tensor(changes).quantile(0.9))
                while changes[0] < most - 1e-6:
                    changes.pop(0)
                    first += 1
        assert lisa.active_blocks == tuple(range(first, BLOCKS))
    assert 0 < first < BLOCKS
    held = sum(p.numel() for block in list(model.model.layers)[first:] for p in block.parameters())
    assert sum(each.numel() for each in collected_tensors(optimizer)) == held


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_sums_of_autofreeze_are_in_the_plan(precision: Any) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4
    )
    peaks = [peak_of(name, config, precision) for name in ("autofreeze", "freezeout")]
    with torch.device("meta"):
        block = sum(p.numel() for p in LlamaForCausalLM(config).model.layers[0].parameters())
    assert peaks[0] - peaks[1] == pytest.approx(3 * 4 * block, rel=0.02)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"percentile": 101.0}, "method.percentile must be between 0 and 100"),
        ({"intervals": 0}, "method.intervals must be >= 1"),
    ],
)
def test_autofreeze_refuses_what_cannot_work(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        METHODS["autofreeze"](**options)
    with pytest.raises(ValueError, match=r"optimizer.in_backward frees each gradient"):
        METHODS["autofreeze"]().check_optimizer(OptimizerConfig(in_backward=True, max_grad_norm=None))


@pytest.mark.parametrize(
    ("name", "options", "steps", "said"),
    [
        ("freezeout", {"period": 3}, 9, None),
        ("freezeout", {"period": 5}, 9, "after step 6 of 9, and method.period=5"),
        ("freezeout", {"period": 10}, 9, "method.period=10"),
        ("autofreeze", {}, 3, None),
        ("autofreeze", {}, 2, "the run of 2 steps"),
        ("smartfrz", {"intervals": 3}, 30, None),
        ("smartfrz", {"intervals": 2}, 30, "method.intervals=2"),
    ],
)
def test_a_run_in_which_no_block_can_freeze_is_warned_of(
    name: str, options: dict[str, Any], steps: int, said: str | None
) -> None:
    model = tiny.llama(blocks=BLOCKS)
    optimizer = torch.optim.AdamW(model.parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        METHODS[name](**options).attach(model, optimizer, find_layers(model), total_steps=steps)
    about = [str(each.message) for each in caught if "will freeze no block" in str(each.message)]
    assert len(about) == (said is not None)
    assert said is None or said in about[0]
