"""Which blocks train in the next period.

A sampler's `draw` is a pure function of (seed, period), of the numbers that it was built with, and of the
statistics that it reads. So every rank and every resumed run draws the same blocks, without communication and
without a global RNG.

All samplers use one primitive, the weighted shuffle: block l gets a clock T_l = -ln(u_l) / p_l with
u_l uniform in (0, 1), and blocks are ordered by their clocks. The first k of that order are k different
blocks picked one after another, each in proportion to what is left of p (successive sampling;
Efraimidis & Spirakis, Weighted random sampling with a reservoir, 2006).

Symbols: N blocks, γ of them active, p_l the weight of block l, π_l its inclusion probability: the chance
that block l trains in a period. LISA wants π_l = γ/N (arXiv 2403.17919, section 3.2), and in general
π_l proportional to w̃_l / w_l, the ratio of the weight norms that LoRA and full fine-tuning reach.
"""

import hashlib
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Literal

import torch

from lisatune.lisa.statistics import Readable

__all__ = [
    "Cyclic",
    "Independent",
    "Permutation",
    "Sampler",
    "SamplerName",
    "Uniform",
    "Weighted",
    "Window",
    "check_active",
    "make_sampler",
    "shuffle",
]

SamplerName = Literal["permutation", "uniform", "window", "ascending", "descending"]
"""A sampler that draws γ of N blocks and has no other parameter."""


class Sampler(ABC):
    """Draws the blocks of each period.

    To make your own, define `num_blocks`, `draw` and `inclusion`, and pass an instance to `LISA`. Checkpoints
    save the sampler's `repr`: a run resumes only with a sampler of the same `repr`.

    A sampler that names numbers in `reads` gets them at each draw: LISA calls `draw(period, seed=…,
    statistics=…)` with a `BlockStatistics`, and collects the numbers during training. The sampler must draw
    the same blocks from the same numbers. Numbers that are not known yet are NaN, such as all gradient and
    update norms in the first period.

    Example:
        >>> from lisatune.lisa.draws import simulate_draws
        >>> class LeastVisited(Sampler):
        ...     reads = ("visits",)
        ...
        ...     def __init__(self, num_blocks, active):
        ...         self.num_blocks, self.active = num_blocks, active
        ...
        ...     def draw(self, period, *, seed, statistics):
        ...         order = statistics.visits.argsort(stable=True)
        ...         return tuple(sorted(order[: self.active].tolist()))
        ...
        ...     def inclusion(self):
        ...         return (self.active / self.num_blocks,) * self.num_blocks
        >>> draws = simulate_draws(LeastVisited(4, 2), seed=0, periods=3)
        >>> list(draws)
        [(0, 1), (2, 3), (0, 1)]
    """

    num_blocks: int
    """N, the number of blocks drawn from."""

    reads: tuple[Readable, ...] = ()
    """What `draw` reads of each block. If empty, `draw` is called without `statistics`."""

    keeps: float = 0.8
    """Share of the old value that `gradient_average` keeps at the end of a period, 0 <= keeps < 1."""

    records: int = 2
    """Records of a block that `weight_history` keeps, >= 1."""

    @abstractmethod
    def draw(self, period: int, *, seed: int) -> tuple[int, ...]:
        """Return the blocks of `period` (0, 1, …) as different indices in rising order."""

    @abstractmethod
    def inclusion(self) -> tuple[float, ...]:
        """Return π_l for each block: the chance, over seeds, that a period trains it."""

    def rates(self, step: int) -> tuple[float, ...] | None:
        """Return what each block's learning rate is multiplied by in step 0, 1, … of the run.

        Default None: rates do not depend on the step, and LISA's `lr_scaling` decides.
        """
        return None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({vars(self)})"


@dataclass(frozen=True)
class _Even(Sampler):
    """γ of N blocks, each as often as any other in the long run."""

    num_blocks: int
    active: int

    def __post_init__(self) -> None:
        check_active(self.active, self.num_blocks)

    def inclusion(self) -> tuple[float, ...]:
        """Return γ/N for every block."""
        return (self.active / self.num_blocks,) * self.num_blocks


@dataclass(frozen=True)
class Uniform(_Even):
    """γ different blocks, drawn independently in every period: Algorithm 1 of the paper.

    π_l = γ/N. A block's visits over P periods are binomial(P, γ/N): some blocks may never be drawn.
    """

    def draw(self, period: int, *, seed: int) -> tuple[int, ...]:
        """Return the first γ blocks of a shuffle keyed by (seed, period)."""
        return tuple(sorted(shuffle((1.0,) * self.num_blocks, f"{seed}/{period}")[: self.active]))


