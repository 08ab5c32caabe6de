r"""Layers freeze for good, the lowest first: FreezeOut by the clock, AutoFreeze by their gradients.

FreezeOut (Brock et al., arXiv 1706.04983).

Layer i of L + 1 (0 the embedding, blocks 1 … N, L = N + 1 the head) trains until the share t_i of the run,

    t_i = (t_0 + (1 - t_0) i/L)³                                          (section 2, cubic scheduling)

and its learning rate falls along a cosine that ends there. In the scaled form it begins at α/t_i, so that
every layer goes as far:

    α_i(t) = ½ α/t_i (1 + cos(π t/t_i))                                   (equation 1; the paper prints no ½)

The optimizer's own schedule gives the head α(t) = ½ α (1 + cos πt), so a block's factor in a step is

    α_i(t) / α(t) = (1 + cos(π t/t_i)) / (t_i (1 + cos πt)),  0 from t_i on.

AutoFreeze (Liu et al., arXiv 2102.01386, algorithm 1). A run is divided into intervals. With s_l the L1 norm
of the sum of block l's gradients over an interval, and s_l' that of the interval before,

    η_l = |s_l - s_l'| / s_l'.

At the end of an interval, of the blocks that still train the longest prefix freezes whose η_l are all below
the n-th percentile of η of these blocks, n = 50: their gradients have changed less than those of the others.
"""

import math
from dataclasses import dataclass

import torch

from lisatune.lisa.samplers import Sampler
from lisatune.lisa.statistics import BlockStatistics

__all__ = ["AutoFreeze", "FreezeOut"]


@dataclass(frozen=True)
class FreezeOut(Sampler):
    """Draws all blocks that are not frozen yet.

    Args:
        num_blocks: N.
        total_steps: optimizer steps of the run, >= 1.
        period: steps between two draws; a block freezes at the first draw after its time.
        start: t_0, 0 < t_0 < 1.
        cubic: False leaves the third power out.
        scaled: False begins every layer at the same rate.
    """

    num_blocks: int
    total_steps: int
    period: int = 10
    start: float = 0.8
    cubic: bool = True
    scaled: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.start < 1:
            raise ValueError(f"start must be between 0 and 1, got {self.start}")
        if self.total_steps < 1:
            raise ValueError(f"total_steps must be >= 1, got {self.total_steps}")

    def until(self, block: int) -> float:
        """Return t_i of a block, the share of the run after which it is frozen."""
        linear = self.start + (1 - self.start) * (block + 1) / (self.num_blocks + 1)
        return float(linear**3) if self.cubic else linear

    def draw(self, period: int, *, seed: int) -> tuple[int, ...]:
        """Return the blocks whose time has not come when the period begins; none near the end of a run."""
        done = period * self.period / self.total_steps
        return tuple(i for i in range(self.num_blocks) if done < self.until(i))

    def inclusion(self) -> tuple[float, ...]:
        """Return the share of periods in which each block trains."""
        periods = -(-self.total_steps // self.period)
        draws = [self.draw(period, seed=0) for period in range(periods)]
        return tuple(sum(i in draw for draw in draws) / periods for i in range(self.num_blocks))

    def rates(self, step: int) -> tuple[float, ...]:
        """Return what the rate of each block is multiplied by in step 0, 1, … of the run."""
        t = step / self.total_steps
        if t >= 1:
            return (0.0,) * self.num_blocks
        return tuple(self._rate(t, self.until(i)) for i in range(self.num_blocks))

    def _rate(self, t: float, until: float) -> float:
        if t >= until:
            return 0.0
        ratio = (1 + math.cos(math.pi * t / until)) / (1 + math.cos(math.pi * t))
        return ratio / until if self.scaled else ratio


@dataclass(frozen=True)
class AutoFreeze(Sampler):
    """Draws all blocks that have not frozen yet. Each period is an interval.

    Args:
        num_blocks: N.
        percentile: n, 0 <= n <= 100; larger ones freeze more at once.
    """

    num_blocks: int
    percentile: float = 50.0

    reads = ("gradient_change", "idle")

    def __post_init__(self) -> None:
        if not 0 <= self.percentile <= 100:
            raise ValueError(f"percentile must be between 0 and 100, got {self.percentile}")

    def draw(self, period: int, *, seed: int, statistics: BlockStatistics | None = None) -> tuple[int, ...]:
        """Return the blocks that go on training. At least one does."""
        assert statistics is not None
        assert statistics.idle is not None
        assert statistics.gradient_change is not None
        active = [block for block in range(self.num_blocks) if statistics.idle[block] == 0]
        change = statistics.gradient_change[active]
        if bool(change.isnan().any()):  # not two intervals yet
            return tuple(active)
        most = torch.quantile(change, self.percentile / 100)
        stays = (change >= most).nonzero()
        return tuple(active[int(stays[0]) :])

    def inclusion(self) -> tuple[float, ...]:
        """Return 1 for every block: which ones freeze is not known before."""
        return (1.0,) * self.num_blocks
