"""Draws under a budget: units of different size train together, up to a number of parameters.

A draw goes through an order of units and takes each one that still fits into what is left of the budget
(first fit). So every period trains at most the budget, and a large unit does not keep smaller ones out.

    Passes     a shuffled pass over all units, each trains once, then another: the permutation of units
    Fitting    an order of its own for each period, in proportion to weights: uniform and weighted draws

Symbols: N units of n_l parameters, budget B, π_l the chance that unit l trains in a period. Blocks are units
of size 1 under the budget γ.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, Self

from lisatune.lisa.samplers import Sampler, check_active, shuffle

__all__ = ["Budget", "Fitting", "Passes", "make_unit_sampler", "simulate_inclusion"]

SIMULATED_PASSES = 50
SIMULATED_PERIODS = 4096


@dataclass(frozen=True)
class Budget:
    """How much may train in a period."""

    sizes: tuple[int, ...] = field(repr=False)
    """Parameters of each unit, n_l."""

    most: int
    """B, the most that may train together; 0 trains no unit."""

    @classmethod
    def of_count(cls, num_blocks: int, active: int) -> Self:
        """Make the budget of γ blocks, whatever their size."""
        check_active(active, num_blocks)
        return cls((1,) * num_blocks, active)

    @classmethod
    def of_blocks(cls, sizes: Sequence[int], active: int, num_blocks: int) -> Self:
        """Make the budget of γ average blocks: γ/N of all parameters, rounded down.

        Args:
            sizes: parameters of each unit.
            active: γ, 0 <= γ <= N.
            num_blocks: N, blocks of the model.

        Raises:
            ValueError: γ is out of range, or the largest unit is larger than the budget.
        """
        check_active(active, num_blocks)
        most = sum(sizes) * active // num_blocks
        if 0 < most < max(sizes):
            least = -(-max(sizes) * num_blocks // sum(sizes))
            raise ValueError(
                f"active={active} is a budget of {most:,} parameters, smaller than the largest unit with "
                f"{max(sizes):,}, which could never train; use active >= {least}, or unit block"
            )
        return cls(tuple(sizes), most)

    def take(self, order: Iterable[int], taken: Collection[int] = ()) -> list[int]:
        """Return `taken` and, in this order, each other unit that still fits beside those before it."""
        chosen = list(taken)
        left = self.most - sum(self.sizes[unit] for unit in chosen)
        for unit in order:
            if unit not in chosen and self.sizes[unit] <= left:
                chosen.append(unit)
                left -= self.sizes[unit]
        return chosen


@dataclass(frozen=True)
class Passes(Sampler):
    """Passes over all units: each trains once in a pass, as many at a time as the budget holds.

    A period takes, in the order of the pass, the units that fit. A unit that does not fit waits: it is among
    the first of the next period, and smaller ones behind it go before it. Once a pass is used up inside a
    period, the period is filled up from the next pass. So all units train equally often, whatever their size:
    π_l = 1 / (periods of a pass), B/Σn if periods were always full.

    To know period P the periods before it are dealt out as well, once for each process.
    """

    budget: Budget
    order: Literal["shuffled", "ascending", "descending"] = "shuffled"

    @property
    def num_blocks(self) -> int:  # type: ignore[override]
        """N, the number of units."""
        return len(self.budget.sizes)

    def draw(self, period: int, *, seed: int) -> tuple[int, ...]:
        """Return the units of a period: a pure function of (seed, period), budget and sizes."""
        return _dealer(self.budget, self.order, seed).deal(period)

    def inclusion(self) -> tuple[float, ...]:
        """Return π, equal for all units: simulated over 50 passes, because it has no closed form."""
        return (_simulate_passes(self.budget, self.order),) * self.num_blocks


class _Dealer:
    """Deals out the periods of `Passes` one after another, and remembers them."""

    def __init__(self, budget: Budget, order: str, seed: int) -> None:
        self._budget, self._order, self._seed = budget, order, seed
        self._periods: list[tuple[int, ...]] = []
        self._passes = 0
        self._waiting: list[int] = []

    def deal(self, period: int) -> tuple[int, ...]:
        """Return the units of a period."""
        while len(self._periods) <= period:
            self._periods.append(self._deal_next())
        return self._periods[period]

    def count_periods(self, passes: int) -> int:
        """Return in how many periods this many passes begin, which is all of them but one."""
        while self._passes <= passes:
            self.deal(len(self._periods))
        return len(self._periods)

    def _deal_next(self) -> tuple[int, ...]:
        if self._budget.most == 0:
            return ()
        taken: list[int] = []
        while True:
            if not self._waiting:
                self._waiting = self._begin_pass()
            before = len(taken)
            taken = self._budget.take(self._waiting, taken)
            new = set(taken[before:])
            self._waiting = [unit for unit in self._waiting if unit not in new]
            if self._waiting:
                return tuple(sorted(taken))

    def _begin_pass(self) -> list[int]:
        units = list(range(len(self._budget.sizes)))
        if self._order == "shuffled":
            units = list(shuffle((1.0,) * len(units), f"{self._seed}/pass {self._passes}"))
        elif self._order == "descending":
            units.reverse()
        self._passes += 1
        return units


@lru_cache(maxsize=4)
def _dealer(budget: Budget, order: str, seed: int) -> _Dealer:
    return _Dealer(budget, order, seed)


@lru_cache(maxsize=8)
def _simulate_passes(budget: Budget, order: str) -> float:
    """Return in which share of the periods a unit trains."""
    if budget.most == 0:
        return 0.0
    return SIMULATED_PASSES / _Dealer(budget, order, 0).count_periods(SIMULATED_PASSES)


@dataclass(frozen=True)
class Fitting(Sampler):
    """Units in an order in proportion to what is left of `probabilities`, each one that still fits.

    Each period has an order of its own. A unit that does not fit is passed over, and smaller ones behind it
    may fit. So of units with equal p, small ones train more often; `inclusion` says how often.
    """

    probabilities: tuple[float, ...]
    budget: Budget

    def __post_init__(self) -> None:
        if len(self.probabilities) != len(self.budget.sizes):
            raise ValueError(
                f"got {len(self.probabilities)} probabilities for {len(self.budget.sizes)} units; give one "
                "per unit"
            )
        if not all(0 <= p < float("inf") for p in self.probabilities) or not any(self.probabilities):
            raise ValueError(
                f"probabilities must be numbers >= 0, and not all 0, got {min(self.probabilities)} to "
                f"{max(self.probabilities)}"
            )

    @property
    def num_blocks(self) -> int:  # type: ignore[override]
        """N, the number of units."""
        return len(self.budget.sizes)

    def draw(self, period: int, *, seed: int) -> tuple[int, ...]:
        """Return the units of a weighted shuffle keyed by (seed, period) that fit."""
        return tuple(sorted(self.budget.take(shuffle(self.probabilities, f"{seed}/{period}"))))

    def inclusion(self) -> tuple[float, ...]:
        """Return π_l, simulated; units with equal p and size have equal π."""
        return simulate_inclusion(self.probabilities, self.budget)


@lru_cache(maxsize=8)
def simulate_inclusion(probabilities: tuple[float, ...], budget: Budget) -> tuple[float, ...]:
    """Return the chance of each unit to be taken from a weighted shuffle under a budget.

    The mean over 4096 draws of a fixed seed; units with equal p and size share theirs. The standard error of
    π is √(π(1 - π)/4096), at most 0.008, and less for units that share.
    """
    counts: Counter[tuple[float, int]] = Counter()
    kinds = list(zip(probabilities, budget.sizes, strict=True))
    for draw in range(SIMULATED_PERIODS):
        counts.update(kinds[unit] for unit in budget.take(shuffle(probabilities, f"inclusion/{draw}")))
    alike = Counter(kinds)
    return tuple(counts[kind] / alike[kind] / SIMULATED_PERIODS for kind in kinds)


def make_unit_sampler(sampler: str | Sequence[float] | Sampler, budget: Budget) -> Sampler:
    """Build the sampler that a user named, for units under a budget.

    Args:
        sampler: "permutation", "ascending" or "descending" (`Passes`), "uniform" or one number per unit
            (`Fitting`), or a `Sampler` over as many units, which is returned and keeps no budget.
        budget: sizes and limit.

    Raises:
        ValueError: unknown name, or another number of units.
    """
    units = len(budget.sizes)
    if isinstance(sampler, Sampler):
        if sampler.num_blocks != units:
            raise ValueError(
                f"the sampler draws from {sampler.num_blocks} blocks and the model has {units} units; make "
                "it over units, or use unit block"
            )
        return sampler
    if not isinstance(sampler, str):
        return Fitting(tuple(map(float, sampler)), budget)
    match sampler:
        case "permutation":
            return Passes(budget)
        case "ascending" | "descending":
            return Passes(budget, sampler)
        case "uniform":
            return Fitting((1.0,) * units, budget)
        case "window":
            raise ValueError(
                "the sampler window draws neighbouring blocks and does not know units; use permutation, or "
                "unit block"
            )
    raise ValueError(
        f"unknown sampler {sampler!r}; for units use 'permutation', 'uniform', 'ascending', 'descending', "
        "'gradient', 'misa', 'spectrum' or one probability per unit"
    )