@dataclass(frozen=True)
class Permutation(_Even):
    """A shuffled pass over all blocks, γ at a time, then another: all train within ⌈N/γ⌉ periods.

    π_l = γ/N. When γ does not divide N, the last period of a pass is filled up from the pass's start.
    """

    def draw(self, period: int, *, seed: int) -> tuple[int, ...]:
        """Return slice number `period mod ⌈N/γ⌉` of the pass that `period` falls into."""
        if self.active == 0:
            return ()
        pass_index, slot = divmod(period, math.ceil(self.num_blocks / self.active))
        order = shuffle((1.0,) * self.num_blocks, f"{seed}/pass {pass_index}")
        first = slot * self.active
        return tuple(sorted((order + order)[first : first + self.active]))


@dataclass(frozen=True)
class Window(_Even):
    """γ neighbouring blocks: a shuffled pass over ⌈N/γ⌉ windows that hold all blocks, then another.

    π_l = γ/N where γ divides N. Else the last window reaches back into the one before, and the blocks that
    both hold train in two periods of a pass.
    """

    def draw(self, period: int, *, seed: int) -> tuple[int, ...]:
        """Return window number `period mod ⌈N/γ⌉` of the pass that `period` falls into."""
        windows = self._windows()
        pass_index, slot = divmod(period, len(windows))
        return tuple(windows[shuffle((1.0,) * len(windows), f"{seed}/pass {pass_index}")[slot]])

    def inclusion(self) -> tuple[float, ...]:
        """Return the share of the windows that hold each block."""
        windows, blocks = self._windows(), range(self.num_blocks)
        return tuple(sum(block in each for each in windows) / len(windows) for block in blocks)

    def _windows(self) -> list[range]:
        last = self.num_blocks - self.active
        starts = (min(first, last) for first in range(0, self.num_blocks, self.active or self.num_blocks))
        return [range(first, first + self.active) for first in starts]


@dataclass(frozen=True)
class Cyclic(_Even):
    """Blocks in the order of the model, γ at a time, again and again: the block order of BAdam.

    π_l = γ/N over a pass. When γ does not divide N, the last period of a pass begins the next one.
    """

    descending: bool = False
    """From the last block to the first, instead of from the first to the last."""

    def draw(self, period: int, *, seed: int) -> tuple[int, ...]:
        """Return the γ blocks after those of the previous period; `seed` changes nothing."""
        blocks = [(period * self.active + i) % self.num_blocks for i in range(self.active)]
        return tuple(sorted(self.num_blocks - 1 - block if self.descending else block for block in blocks))


@dataclass(frozen=True)
class Weighted(Sampler):
    """γ different blocks, picked one after another in proportion to what is left of `probabilities`.

    For γ = 1, π_l = p_l / Σp. For γ > 1 large p_l saturate: π_l is not γ·p_l; `inclusion` computes it.
    """

    probabilities: tuple[float, ...]
    active: int
    num_blocks: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _take_probabilities(self, most=math.inf)
        check_active(self.active, self.num_blocks)
        positive = sum(p > 0 for p in self.probabilities)
        if positive < self.active:
            raise ValueError(
                f"cannot draw active={self.active} blocks from {positive} with probability > 0; "
                f"lower `active` or give more blocks a probability"
            )

    def draw(self, period: int, *, seed: int) -> tuple[int, ...]:
        """Return the first γ blocks of a weighted shuffle keyed by (seed, period)."""
        return tuple(sorted(shuffle(self.probabilities, f"{seed}/{period}")[: self.active]))

    def inclusion(self) -> tuple[float, ...]:
        r"""Return π_l = ∫₀¹ P(fewer than γ other clocks ring before T_l = -ln(v)/p_l) dv.

        Other clocks have rung with chance q_j = 1 - v^(p_j/p_l), independently: a Poisson-binomial count.
        Midpoint rule in v, error below 1e-3.
        """
        return _integrate_inclusion(self.probabilities, self.active)


