"""Change a recipe until it fits a device, or find how many more blocks fit in the memory that is left.

`find_fit` tries these changes in turn, the ones that cost least first. Each comes on top of the last. The
loss is not among them, because it never builds all its logits at once.

    no copy of a checkpoint    `save_async: false`, on a CPU: training waits while one is written
    8-bit moments              a quarter of the bytes, and the same losses (docs/results.md)
    bf16 weights               half of the bytes, with updates that are as exact
    smaller micro-batches      the same step in more parts
    stochastic rounding        two bytes less for a bf16 weight, and nearly the same losses
    cheaper ends               no slower; the ends' moments are coarser, or fewer ends train
    codes of frozen weights    int8 rows, then mixed, then NF4; exact weights move to host memory
    activation checkpointing   frozen blocks, then all: up to a third more computing
    fewer weights at once      smaller γ, or a smaller rank
    shorter sequences          longer records are cut

At the end it takes back every change that turns out not to be needed. `find_room` goes the other way: from a
recipe that fits to more weights that train at once.
"""

import math
import re
from collections.abc import Iterator, KeysView
from dataclasses import dataclass, replace
from typing import Any

from lisatune.console import byte_text, first_line
from lisatune.memory.plan import MemoryPlan, plan_memory
from lisatune.recipe import Recipe

__all__ = [
    "Changes",
    "Fit",
    "Room",
    "apply_changes",
    "assume_accelerator",
    "describe_fit",
    "find_fit",
    "find_room",
    "parse_memory_size",
]

Changes = dict[str, Any]
"""Overrides of a recipe: `section.key` and its value."""

Change = tuple[Changes, str]
"""Overrides that belong together, and the reason for them."""

NO_COPY: Change = (
    {"run.save_async": False},
    "a checkpoint is not copied, and training waits while it is written",
)

EIGHT_BIT: Change = ({"optimizer.moments": "8bit"}, "moments take a quarter of the memory")

BF16: Change = ({"run.precision": "bf16"}, "weights take half of the memory, and updates stay as exact")

STOCHASTIC: Change = (
    {"optimizer.rounding": "stochastic"},
    "weights are right on average, and rounding errors are not stored",
)

FINEST_CODES = ({"frozen_weights": "int8"},)
"""Codes of frozen weights that the search for more blocks may use; NF4 is further from the exact weights."""

SHORTEST = 256
"""Fewest tokens that the search cuts records to."""

WORTHWHILE = 0.995
"""A change is kept if the run then needs less than this share of what it needed before."""

CARD_GB = round(0.98 * 2**30)
"""Bytes for each GB in the name of a card.

In public out-of-memory messages torch's total capacity of a card is 23.53 GiB (A30), 23.64 (RTX 4090), 39.45
(A100 40GB) and 79.25 (A100 80GB): 0.98 GiB for each GB, or a little more. T4, A10G, L4 and L40S have 1/16
less, because they keep error-correcting codes there.
"""

UNITS = {
    "": CARD_GB,
    "g": CARD_GB,
    "gb": CARD_GB,
    "gib": 2**30,
    "mb": 10**6,
    "mib": 2**20,
    "tb": 10**12,
    "tib": 2**40,
}
"""Bytes of each unit that `parse_memory_size` knows, in lower case."""


@dataclass(frozen=True)
class Fit:
    """A recipe that was changed until it fits a device, or as far as that was possible."""

    size_bytes: int
    """Memory of the device."""

    fits: bool
    """Whether the recipe with `changes` needs at most `size_bytes`."""

    changes: Changes
    """Overrides for the recipe; empty if it fits as it is."""

    reasons: tuple[str, ...]
    """Why each change was chosen, in the order of `changes`."""

    plan: MemoryPlan
    """Memory with the changes. If nothing fits, this is the smallest plan that was found."""

    missing: str | None = None
    """What could not be tried because a package is not installed, and how to install it."""

    @property
    def overrides(self) -> str:
        """The changes as they are written on the command line."""
        return _write_overrides(self.changes)

    def as_dict(self) -> dict[str, Any]:
        """Return the fit as plain dicts, lists, numbers and strings."""
        return {
            "size_bytes": self.size_bytes,
            "fits": self.fits,
            "overrides": self.overrides,
            "reasons": list(self.reasons),
            "missing": self.missing,
            "plan": self.plan.as_dict(),
        }


@dataclass(frozen=True)
class Room:
    """The most weights that can train at once on a device."""

    changes: Changes
    """Overrides for the recipe."""

    plan: MemoryPlan
    """Memory with the changes."""

    @property
    def overrides(self) -> str:
        """The changes as they are written on the command line."""
        return _write_overrides(self.changes)

    def as_dict(self) -> dict[str, Any]:
        """Return the room as plain dicts, lists, numbers and strings."""
        return {"overrides": self.overrides, "plan": self.plan.as_dict()}


