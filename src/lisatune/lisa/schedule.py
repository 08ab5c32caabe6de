"""Which blocks train now: the contract between a method that freezes blocks and the code that asks it.

A `BlockSchedule` is attached to a model and its optimizer and works by its own hooks; a training loop calls
nothing. `LISA` is one. The base class is the schedule of a method that freezes nothing during a run, such as
full fine-tuning, or adapters beside frozen weights.
"""

from collections.abc import Sequence
from typing import Any

from lisatune.lisa.budget import Budget
from lisatune.nn.layers import LayerMap
from lisatune.nn.units import UnitMap

__all__ = ["BlockSchedule", "find_extreme_draws"]


class BlockSchedule:
    """Tells which blocks train, for the log, the summary, the outline and the memory plan.

    A subclass overrides what differs. If it changes blocks during a run, it must save its position in
    `optimizer.state_dict()` (see `torch.optim.Optimizer.register_state_dict_post_hook`), so that a run
    resumes exactly, and it must choose the same blocks on every rank.
    """

    period: int | None = None
    """Optimizer steps between two changes of blocks; None if changes are irregular, or never come."""

    active_blocks: tuple[int, ...] | None = None
    """Blocks that train now, in rising order; None if which blocks train never changes."""

    layers: LayerMap | None = None
    """What indices of blocks count: blocks, or units (`lisatune.nn.units`). None: the model's blocks."""

    @property
    def word(self) -> str:
        """What one index counts: "block" or "unit"."""
        return "unit" if isinstance(self.layers, UnitMap) else "block"

    @property
    def ends_rest(self) -> bool:
        """Whether nothing before the blocks trains in some steps, so that backward can stop at a block."""
        return False

    @property
    def idle_row_numbers(self) -> int:
        """How many numbers of trainable weights never move, because only some of the rows train."""
        return 0

    def lr_factor(self, block: int) -> float:
        """Return what the learning rate of a block's param group is multiplied by in a step."""
        return 1.0

    def describe(self) -> dict[str, Any]:
        """Return what `metrics.jsonl` records before each step, as JSON values, such as the active blocks."""
        return {}

    def summarize(self) -> dict[str, Any]:
        """Return what `summary.json` records at the end of a run, as JSON values, such as the visits."""
        return {}

    def check(self) -> None:
        """Check at the end of a run that the right weights trained.

        Raises:
            ProofError: the wrong weights trained.
        """

    @property
    def coverage_is_exact(self) -> bool:
        """Whether `planned_visits` is exact; False if it is a simulation."""
        return True

    def planned_visits(self, total_steps: int) -> tuple[int, ...]:
        """Return in how many periods each block will train in a run; empty if no block ever freezes."""
        return ()

    def possible_draws(self, total_steps: int) -> set[tuple[int, ...]]:
        """Return the sets of blocks that may train at once in a run; the memory plan takes the costliest.

        Each is a tuple of block indices in rising order. Empty if which blocks train never changes.
        """
        return set()

    def hold(self, blocks: Sequence[int]) -> None:
        """Train these blocks from now on and change no more, to plan or measure what they cost.

        Args:
            blocks: a set out of `possible_draws`, or all blocks that occur in these sets.

        Raises:
            NotImplementedError: a subclass names possible draws and does not override this.
        """
        raise NotImplementedError(
            f"{type(self).__name__} names possible draws, so it must be able to hold one"
        )

    def settle(self) -> None:
        """Bring the model's weights into the form in which they are written, at the end of a run."""

    def host_bytes(self) -> int:
        """Count the bytes that are in host memory because blocks are frozen."""
        return 0


def find_extreme_draws(sizes: Sequence[int], active: int, *, most: int | None = None) -> set[tuple[int, ...]]:
    """Return extremes among all draws of γ blocks, for a schedule that does not know its draws beforehand.

    They are the largest blocks, and among blocks of equal size the highest, the lowest, and block 0 with the
    highest. One of them has the highest peak of memory; which one depends on where in a step the peak falls.

    Args:
        sizes: parameters of each block.
        active: γ, 0 <= γ <= number of blocks.
        most: draws hold as many units as fit into this number of parameters, not γ.
    """
    blocks = range(len(sizes))
    budget = Budget.of_count(len(sizes), active) if most is None else Budget(tuple(sizes), most)
    highest = sorted(blocks, key=lambda block: (sizes[block], block), reverse=True)
    lowest = sorted(blocks, key=lambda block: (-sizes[block], block))
    chosen = [budget.take(highest), budget.take(lowest)]
    if active:
        chosen.append(budget.take([0, *[block for block in highest if block]]))
    return {tuple(sorted(draw)) for draw in chosen}
