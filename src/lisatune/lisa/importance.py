r"""Samplers that draw by what was measured of each block: its gradients, or the spectrum of its weights.

    gradient    GRASS (arXiv 2604.07808): p = softmax of the mean gradient of a parameter
    misa        MISA (code of its authors): p ∝ exp(η G²), and what rested longest comes first
    spectrum    p ∝ signal-to-noise ratio of the weights (Spectrum, cognitivecomputations/spectrum)

All of them read their numbers through `Sampler.reads`, so the numbers are part of the optimizer's state,
equal on all ranks and exact on resume. A draw is an order of blocks, taken while they fit into the budget: γ
blocks, or units of blocks (`lisatune.lisa.budget`).

Symbols: N blocks l of n_l parameters with weights θ_l and gradients g_l; p_l the weight of a block in the
next draw; π_l its chance to train in a period; K the period; A_l the average of `gradient_average`:

    m_l = mean over the K steps of a period of ‖g_l‖,     A_l ← 0.8 A_l + 0.2 m_l,     first A_l = m_l.

π changes while gradients do. What `inclusion` returns, and learning rates are scaled by, is π for equal
gradients, simulated; of `spectrum` it is π itself.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from lisatune.lisa.budget import Budget, make_unit_sampler, simulate_inclusion
from lisatune.lisa.draws import simulate_draws
from lisatune.lisa.samplers import Sampler, make_sampler, shuffle
from lisatune.lisa.statistics import BlockStatistics

__all__ = ["MEASURED", "Gradient", "Measured", "Misa", "Spectrum", "choose_sampler"]

Measured = Literal["gradient", "misa", "spectrum"]
"""Names of the samplers of this file."""

SIMULATED_PERIODS = 256


@dataclass(frozen=True)
class _Measured(Sampler):
    """A sampler over measured numbers."""

    budget: Budget
    numbers: tuple[int, ...] = field(default=(), repr=False)
    """n_l, parameters of each block; empty counts all blocks as equal."""

    @property
    def num_blocks(self) -> int:  # type: ignore[override]
        """N."""
        return len(self.budget.sizes)

    def draw(self, period: int, *, seed: int, statistics: BlockStatistics | None = None) -> tuple[int, ...]:
        """Return the blocks of a period, from the numbers of the periods before."""
        assert statistics is not None
        return tuple(sorted(self._take(statistics, f"{seed}/{period}", f"{seed}/pass 0")))

    def _take(self, statistics: BlockStatistics, key: str, first: str) -> list[int]:
        raise NotImplementedError

    def inclusion(self) -> tuple[float, ...]:
        """Return π_l for equal gradients; simulated over 256 periods, unless all blocks have one size.

        Units of equal size share theirs.
        """
        if len(set(self.budget.sizes)) == 1:
            taken = len(self.budget.take(range(self.num_blocks)))
            return (taken / self.num_blocks,) * self.num_blocks
        return _simulate_equal_gradients(self)


@lru_cache(maxsize=8)
def _simulate_equal_gradients(sampler: _Measured) -> tuple[float, ...]:
    """Cached, because a run asks for it several times, and it takes a second with 210 units."""
    counts = [0] * sampler.num_blocks
    for drawn in simulate_draws(sampler, seed=0, periods=SIMULATED_PERIODS):
        for block in drawn:
            counts[block] += 1
    kinds: dict[int, list[int]] = {}
    for block, size in enumerate(sampler.budget.sizes):
        kinds.setdefault(size, []).append(counts[block])
    shares = {size: sum(each) / len(each) / SIMULATED_PERIODS for size, each in kinds.items()}
    return tuple(shares[size] for size in sampler.budget.sizes)


def _order_unvisited(visits: Tensor, first: str) -> list[int]:
    """Return the blocks that have not trained yet, in the order of a shuffled pass."""
    counts = visits.tolist()
    return [block for block in shuffle((1.0,) * len(counts), first) if counts[block] == 0]


@dataclass(frozen=True)
class Gradient(_Measured):
    r"""GRASS (arXiv 2604.07808): blocks with large gradients train more often.

    m_l = mean over steps of √(‖g_l‖² / n_l), the gradient of a typical parameter, averaged over the periods
    in which the block trained, and

        p = softmax(m / (τ m̄)),    m̄ the mean of m over all blocks.

    γ blocks are drawn without replacement, one after another in proportion to what is left of p.

    What differs, and why: the paper probes all blocks before training, in steps without updates, and
    refreshes m of the active blocks every T_u steps. Here the first pass over the blocks is the probe: each
    block trains for a period and is measured in it, so no step and no time goes by without training. m is
    refreshed at the end of every period of the block, T_u = T_s = K. The values of τ and α are not published.
    Ours: τ is in units of m̄, so it does not depend on the loss or the model, and is 1: a block with twice the
    mean gradient comes e times as often as one with the mean. α = 0.2, MISA's.

    Cost: one pass over the gradients of the active blocks in each step.
    """

    temperature: float = 1.0
    """τ > 0; large ones approach uniform draws."""

    reads = ("gradient_average", "visits")

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")

    def probabilities(self, statistics: BlockStatistics) -> Tensor:
        """Return p: float64 [N], 0 for blocks without a gradient yet, sums to 1 if any has one."""
        assert statistics.gradient_average is not None
        numbers = torch.tensor(self.numbers or (1,) * self.num_blocks, dtype=torch.float64)
        typical = statistics.gradient_average / numbers.sqrt()
        known = ~typical.isnan()
        mean = typical[known].mean().clamp(min=1e-300)
        p = torch.zeros(self.num_blocks, dtype=torch.float64)
        p[known] = torch.softmax(typical[known] / (self.temperature * mean), dim=0)
        return p

    def _take(self, statistics: BlockStatistics, key: str, first: str) -> list[int]:
        assert statistics.visits is not None
        taken = self.budget.take(_order_unvisited(statistics.visits, first))
        return self.budget.take(shuffle(tuple(self.probabilities(statistics).tolist()), key), taken)


@dataclass(frozen=True)
class Misa(_Measured):
    r"""MISA's draws: by gradient norm, and no block rests for ever.

        G_l ← 0.8 G_l + 0.2 · mean over steps of ‖g_l‖,       p_l ∝ exp(min(5, η G_l²))

    A period takes blocks that have never trained, then the two that have rested longest, then blocks in
    proportion to what is left of p, each if it fits into the budget. Made for units (`unit: module`), under
    which the published code has a budget of 1 or 3 % of all parameters; it works on blocks too.

    What differs: G_l begins with its first measurement in place of 0, which needs no bias correction (the
    published one divides the running average itself, again and again). The two that rested longest get at
    most half of the budget, so that with γ = 2 one block is drawn by p. The first pass takes whole periods,
    where the published code draws anew in each of its steps.

    With η = 1 and gradients clipped at norm 1, G² is at most 1 and mostly far below: p is almost uniform.

    Cost: one pass over the gradients of the active blocks in each step.
    """

    eta: float = 1.0
    """η >= 0; 0 makes p uniform."""

    longest: int = 2
    """Blocks that are drawn because they rested longest."""

    reads = ("gradient_average", "visits", "idle")

    def __post_init__(self) -> None:
        if not (self.eta >= 0 and self.longest >= 0):
            raise ValueError(f"eta and longest must be >= 0, got {self.eta} and {self.longest}")

    def probabilities(self, statistics: BlockStatistics) -> Tensor:
        """Return p: float64 [N], 0 for blocks without a gradient yet, not normed."""
        assert statistics.gradient_average is not None
        exponent = (self.eta * statistics.gradient_average.square()).clamp(max=5.0)
        return torch.where(exponent.isnan(), 0.0, exponent.exp())

    def _take(self, statistics: BlockStatistics, key: str, first: str) -> list[int]:
        assert statistics.visits is not None
        assert statistics.idle is not None
        taken = self.budget.take(_order_unvisited(statistics.visits, first))
        if not taken and self.budget.most:
            half = Budget(self.budget.sizes, self.budget.most // 2)
            ties = shuffle((1.0,) * self.num_blocks, f"{key}/longest")
            rested = sorted(ties, key=lambda block: -float(statistics.idle[block]))  # type: ignore[index]
            taken = half.take(rested[: self.longest])
        return self.budget.take(shuffle(tuple(self.probabilities(statistics).tolist()), key), taken)


@dataclass(frozen=True)
class Spectrum(_Measured):
    """Blocks whose weights have much signal above their noise train more often: p_l ∝ their `spectrum`.

    The score is `lisatune.lisa.spectrum`'s, once, from the weights that LISA is attached to. The published
    Spectrum picks the best 25 or 50 % and trains them for the whole run; here the score is a chance, so every
    block trains.

    Cost: the eigenvalues of each matrix, once. No step costs more.
    """

    reads = ("spectrum",)

    def inclusion(self, statistics: BlockStatistics | None = None) -> tuple[float, ...]:
        """Return π_l, simulated; without statistics that of equal scores."""
        return simulate_inclusion(self._scores(statistics), self.budget)

    def _scores(self, statistics: BlockStatistics | None) -> tuple[float, ...]:
        if statistics is None or statistics.spectrum is None or bool(statistics.spectrum.isnan().any()):
            return (1.0,) * self.num_blocks  # a model of shapes has no spectrum
        return tuple(statistics.spectrum.tolist())

    def _take(self, statistics: BlockStatistics, key: str, first: str) -> list[int]:
        return self.budget.take(shuffle(self._scores(statistics), key))


MEASURED: dict[Measured, Callable[[Budget, tuple[int, ...]], Sampler]] = {
    "gradient": Gradient,
    "misa": Misa,
    "spectrum": Spectrum,
}


def choose_sampler(
    sampler: str | Sequence[float] | Sampler, active: int, sizes: Sequence[int], budget: Budget | None
) -> Sampler:
    """Build the sampler that a user named.

    Args:
        sampler: a name in `MEASURED`, or what `make_sampler` and for units `make_unit_sampler` take.
        active: γ.
        sizes: parameters of each block or unit.
        budget: of units; None for blocks.

    Raises:
        TypeError: it is none of these.
        ValueError: as those two do.
    """
    if not isinstance(sampler, str | Sampler):
        sampler = _read_probabilities(sampler)
    for name, kind in MEASURED.items():
        if isinstance(sampler, str) and name == sampler:
            return kind(budget or Budget.of_count(len(sizes), active), tuple(sizes))
    if budget is None:
        return make_sampler(sampler, active, len(sizes))
    return make_unit_sampler(sampler, budget)


def _read_probabilities(given: Any) -> tuple[float, ...]:
    """Return the numbers of a list, an array or a tensor. In a dict or set it is not clear whose they are."""
    try:
        if isinstance(given, Mapping | Set):
            raise TypeError
        return tuple(map(float, given))
    except (TypeError, ValueError):
        raise TypeError(
            f"sampler must be a name, one number per block or a lisatune.Sampler, got {given!r}"
        ) from None