def find_fit(
    recipe: Recipe,
    size_bytes: int,
    *,
    ranks: int = 1,
    length: int | None = None,
    first: MemoryPlan | None = None,
) -> Fit:
    """Find the cheapest change of settings with which a run fits a device.

    Args:
        recipe: the recipe to change.
        size_bytes: memory of the device in bytes. The reserve of `MemoryPlan.needed_bytes` is kept free.
        ranks: number of devices of this size that share the model, as for `plan_memory`.
        length: tokens of the longest sequence. Default: `data.max_length`, or what the model can read.
        first: the plan of the unchanged recipe, if there is one already.

    Returns:
        The changes and the plan with them. If nothing fits, `fits` is False and the plan is the smallest that
        was found.

    Raises:
        ValueError, OSError, RuntimeError: the recipe cannot be planned, as in `plan_memory`.

    Example:
        >>> fit = find_fit(recipe, 24 * 10**9)
        >>> fit.fits, fit.overrides, fit.plan.needed_bytes
    """
    planned = first or plan_memory(recipe, ranks=ranks, length=length)
    if planned.needed_bytes <= size_bytes:
        return Fit(size_bytes, True, {}, (), planned)
    length = planned.length
    plans = _Plans(recipe, {}, planned, ranks=ranks)
    best: Changes = {}
    reasons: dict[str, str] = {}
    applied: list[KeysView[str]] = []
    for stage in _list_stages(recipe, length, ranks, planned.num_blocks):
        for change, reason in stage:
            most = WORTHWHILE * planned.needed_bytes
            made = plans.make(best | change, below=most)
            if made is None:
                continue
            best, planned = best | change, made
            reasons |= dict.fromkeys(change, reason)
            applied = [keys for keys in applied if keys != change.keys()] + [change.keys()]
            if planned.needed_bytes <= size_bytes:
                for together in [*applied][-2::-1]:  # the costliest first
                    fewer = {key: value for key, value in best.items() if key not in together}
                    made = plans.make(fewer, below=size_bytes + 1)
                    if made is not None:
                        best, planned = fewer, made
                why = tuple(reasons[key] for key in best)
                return Fit(size_bytes, True, best, why, planned, plans.missing)
    return Fit(size_bytes, False, best, tuple(reasons[key] for key in best), planned, plans.missing)


def find_room(recipe: Recipe, fit: Fit, *, ranks: int = 1) -> Room | None:
    """Find the most weights that can train at once on a device that the recipe fits.

    Args:
        recipe: the recipe to change.
        fit: the result of `find_fit` for it.
        ranks: as for `find_fit`.

    Returns:
        None if the method cannot train more weights, if no more of them fit, or if the recipe fits only with
        changes other than those of optimizer state and weights' dtype.
    """
    others = recipe.method.alternatives(fit.plan.num_blocks)
    coarser = [changes for changes, _ in _list_coarser_state(recipe)]
    coarser += [_name_keys(each) for each in others.coarser_weights if each in FINEST_CODES and ranks == 1]
    steps = [_name_keys(each) for each in others.more_weights]
    if not steps or not fit.fits or not fit.changes.keys() <= {key for each in coarser for key in each}:
        return None

    plans = _Plans(recipe, fit.changes, fit.plan, ranks=ranks)
    also, least, most = fit.changes, fit.plan, plans.make(fit.changes | steps[-1])
    for each in coarser:
        if most is None or most.needed_bytes <= fit.size_bytes:
            break
        leaner, leaner_most = plans.make(also | each), plans.make(also | each | steps[-1])
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
        made = plans.make(also | steps[middle])
        if made is None:
            break
        if made.needed_bytes <= fit.size_bytes:
            room, low, least = Room(also | steps[middle], made), middle, made
        else:
            high, most = middle, made
    return room