@dataclass(frozen=True)
class Independent(Sampler):
    """Every block flips its own coin: block l trains with probability p_l, whatever the others do.

    π_l = p_l exactly. The number of active blocks varies around its mean Σp. All blocks with p_l > 0 may
    train at once, and memory must suffice for that. A period may train the ends alone. Takes no γ.
    """

    probabilities: tuple[float, ...]
    num_blocks: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _take_probabilities(self, most=1.0)

    def draw(self, period: int, *, seed: int) -> tuple[int, ...]:
        """Return the blocks whose coin, keyed by (seed, period), falls below p_l."""
        rng = _make_rng(f"{seed}/{period}")
        return tuple(i for i, p in enumerate(self.probabilities) if rng.random() < p)

    def inclusion(self) -> tuple[float, ...]:
        """Return p_l."""
        return tuple(self.probabilities)


NAMED: dict[SamplerName, Callable[[int, int], Sampler]] = {
    "permutation": Permutation,
    "uniform": Uniform,
    "window": Window,
    "ascending": Cyclic,
    "descending": partial(Cyclic, descending=True),
}


def make_sampler(sampler: str | Sequence[float] | Sampler, active: int, num_blocks: int) -> Sampler:
    """Build the sampler that a user named.

    Args:
        sampler: a `SamplerName`, N probabilities for `Weighted`, or a `Sampler`, which is returned.
        active: γ, 0 <= γ <= N; a `Sampler` has its own.
        num_blocks: N.

    Raises:
        ValueError: unknown name, γ out of range, probabilities of the wrong number or value.
    """
    if isinstance(sampler, str):
        for name, kind in NAMED.items():
            if name == sampler:
                return kind(num_blocks, active)
        names = ", ".join(map(repr, (*NAMED, "gradient", "misa", "spectrum")))
        raise ValueError(f"unknown sampler {sampler!r}; use {names} or one probability per block")
    given = sampler.num_blocks if isinstance(sampler, Sampler) else len(sampler)
    if given != num_blocks:
        if isinstance(sampler, Sampler) and not isinstance(sampler, Weighted | Independent):
            raise ValueError(
                f"the sampler draws from {given} blocks and the model has {num_blocks}; make it over as many"
            )
        raise ValueError(f"got {given} probabilities for {num_blocks} blocks; give one per block")
    return sampler if isinstance(sampler, Sampler) else Weighted(tuple(sampler), active)


@lru_cache(maxsize=8)
def _integrate_inclusion(probabilities: tuple[float, ...], active: int) -> tuple[float, ...]:
    """Cached, because it takes a second with 80 blocks, and each plan asks for it."""
    points = 4096
    v = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    result = []
    for i, p_i in enumerate(probabilities):
        if p_i == 0 or active == 0:
            result.append(0.0)
            continue
        # chance_c: chance that exactly c other clocks have rung, c < γ.
        chance = [torch.ones_like(v)] + [torch.zeros_like(v) for _ in range(active - 1)]
        for j, p_j in enumerate(probabilities):
            if j == i:
                continue
            q = 1 - v ** (p_j / p_i)
            chance = [c * (1 - q) + (chance[n - 1] * q if n else 0) for n, c in enumerate(chance)]
        result.append(float(sum(chance, torch.zeros_like(v)).mean()))
    return tuple(result)


def check_active(active: int, num_blocks: int) -> None:
    """Raise ValueError unless 0 <= γ <= N."""
    if not isinstance(active, int) or not 0 <= active <= num_blocks:
        raise ValueError(f"active must be between 0 and the model's {num_blocks} blocks, got {active!r}")


def _take_probabilities(sampler: "Weighted | Independent", *, most: float) -> None:
    object.__setattr__(sampler, "probabilities", tuple(float(p) for p in sampler.probabilities))
    object.__setattr__(sampler, "num_blocks", len(sampler.probabilities))
    for block, p in enumerate(sampler.probabilities):
        if math.isnan(p) or not 0 <= p <= most or math.isinf(p):
            limit = "0 or more" if math.isinf(most) else f"between 0 and {most:g}"
            raise ValueError(f"the probability of block {block} must be {limit}, got {p}")


@lru_cache(maxsize=4)
def shuffle(weights: tuple[float, ...], key: str) -> tuple[int, ...]:
    """Return the blocks with weight > 0 in the order of their clocks, a pure function of weights and key.

    Cached, because a pass uses one shuffle.
    """
    rng = _make_rng(key)
    clocks = [(-math.log(1.0 - rng.random()) / w if w > 0 else math.inf, i) for i, w in enumerate(weights)]
    return tuple(i for _, i in sorted(clocks) if weights[i] > 0)


def _make_rng(key: str) -> random.Random:
    """Make the generator of a key. `Random.random` gives the same numbers in every Python version."""
    return random.Random(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big"))
