import itertools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lisatune.lisa.draws import choose_period, count_visits
from lisatune.lisa.importance import choose_sampler
from lisatune.lisa.samplers import (
    Cyclic,
    Independent,
    Permutation,
    Sampler,
    Uniform,
    Weighted,
    Window,
    make_sampler,
)

seeds = st.integers(0, 2**63)
periods = st.integers(0, 10_000)
chances = st.floats(0, 1)


@st.composite
def weights(draw: st.DrawFn) -> tuple[tuple[float, ...], int]:
    """Weights of any magnitude, and a γ that they allow."""
    size = st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False)
    p = draw(st.lists(st.one_of(st.just(0.0), size), min_size=1, max_size=12))
    return tuple(p), draw(st.integers(0, sum(each > 0 for each in p)))


@st.composite
def samplers(draw: st.DrawFn) -> tuple[Sampler, int]:
    """A sampler that draws γ blocks, and γ."""
    if draw(st.booleans()):
        p, active = draw(weights())
        return Weighted(p, active), active
    num_blocks = draw(st.integers(1, 40))
    active = draw(st.integers(0, num_blocks))
    return draw(st.sampled_from([Uniform, Permutation, Window, Cyclic]))(num_blocks, active), active


@given(samplers(), periods, seeds)
@example((Weighted((1.0, 5e-324, 1e308), 3), 3), 0, 0)
def test_draw_gives_gamma_different_blocks_in_rising_order(
    made: tuple[Sampler, int], period: int, seed: int
) -> None:
    sampler, active = made
    drawn = sampler.draw(period, seed=seed)
    assert len(drawn) == active
    assert list(drawn) == sorted(set(drawn))
    assert all(0 <= block < sampler.num_blocks for block in drawn)


@given(st.lists(chances, min_size=1, max_size=12), periods, seeds)
def test_independent_draw_is_in_range_and_follows_certainties(p: list[float], period: int, seed: int) -> None:
    drawn = Independent(tuple(p)).draw(period, seed=seed)
    assert list(drawn) == sorted(set(drawn))
    assert {i for i, each in enumerate(p) if each == 1} <= set(drawn)
    assert not {i for i, each in enumerate(p) if each == 0} & set(drawn)


def test_cyclic_blocks_come_in_the_order_of_the_model() -> None:
    def blocks(sampler: Sampler) -> list[tuple[int, ...]]:
        return [sampler.draw(period, seed=7) for period in range(5)]

    assert blocks(make_sampler("ascending", 1, 3)) == [(0,), (1,), (2,), (0,), (1,)]
    assert blocks(make_sampler("descending", 1, 3)) == [(2,), (1,), (0,), (2,), (1,)]
    assert blocks(make_sampler("ascending", 2, 3)) == [(0, 1), (0, 2), (1, 2), (0, 1), (0, 2)]


@given(samplers(), periods, seeds)
@settings(max_examples=30)
def test_draw_is_repeatable_whatever_the_global_rngs_are(
    made: tuple[Sampler, int], period: int, seed: int
) -> None:
    sampler, _ = made
    first = sampler.draw(period, seed=seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed % 2**62)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert sampler.draw(period, seed=seed) == first
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


@given(weights(), periods, seeds)
def test_blocks_of_zero_weight_are_never_drawn(
    made: tuple[tuple[float, ...], int], period: int, seed: int
) -> None:
    p, active = made
    assert all(p[block] > 0 for block in Weighted(p, active).draw(period, seed=seed))


@given(st.data(), seeds)
def test_permutation_trains_every_block_within_a_pass(data: st.DataObject, seed: int) -> None:
    num_blocks = data.draw(st.integers(1, 40))
    active = data.draw(st.integers(1, num_blocks))
    passes = data.draw(st.integers(0, 5))
    length = math.ceil(num_blocks / active)
    sampler = Permutation(num_blocks, active)
    drawn = [sampler.draw(passes * length + slot, seed=seed) for slot in range(length)]
    assert set().union(*drawn) == set(range(num_blocks))
    counts = [sum(block in each for each in drawn) for block in range(num_blocks)]
    assert sum(counts) == length * active
    assert max(counts) <= 2


@given(st.data(), seeds)
def test_windows_are_neighbours_that_train_every_block_within_a_pass(data: st.DataObject, seed: int) -> None:
    num_blocks = data.draw(st.integers(1, 40))
    active = data.draw(st.integers(1, num_blocks))
    length = math.ceil(num_blocks / active)
    first = length * data.draw(st.integers(0, 5))
    sampler = Window(num_blocks, active)
    drawn = [sampler.draw(first + slot, seed=seed) for slot in range(length)]
    assert all(each == tuple(range(each[0], each[0] + active)) for each in drawn)
    counts = [sum(block in each for each in drawn) for block in range(num_blocks)]
    assert [count / length for count in counts] == pytest.approx(sampler.inclusion())
    assert set(counts) <= {1, 2}
    assert (set(counts) == {1}) == (num_blocks % active == 0)


