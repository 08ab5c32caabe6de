"""What to change so that a run fits a device, in the order that costs least.

The loss never builds its full logits, so nothing can be saved there. Then come, each on top of the last:

    8-bit moments              a quarter of the bytes, and the same losses (docs/results.md)
    smaller micro-batches      the same step in more parts
    stochastic rounding        two bytes less for a bf16 weight, and nearly the same losses
    cheaper ends               no slower; the ends' moments are coarser, or fewer ends train
    activation checkpointing   frozen blocks, then all: up to a third more computing
    fewer weights at once      smaller γ, or a smaller rank
    shorter sequences          what is longer is cut

A change that turns out not to be needed is taken back. `lisatune.memory.fit` is the reverse.
"""

import re
from collections.abc import Iterator, KeysView
from dataclasses import dataclass, replace
from typing import Any

from lisatune.console import byte_text
from lisatune.memory.plan import MemoryPlan, plan_memory
from lisatune.recipe import Recipe

__all__ = [
    "Change",
    "Changes",
    "Fit",
    "Room",
    "advice",
    "attempt",
    "coarser_state",
    "find_fit",
    "find_room",
    "memory_size",
    "on_accelerator",
    "override_text",
]

SHORTEST = 256


UNITS = {
    "": 10**9,
    "g": 10**9,
    "gb": 10**9,
    "gib": 2**30,
    "mb": 10**6,
    "mib": 2**20,
    "tb": 10**12,
    "tib": 2**40,
}


Changes = dict[str, Any]
"""Overrides: `section.key` and its value."""


Change = tuple[Changes, str]
"""What goes together, and why."""


EIGHT_BIT: Change = ({"optimizer.moments": "8bit"}, "moments take a quarter of the memory")


STOCHASTIC: Change = (
    {"optimizer.rounding": "stochastic"},
    "weights are right on average, and what rounding lost isn't kept",
)


@dataclass(frozen=True)
class Fit:
    """What the search found."""

    size_bytes: int
    """Memory of the device."""

    fits: bool
    """Whether the recipe, with `changes`, needs no more."""

    changes: Changes
    """What to override; empty where nothing has to change."""

    reasons: tuple[str, ...]
    """Why each change was chosen, in the order of `changes`."""

    plan: MemoryPlan
    """Memory with the changes; where nothing fits, the smallest that was found."""

    @property
    def overrides(self) -> str:
        """The changes as they are written on the command line."""
        return override_text(self.changes)

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "size_bytes": self.size_bytes,
            "fits": self.fits,
            "overrides": self.overrides,
            "reasons": list(self.reasons),
            "plan": self.plan.as_dict(),
        }


def memory_size(text: str) -> int:
    """Read `24GB`, `24GiB`, `81559MiB` or `24`, which means GB, as bytes.

    Raises:
        ValueError: it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None or float(match[1]) <= 0:
        raise ValueError(f"--gpu must be an amount of memory such as 24GB, 24GiB or 24, got {text!r}")
    return round(float(match[1]) * unit)


def find_fit(
    recipe: Recipe,
    size_bytes: int,
    *,
    ranks: int = 1,
    length: int | None = None,
    first: MemoryPlan | None = None,
) -> Fit:
    """Search for the cheapest change of settings that lets a run fit.

    Args:
        recipe: what is asked for.
        size_bytes: memory of the device, of which the plan's reserve is kept free.
        ranks: as for `plan_memory`.
        length: tokens of the longest sequence. Default: `data.max_length`.
        first: the recipe's own plan, where it was made before.
    """
    planned = first or plan_memory(recipe, ranks=ranks, length=length)
    length = planned.length
    best: Changes = {}
    reasons: dict[str, str] = {}
    applied: list[KeysView[str]] = []
    if planned.needed_bytes <= size_bytes:
        return Fit(size_bytes, True, {}, (), planned)

    for stage in _stages(recipe, length, ranks, planned.num_blocks):
        for change, reason in stage:
            made = attempt(recipe, best | change, ranks=ranks, length=length)
            if made is None or made.needed_bytes >= 0.995 * planned.needed_bytes:
                continue
            best, planned = best | change, made
            reasons |= dict.fromkeys(change, reason)
            applied = [keys for keys in applied if keys != change.keys()] + [change.keys()]
            if planned.needed_bytes <= size_bytes:
                for together in [*applied][-2::-1]:  # the costliest first
                    fewer = {key: value for key, value in best.items() if key not in together}
                    made = attempt(recipe, fewer, ranks=ranks, length=length)
                    if made is not None and made.needed_bytes <= size_bytes:
                        best, planned = fewer, made
                return Fit(size_bytes, True, best, tuple(reasons[key] for key in best), planned)
    return Fit(size_bytes, False, best, tuple(reasons[key] for key in best), planned)


def on_accelerator(recipe: Recipe) -> Recipe:
    """The recipe for the device that `--gpu` is about, whatever this machine has."""
    return changed(recipe, {"run.device": "cuda"}) if recipe.run.device == "auto" else recipe


def attempt(recipe: Recipe, changes: Changes, *, ranks: int, length: int) -> MemoryPlan | None:
    """Plan the recipe with these changes; None where they can't be had together, or without bitsandbytes."""
    length = changes.get("data.max_length", length)
    try:
        return plan_memory(changed(recipe, changes), ranks=ranks, length=length)
    except (ValueError, ImportError):
        return None