class _Plans:
    """Plans of one recipe with different changes. No change is planned twice.

    Args:
        recipe: the recipe without changes.
        changes: changes that are planned already.
        plan: their plan. The length of its sequences is that of all others, unless a change sets it.
        ranks: as for `plan_memory`.
    """

    def __init__(self, recipe: Recipe, changes: Changes, plan: MemoryPlan, *, ranks: int) -> None:
        self._recipe, self._length, self._ranks = recipe, plan.length, ranks
        self._made: dict[frozenset[tuple[str, Any]], MemoryPlan | None] = {frozenset(changes.items()): plan}
        self.missing: str | None = None
        """What the first change that needs a missing package says about it."""

    def make(self, changes: Changes, *, below: float = math.inf) -> MemoryPlan | None:
        """Plan the recipe with these changes.

        Returns:
            None if the changes do not work together, need a package that is missing, or need `below` bytes
            or more.
        """
        key = frozenset(changes.items())
        if key not in self._made:
            made = self._plan(changes, below)
            if made is not None and made.needed_bytes >= below:  # perhaps not the plan of its costliest draw
                return None
            self._made[key] = made
        made = self._made[key]
        return made if made is not None and made.needed_bytes < below else None

    def _plan(self, changes: Changes, below: float) -> MemoryPlan | None:
        length = changes.get("data.max_length", self._length)
        try:
            recipe = apply_changes(self._recipe, changes)
            return plan_memory(recipe, ranks=self._ranks, length=length, too_many_bytes=below)
        except ImportError as error:
            self.missing = self.missing or first_line(error)
        except ValueError:
            pass
        return None


def _list_stages(recipe: Recipe, length: int, ranks: int, num_blocks: int) -> Iterator[list[Change]]:
    """List the changes to try, in the order of the table above."""
    run, others = recipe.run, recipe.method.alternatives(num_blocks)
    coarser = _list_coarser_state(recipe)
    yield [NO_COPY] if run.save_async and run.device == "cpu" else []  # it is in host memory
    yield [each for each in coarser if each is EIGHT_BIT]
    yield [each for each in coarser if each is BF16]
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
    yield [(_name_keys(change), "the ends cost less, at the same speed") for change in others.cheaper_ends]
    codes = "frozen weights are codes, and exact in host memory"
    yield [(_name_keys(change), codes) for change in others.coarser_weights if ranks == 1]
    if run.activation_checkpointing is not True:
        kinds: list[Any] = [True] if run.activation_checkpointing else ["frozen", True]
        what = {
            "frozen": "frozen blocks compute their activations again",
            True: "all blocks compute them again",
        }
        yield [({"run.activation_checkpointing": kind}, what[kind]) for kind in kinds]
    yield [(_name_keys(change), "fewer weights train at once") for change in others.fewer_weights]
    shorter = [length >> shift for shift in range(1, length.bit_length()) if length >> shift >= SHORTEST]
    yield [({"data.max_length": each}, "longer records are cut") for each in shorter]


def _list_coarser_state(recipe: Recipe) -> list[Change]:
    """List state and weights that take less memory and learn as well, or nearly; the finest first."""
    optimizer = recipe.optimizer
    changes = [EIGHT_BIT] if optimizer.moments == "fp32" else []
    if recipe.run.precision != "bf16":
        changes.append(BF16)
    if optimizer.rounding == "exact":
        changes.append(STOCHASTIC)
    return changes


def _name_keys(change: Changes) -> Changes:
    """Turn a method's own keys into those of a recipe."""
    return {f"method.{key}": value for key, value in change.items()}


def apply_changes(recipe: Recipe, changes: Changes) -> Recipe:
    """Return the recipe with these overrides.

    Raises:
        ValueError: the recipe refuses them.
    """
    for path, value in changes.items():
        section, key = path.split(".")
        recipe = replace(recipe, **{section: replace(getattr(recipe, section), **{key: value})})
    return recipe


def assume_accelerator(recipe: Recipe) -> Recipe:
    """Return the recipe for an accelerator if its device is `auto`, whatever this machine has."""
    return apply_changes(recipe, {"run.device": "cuda"}) if recipe.run.device == "auto" else recipe


def parse_memory_size(text: str) -> int:
    """Read an amount of memory such as `24GB`, `24GiB`, `81559MiB` or `24` (GB) as bytes.

    GB are those in a card's name: `CARD_GB`. All other units are what they say.

    Raises:
        ValueError: the text is no amount of memory, or not above 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None or float(match[1]) <= 0:
        raise ValueError(f"--gpu must be an amount of memory such as 24GB, 24GiB or 24, got {text!r}")
    return round(float(match[1]) * unit)


def describe_fit(fit: Fit) -> str:
    """Say in a sentence whether the recipe fits, or what to change."""
    size, needed = byte_text(fit.size_bytes), byte_text(fit.plan.needed_bytes)
    if not fit.fits:
        smallest = f"with {fit.overrides} the run" if fit.changes else "the run"
        return (
            f"nothing fits {size}: {smallest} still needs {needed}; use a smaller model, a larger device, "
            "or more of them (--ranks)"
        )
    if not fit.changes:
        return f"fits {size}: needs {needed}"
    return f"fits {size} with {fit.overrides}: needs {needed}"


def _write_overrides(changes: Changes) -> str:
    """Write changes as they are given on the command line."""
    values = {key: str(value).lower() if isinstance(value, bool) else value for key, value in changes.items()}
    return " ".join(f"{key}={value}" for key, value in values.items())
