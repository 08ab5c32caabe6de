"""Draws of units under a budget of parameters."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lisatune.lisa.budget import Budget, Fitting, Passes, make_unit_sampler
from lisatune.lisa.samplers import Independent, Uniform, Weighted

SIZES = (9, 3, 3, 9, 24, 24, 24) * 5  # q, k, v, o, gate, up, down


@st.composite
def budgets(draw: st.DrawFn) -> Budget:
    sizes = draw(st.lists(st.integers(1, 30), min_size=1, max_size=30))
    return Budget(tuple(sizes), draw(st.integers(max(sizes), sum(sizes) + 5)))


def size_of(budget: Budget, units: tuple[int, ...]) -> int:
    return sum(budget.sizes[unit] for unit in units)


@settings(deadline=None, max_examples=60)
@given(budgets(), st.sampled_from(["shuffled", "ascending", "descending"]), st.integers(0, 3))
def test_every_period_keeps_the_budget_and_each_pass_trains_each_unit_once(
    budget: Budget, order: str, seed: int
) -> None:
    sampler = Passes(budget, order)  # type: ignore[arg-type]
    draws = [sampler.draw(period, seed=seed) for period in range(60)]
    assert all(0 < size_of(budget, units) <= budget.most for units in draws)
    assert all(list(units) == sorted(set(units)) for units in draws)
    seen: Counter[int] = Counter()
    for units in draws:
        seen.update(units)
        counts = [seen[unit] for unit in range(len(budget.sizes))]
        assert max(counts) - min(counts) <= 1, "a unit trains again only when all others have trained"


def test_a_unit_that_does_not_fit_waits_and_smaller_ones_go_before_it() -> None:
    sampler = Passes(Budget((4, 4, 1, 4, 3), 6), "ascending")
    # Unit 1 does not fit beside 0, and 2 does. Unit 4 is the last of the pass; 2 of the next fits beside it.
    assert [sampler.draw(period, seed=0) for period in range(4)] == [(0, 2), (1,), (3,), (2, 4)]


def test_a_draw_depends_on_its_seed_and_period_alone() -> None:
    forwards = [Passes(Budget(SIZES, 96)).draw(period, seed=3) for period in range(40)]
    backwards = [Passes(Budget(SIZES, 96)).draw(period, seed=3) for period in reversed(range(40))]
    assert forwards == backwards[::-1]
    assert forwards != [Passes(Budget(SIZES, 96)).draw(period, seed=4) for period in range(40)]


def test_the_inclusion_of_passes_is_how_often_each_unit_trains() -> None:
    sampler = Passes(Budget.of_blocks(SIZES, 2, 5))
    assert sampler.budget.most == 192
    counts = Counter(unit for period in range(2000) for unit in sampler.draw(period, seed=7))
    (chance,) = set(sampler.inclusion())
    assert max(counts.values()) - min(counts.values()) <= 1
    assert chance == pytest.approx(counts[0] / 2000, rel=0.02)
    assert chance == pytest.approx(192 / 480, rel=0.15)


def test_the_inclusion_of_weighted_units_is_how_often_each_trains() -> None:
    weights = (1.0, 2.0, 1.0, 4.0, 1.0, 1.0, 0.0)
    sampler = Fitting(weights, Budget(SIZES[:7], 40))
    counts = Counter(unit for period in range(4000) for unit in sampler.draw(period, seed=7))
    for unit, chance in enumerate(sampler.inclusion()):
        assert chance == pytest.approx(counts[unit] / 4000, abs=0.03)
    assert sampler.inclusion()[6] == 0
    assert sampler.inclusion()[4] == sampler.inclusion()[5], "the same weight and size"


@pytest.mark.parametrize(
    ("active", "expected"), [(0, [()]), (5, [tuple(range(35))])], ids=["ends alone", "everything"]
)
def test_the_extremes_train_nothing_and_everything(active: int, expected: list[tuple[int, ...]]) -> None:
    budget = Budget.of_blocks(SIZES, active, 5)
    for name in ("permutation", "uniform", "ascending"):
        sampler = make_unit_sampler(name, budget)
        assert [sampler.draw(period, seed=0) for period in range(3)] == expected * 3
        assert set(sampler.inclusion()) == {float(bool(active))}


def test_a_budget_below_the_largest_unit_is_refused_with_the_one_that_suffices() -> None:
    with pytest.raises(ValueError, match=r"active=1 is a budget of 36.*largest unit with 99.*active >= 3"):
        Budget.of_blocks((1, 8, 99), 1, 3)
    assert Budget.of_blocks((1, 8, 99), 3, 3).most == 108


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ("window", "window draws neighbouring blocks"),
        ("round-robin", "unknown sampler 'round-robin'"),
        ((1.0, 2.0), "got 2 probabilities for 35 units"),
        ((0.0,) * 35, "not all 0"),
        (Uniform(5, 2), "draws from 5 blocks and the model has 35 units"),
        ((float("nan"),) * 35, "must be numbers >= 0"),
    ],
)
def test_samplers_that_cannot_draw_units_are_refused(sampler: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_unit_sampler(sampler, Budget.of_blocks(SIZES, 2, 5))  # type: ignore[arg-type]


def test_a_sampler_of_ones_own_over_units_is_taken_as_it_is() -> None:
    own = Independent((0.5,) * 35)
    assert make_unit_sampler(own, Budget.of_blocks(SIZES, 2, 5)) is own


def test_fitting_is_weighted_when_all_units_have_one_size() -> None:
    weights = (1.0, 2.0, 3.0, 4.0)
    fitting, weighted = Fitting(weights, Budget((1,) * 4, 2)), Weighted(weights, 2)
    assert [fitting.draw(p, seed=1) for p in range(50)] == [weighted.draw(p, seed=1) for p in range(50)]
    assert fitting.inclusion() == pytest.approx(weighted.inclusion(), abs=0.03)