GOLDEN = [
    (Permutation(8, 3), 0, [(1, 4, 6), (0, 2, 5), (3, 6, 7), (1, 3, 4), (0, 5, 7)]),
    (Permutation(32, 2), 7, [(1, 18), (8, 19), (0, 6), (12, 17), (22, 23)]),
    (Uniform(8, 3), 0, [(3, 5, 6), (1, 4, 6), (0, 1, 4), (1, 3, 7), (2, 6, 7)]),
    (Uniform(32, 2), 7, [(21, 22), (15, 28), (4, 19), (7, 8), (0, 12)]),
    (Window(8, 3), 0, [(3, 4, 5), (5, 6, 7), (0, 1, 2), (3, 4, 5), (0, 1, 2)]),
    (Weighted((1, 2, 3, 4, 0, 6, 7, 8), 3), 0, [(3, 6, 7), (1, 5, 7), (5, 6, 7), (1, 3, 6), (2, 6, 7)]),
    (
        Independent((0.0, 0.1, 0.25, 0.5, 0.75, 1.0)),
        0,
        [(3, 4, 5), (1, 3, 4, 5), (4, 5), (3, 4, 5), (2, 3, 4, 5)],
    ),
]


@pytest.mark.parametrize(("sampler", "seed", "draws"), GOLDEN, ids=lambda value: type(value).__name__)
def test_draws_never_change(sampler: Sampler, seed: int, draws: list[tuple[int, ...]]) -> None:
    """If this fails, no published run can be repeated: that needs a reason and a changelog line."""
    assert [sampler.draw(period, seed=seed) for period in range(5)] == draws


def successive_inclusion(p: tuple[float, ...], active: int) -> list[float]:
    """π by enumerating every order in which γ blocks can be picked."""
    total = [0.0] * len(p)
    for order in itertools.permutations([i for i, each in enumerate(p) if each > 0], active):
        chance, left = 1.0, sum(p)
        for i in order:
            chance, left = chance * p[i] / left, left - p[i]
        for i in order:
            total[i] += chance
    return total


@pytest.mark.parametrize(
    "p",
    [
        (1.0, 1.0, 1.0, 1.0),
        (1.0, 2.0, 3.0, 4.0, 5.0),
        (0.1, 0.0, 5.0, 1.0, 1.0),
        (1e-3, 1.0, 1.0, 1e3),
        (1.0, 1e-9, 1e-9, 1e-9),
    ],
)
def test_weighted_inclusion_is_that_of_successive_picks(p: tuple[float, ...]) -> None:
    for active in range(sum(each > 0 for each in p) + 1):
        sampler = Weighted(p, active)
        assert sampler.inclusion() == pytest.approx(successive_inclusion(p, active), abs=1e-3)
        assert sum(sampler.inclusion()) == pytest.approx(active, abs=1e-3)


def frequencies(sampler: Sampler, draws: int = 4000) -> list[float]:
    """Share of the seeds whose period 5 trains each block."""
    counts = [0] * sampler.num_blocks
    for seed in range(draws):
        for block in sampler.draw(5, seed=seed):
            counts[block] += 1
    return [count / draws for count in counts]


@pytest.mark.parametrize(
    "sampler",
    [
        Uniform(5, 2),
        Permutation(5, 2),
        Permutation(8, 3),
        Window(8, 3),
        Window(6, 2),
        Weighted((1.0, 2.0, 0.0, 8.0, 4.0), 2),
        Independent((0.0, 0.05, 0.5, 0.9, 1.0)),
    ],
    ids=repr,
)
def test_blocks_are_drawn_as_often_as_inclusion_says(sampler: Sampler) -> None:
    # 4000 fixed draws: the standard deviation of a share is at most 0.008.
    assert frequencies(sampler) == pytest.approx(sampler.inclusion(), abs=0.03)


def test_uniform_periods_are_independent() -> None:
    sampler = Uniform(4, 1)
    pairs = [(sampler.draw(2, seed=seed), sampler.draw(3, seed=seed)) for seed in range(3000)]
    assert sum(first == second for first, second in pairs) / 3000 == pytest.approx(1 / 4, abs=0.03)


def test_seeds_name_different_draws() -> None:
    runs = {tuple(Permutation(32, 2).draw(period, seed=seed) for period in range(4)) for seed in range(100)}
    assert len(runs) == 100


@pytest.mark.parametrize("active", [-1, 7, 1.5, float("nan")])
@pytest.mark.parametrize("sampler", ["permutation", "uniform", "window", (1.0,) * 6])
def test_gamma_out_of_range_is_refused(sampler: str | tuple[float, ...], active: int) -> None:
    with pytest.raises(ValueError, match=rf"active must be between 0 and the model's 6 blocks, got {active}"):
        make_sampler(sampler, active, 6)


