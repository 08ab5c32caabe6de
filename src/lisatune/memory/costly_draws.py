"""Which draws of a run a memory plan has to trace: those that could have the highest peak."""

from collections.abc import Sequence

from lisatune.methods.build import Built
from lisatune.nn.units import UnitMap

__all__ = ["find_costly_draws", "list_costly_draws"]

UNIT_SLACK = 0.1
"""Share by which draws of units differ in size and count as equally large."""


def list_costly_draws(possible: set[tuple[int, ...]], built: Built) -> list[tuple[int, ...]]:
    """Pick the draws of a built model's schedule that could have the highest peak; see `find_costly_draws`.

    Args:
        possible: the schedule's `possible_draws`.
        built: the model.
    """
    sizes, ends_rest = built.block_sizes(), built.schedule.ends_rest
    if not isinstance(built.drawn, UnitMap):
        return find_costly_draws(possible, sizes, ends_rest=ends_rest)
    of_block, units = built.drawn.of_block, built.drawn.block_parameters(built.model)
    widths = [max(p.shape[-1] for p in unit.values()) for unit in units]

    def inputs(draw: tuple[int, ...]) -> int:
        """Count the numbers that a draw keeps of each token: units of a block share inputs of one width."""
        return sum(width for _, width in {(of_block[unit], widths[unit]) for unit in draw})

    costly = find_costly_draws(possible, sizes, ends_rest=ends_rest, slack=UNIT_SLACK)
    return list(dict.fromkeys([*costly, max(sorted(possible), key=inputs)]))


def find_costly_draws(
    possible: set[tuple[int, ...]], sizes: Sequence[int], *, ends_rest: bool, slack: float = 0.0
) -> list[tuple[int, ...]]:
    """Pick the draws that could have the highest peak.

    Which one does depends on where the peak falls, so a few candidates are returned. The more numbers train,
    the more memory a step takes. Among equal draws, the highest blocks have their gradients while the
    activations below are still there; the lowest keep their activations until the end; the lowest block with
    high others has some of both. Where backward stops at the lowest active block, a smaller draw can need
    more if it reaches lower.

    Args:
        possible: a schedule's `possible_draws`.
        sizes: number of parameters of each block.
        ends_rest: whether backward can stop at the lowest active block.
        slack: share by which a draw may be smaller than the largest and still count as equal to it. Draws of
            units fill their budget by different amounts.
    """

    def size(draw: tuple[int, ...]) -> int:
        return sum(sizes[block] for block in draw)

    def lowest(draw: tuple[int, ...]) -> int:
        return min(draw, default=len(sizes))

    draws = sorted(possible)
    most = max(map(size, draws))
    largest = [draw for draw in draws if size(draw) >= (1 - slack) * most]
    costly = [
        max(largest, key=sum),
        min(largest, key=sum),
        min(largest, key=lambda draw: (lowest(draw), -sum(draw))),
    ]
    if slack:
        costly.append(max(largest, key=size))
    if ends_rest:
        costly.append(min(draws, key=lambda draw: (lowest(draw), -size(draw))))
    return list(dict.fromkeys(costly))
