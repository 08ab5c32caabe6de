"""Which of a run's draws needs most memory."""

from torch import nn

from lisatune.lisa import LISA

__all__ = ["costly_draws", "draws_of"]

MOST_PERIODS = 1000
"""Periods that are looked at: enough for every draw that is likely."""


def costly_draws(lisa: LISA, model: nn.Module, steps: int) -> list[tuple[int, ...]]:
    """Of a run's draws, the few of which one needs most memory.

    The more numbers train, the more memory it takes. Among equals it depends on where the peak is. That of
    the highest blocks has their gradients while activations below are still there; that of the lowest keeps
    their activations until the end, and more of them where backward stops at the lowest active block; that
    of the lowest block and high others has some of both. Where backward stops there, a smaller draw can need
    more if it reaches lower.
    """
    sizes = [sum(p.numel() for p in block.values()) for block in lisa.layers.block_parameters(model)]

    def size(draw: tuple[int, ...]) -> int:
        return sum(sizes[block] for block in draw)

    def lowest(draw: tuple[int, ...]) -> int:
        return min(draw, default=len(sizes))

    draws = sorted(draws_of(lisa, steps))
    largest = [draw for draw in draws if size(draw) == max(map(size, draws))]
    costly = [
        max(largest, key=sum),
        min(largest, key=sum),
        min(largest, key=lambda draw: (lowest(draw), -sum(draw))),
    ]
    if lisa.ends_rest:
        costly.append(min(draws, key=lambda draw: (lowest(draw), -size(draw))))
    return list(dict.fromkeys(costly))


def draws_of(lisa: LISA, steps: int) -> set[tuple[int, ...]]:
    """All draws of a run of so many steps."""
    periods = range(min(-(-steps // lisa.period), MOST_PERIODS))
    return {lisa.sampler.draw(period, seed=lisa.seed) for period in periods}