@pytest.mark.parametrize("kind", [Uniform, Permutation, Window])
@pytest.mark.parametrize("active", [-1, 7])
def test_gamma_out_of_range_is_refused_in_a_sampler_of_ones_own(kind: type, active: int) -> None:
    with pytest.raises(ValueError, match="active must be between 0"):
        kind(6, active)


@pytest.mark.parametrize("bad", [float("nan"), -0.1, float("inf")])
def test_probabilities_that_are_none_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=f"the probability of block 2 must be 0 or more, got {bad}"):
        make_sampler([0.5, 0.5, bad, 0.5], 2, 4)
    with pytest.raises(ValueError, match=f"the probability of block 1 must be between 0 and 1, got {bad}"):
        Independent((0.5, bad))


def test_probability_above_one_is_a_weight_but_no_coin() -> None:
    assert Weighted((2.0, 1.0), 1).inclusion()[0] == pytest.approx(2 / 3, abs=1e-3)
    with pytest.raises(ValueError, match="between 0 and 1, got 2"):
        Independent((2.0, 1.0))


def test_probabilities_of_the_wrong_number_are_refused() -> None:
    with pytest.raises(ValueError, match="got 3 probabilities for 4 blocks"):
        make_sampler([0.1, 0.2, 0.3], 4, 4)
    with pytest.raises(ValueError, match="got 2 probabilities for 4 blocks"):
        make_sampler(Independent((0.1, 0.2)), 2, 4)


def test_sampler_over_another_number_of_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="the sampler draws from 2 blocks and the model has 4"):
        make_sampler(Permutation(2, 1), 1, 4)


def test_fewer_positive_probabilities_than_gamma_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot draw active=3 blocks from 2 with probability > 0"):
        make_sampler([0.5, 0.0, 0.5, 0.0], 3, 4)


def test_unknown_sampler_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError,
        match="unknown sampler 'permute'; use 'permutation', 'uniform', 'window', 'asc",
    ):
        make_sampler("permute", 2, 6)


def test_sampler_given_as_it_is_ignores_gamma() -> None:
    coins = Independent((0.5,))
    assert make_sampler(coins, 2, 1) is coins


def test_probabilities_may_be_a_tensor_or_an_array() -> None:
    plain = Weighted((0.25, 0.5, 0.25), 1)
    for values in (torch.tensor([0.25, 0.5, 0.25]), np.array([0.25, 0.5, 0.25])):
        assert choose_sampler(values, 1, [8, 8, 8], None) == plain
    assert Independent(torch.tensor([0.25, 0.5])) == Independent((0.25, 0.5))


def test_sampler_of_ones_own_has_the_same_repr_in_every_process() -> None:
    class Everything(Sampler):
        def __init__(self, num_blocks: int) -> None:
            self.num_blocks = num_blocks

        def draw(self, period: int, *, seed: int) -> tuple[int, ...]:
            return tuple(range(self.num_blocks))

        def inclusion(self) -> tuple[float, ...]:
            return (1.0,) * self.num_blocks

    assert repr(Everything(3)) == "Everything({'num_blocks': 3})"
    assert repr(Uniform(3, 1)) == "Uniform(num_blocks=3, active=1)"


@given(samplers(), seeds, st.integers(1, 2000))
@settings(max_examples=50, deadline=None)
def test_auto_period_trains_every_block_twice_where_it_can(
    made: tuple[Sampler, int], seed: int, total_steps: int
) -> None:
    sampler, _ = made
    period = choose_period(sampler, seed=seed, total_steps=total_steps)
    assert 1 <= period <= min(50, total_steps)
    counts = count_visits(sampler, seed=seed, periods=total_steps // period)
    drawable = [count for count, chance in zip(counts, sampler.inclusion(), strict=True) if chance > 0]
    assert period == 1 or all(count >= 2 for count in drawable)


def test_auto_period_is_the_longest_that_fits() -> None:
    # 16 periods make a pass over 32 blocks at γ = 2, so twice takes 32 periods.
    sampler = Permutation(32, 2)
    assert choose_period(sampler, seed=0, total_steps=320) == 10
    assert choose_period(sampler, seed=0, total_steps=319) == 9
    assert choose_period(sampler, seed=0, total_steps=32) == 1
    assert choose_period(sampler, seed=0, total_steps=5) == 1
    assert choose_period(sampler, seed=0, total_steps=100_000) == 50
    assert choose_period(Permutation(32, 0), seed=0, total_steps=20) == 20
    with pytest.raises(ValueError, match="total_steps must be >= 1, got 0"):
        choose_period(sampler, seed=0, total_steps=0)


@given(samplers(), seeds, st.integers(0, 20))
def test_visits_count_the_draws(made: tuple[Sampler, int], seed: int, periods: int) -> None:
    sampler, active = made
    counts = count_visits(sampler, seed=seed, periods=periods)
    assert sum(counts) == periods * active
    assert len(counts) == sampler.num_blocks