def changed(recipe: Recipe, changes: Changes) -> Recipe:
    """The recipe with overrides."""
    for path, value in changes.items():
        section, key = path.split(".")
        recipe = replace(recipe, **{section: replace(getattr(recipe, section), **{key: value})})
    return recipe


def override_text(changes: Changes) -> str:
    """The changes as they are written on the command line."""
    return " ".join(f"{key}={_text(value)}" for key, value in changes.items())


def coarser_state(recipe: Recipe, ranks: int) -> list[Change]:
    """Optimizer state that takes less and learns as well, or nearly, the finest first."""
    optimizer = recipe.optimizer
    changes = [EIGHT_BIT] if optimizer.moments == "fp32" else []
    if optimizer.rounding == "exact" and recipe.run.precision == "bf16":
        changes.append(STOCHASTIC)
    return changes if ranks == 1 else []


def _stages(recipe: Recipe, length: int, ranks: int, num_blocks: int) -> Iterator[list[Change]]:
    run, others = recipe.run, recipe.method.alternatives(num_blocks)
    coarser = coarser_state(recipe, ranks)
    yield [each for each in coarser if each is EIGHT_BIT]
    halves = (2**power for power in range(1, run.batch_size.bit_length()))
    yield [
        (
            {"run.batch_size": run.batch_size // by, "run.accumulation": run.accumulation * by},
            "the same step in parts",
        )
        for by in halves
        if run.batch_size % by == 0
    ]
    yield [each for each in coarser if each is STOCHASTIC]
    yield [(_keyed(change), "the ends cost less, at the same speed") for change in others.cheaper_ends]
    if run.activation_checkpointing is not True:
        kinds: list[Any] = [True] if run.activation_checkpointing else ["frozen", True]
        what = {
            "frozen": "frozen blocks compute their activations again",
            True: "all blocks compute them again",
        }
        yield [({"run.activation_checkpointing": kind}, what[kind]) for kind in kinds]
    yield [(_keyed(change), "fewer weights train at once") for change in others.fewer_weights]
    shorter = [length >> shift for shift in range(1, length.bit_length()) if length >> shift >= SHORTEST]
    yield [({"data.max_length": each}, "longer records are cut") for each in shorter]


def _keyed(change: Changes) -> Changes:
    return {f"method.{key}": value for key, value in change.items()}


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


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
        for change in recipe.method.alternatives(fit.plan.num_blocks).more_weights
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


def advice(fit: Fit) -> str:
    """Say in a sentence whether it fits, or what to change."""
    size, needed = byte_text(fit.size_bytes), byte_text(fit.plan.needed_bytes)
    if not fit.fits:
        return (
            f"nothing fits {size}: {fit.overrides or 'as it is it'} still needs {needed}; use run.precision: "
            "bf16, a smaller model, a larger device, or more of them (--ranks)"
        )
    if not fit.changes:
        return f"fits {size}: needs {needed}"
    return f"fits {size} with {fit.overrides}: needs {needed}"
