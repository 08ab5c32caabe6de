"""The draws of a sampler: of a period, and of a whole run before it begins."""

import math
import operator
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from lisatune.lisa.samplers import Sampler
from lisatune.lisa.statistics import BlockStatistics
from lisatune.lisa.weight_history import SAMPLES

__all__ = ["choose_period", "count_visits", "draw_blocks", "simulate_draws"]

LONGEST_AUTO_PERIOD = 50


def draw_blocks(
    sampler: Sampler, period: int, *, seed: int, statistics: BlockStatistics | None = None
) -> tuple[int, ...]:
    """Draw the blocks of a period, with the statistics if the sampler reads any.

    If `statistics` is None, a sampler that reads them gets norms of 1 and 0 visits for every block.

    Raises:
        ValueError: the sampler returned something else than numbers of different blocks.
    """
    draw: Any = sampler.draw
    if not sampler.reads:
        return _check_draw(draw(period, seed=seed), sampler, period)
    with unset_fake_temporarily():  # a sampler reads real numbers, also in a memory plan
        statistics = statistics or _make_even_statistics(sampler, Counter())
        return _check_draw(draw(period, seed=seed, statistics=statistics), sampler, period)


def _check_draw(drawn: Any, sampler: Sampler, period: int) -> tuple[int, ...]:
    """Return what a sampler drew as whole numbers in rising order."""
    try:
        blocks = sorted(map(operator.index, drawn))
    except TypeError:
        blocks = [-1]
    if len(set(blocks)) < len(blocks) or not set(blocks) <= set(range(sampler.num_blocks)):
        raise ValueError(
            f"{type(sampler).__name__}.draw must return different numbers of blocks, from 0 to "
            f"{sampler.num_blocks - 1}, and for period {period} it returned {drawn!r}"
        )
    return tuple(blocks)


def simulate_draws(sampler: Sampler, *, seed: int, periods: int) -> Iterator[tuple[int, ...]]:
    """Yield the blocks of the first `periods` periods: exact, unless the sampler reads statistics.

    For a sampler that reads them, every norm is 1 and visits are those of the draws before.
    """
    counts: Counter[int] = Counter()
    last: dict[int, int] = {}
    for period in range(periods):
        statistics = None
        if sampler.reads:
            idle = {block: period - last.get(block, -1) - 1 for block in range(sampler.num_blocks)}
            statistics = _make_even_statistics(sampler, counts, idle)
        drawn = draw_blocks(sampler, period, seed=seed, statistics=statistics)
        counts.update(drawn)
        last |= dict.fromkeys(drawn, period)
        yield drawn


def count_visits(sampler: Sampler, *, seed: int, periods: int) -> tuple[int, ...]:
    """Count how often each block is drawn in the first `periods` periods; see `simulate_draws`."""
    draws = simulate_draws(sampler, seed=seed, periods=periods)
    counts = Counter(block for drawn in draws for block in drawn)
    return tuple(counts[block] for block in range(sampler.num_blocks))


def choose_period(sampler: Sampler, *, seed: int, total_steps: int) -> int:
    """Choose K: the longest period, at most 50, with which every block that can be drawn trains twice.

    It is 1 if `total_steps` are too few for that.

    Raises:
        ValueError: `total_steps` is below 1.
    """
    if total_steps < 1:
        raise ValueError(f"total_steps must be >= 1, got {total_steps}")
    wanting = {block: 2 for block, chance in enumerate(sampler.inclusion()) if chance > 0}
    periods = 0
    for drawn in simulate_draws(sampler, seed=seed, periods=total_steps):
        if not wanting:
            break
        for block in drawn:
            wanting[block] = wanting.get(block, 0) - 1
        wanting = {block: left for block, left in wanting.items() if left > 0}
        periods += 1
    return max(1, min(total_steps // max(periods, 1), LONGEST_AUTO_PERIOD))


def _make_even_statistics(
    sampler: Sampler, counts: Mapping[int, int], idle: Mapping[int, int] | None = None
) -> BlockStatistics:
    """Make statistics in which only visits and rests differ between blocks."""
    with unset_fake_temporarily():
        read = {name: torch.ones(sampler.num_blocks, dtype=torch.float64) for name in sampler.reads}
        for name, counted in (("visits", counts), ("idle", idle or {})):
            if name in read:
                numbers = [counted.get(block, 0) for block in range(sampler.num_blocks)]
                read[name] = torch.tensor(numbers, dtype=torch.float64)
        if "weight_history" in read:  # nothing recorded yet
            read["weight_history"] = torch.full((sampler.num_blocks, sampler.records, SAMPLES), math.nan)
    return BlockStatistics(**read)
