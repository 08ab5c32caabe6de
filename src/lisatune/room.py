"""How many blocks could train at once in memory that a fitting run leaves free.

γ decides how much LISA learns, while coarser optimizer state costs no loss, or hardly any (docs/results.md):
so what is left is best spent on blocks, with such state where not all blocks fit without.
"""

from dataclasses import dataclass
from typing import Any

from lisatune.fit import Changes, Fit, attempt, coarser_state, override_text
from lisatune.plan import MemoryPlan
from lisatune.recipe import Recipe

__all__ = ["Room", "find_room"]


@dataclass(frozen=True)
class Room:
    """The most that trains at once and still fits."""

    changes: Changes
    """What to override in the recipe."""

    plan: MemoryPlan
    """Memory with it."""

    @property
    def overrides(self) -> str:
        """The changes as they are written on the command line."""
        return override_text(self.changes)

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"overrides": self.overrides, "plan": self.plan.as_dict()}


def find_room(recipe: Recipe, fit: Fit, *, ranks: int = 1) -> Room | None:
    """Search for the most weights that can train at once on a device that the recipe fits.

    Args:
        recipe: what is asked for.
        fit: what `find_fit` found for it.
        ranks: as for `plan_memory`.

    Returns:
        None where the method has no more to train, where nothing more fits, and where the recipe takes other
        changes than those of optimizer state to fit at all.
    """
    coarser = [changes for changes, _ in coarser_state(recipe, ranks)]
    steps = [
        {f"method.{key}": value for key, value in change.items()}
        for change in recipe.method.more_weights(fit.plan.num_blocks)
    ]
    if not steps or not fit.fits or not fit.changes.keys() <= {key for each in coarser for key in each}:
        return None

    def plan(changes: Changes) -> MemoryPlan | None:
        return attempt(recipe, changes, ranks=ranks, length=fit.plan.length)

    also, least, most = fit.changes, fit.plan, plan(fit.changes | steps[-1])
    for each in coarser:
        if most is None or most.needed_bytes <= fit.size_bytes:
            break
        leaner, leaner_most = plan(also | each), plan(also | each | steps[-1])
        if leaner is not None and leaner_most is not None:
            also, least, most = also | each, leaner, leaner_most
    if most is None:
        return None
    if most.needed_bytes <= fit.size_bytes:
        return Room(also | steps[-1], most)

    room, low, high = None, -1, len(steps) - 1
    while high - low > 1:  # memory is nearly linear in the number of blocks
        share = (fit.size_bytes - least.needed_bytes) / (most.needed_bytes - least.needed_bytes)
        middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        made = plan(also | steps[middle])
        if made is None:
            break
        if made.needed_bytes <= fit.size_bytes:
            room, low, least = Room(also | steps[middle], made), middle, made
        else:
            high, most = middle, made
    return room
