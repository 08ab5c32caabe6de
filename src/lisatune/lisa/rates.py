"""The learning rate of a block: how it follows from the block's chance to train, and how a step gets it.

A block that trains in a share π of the steps moves less far at the same learning rate than one that always
trains. Where the noise of gradients decides how large a rate may be, that of Adam goes with the square root
of the data behind an update (Malladi et al., On the SDEs and Scaling Rules for Adaptive Gradient Algorithms,
2022). A block sees a share π of the data, and 1/√π makes up for it. One rate, that of full fine-tuning, then
serves every γ; π = 1 changes nothing. Measured in docs/results.md.

`LISA` scales rates for the length of a step (`StepRates`), so schedules, loggers and checkpoints see the
param groups as they were built. `scale_block_lr` scales those of the groups themselves, once and for good.
"""

import functools
import logging
import types
from collections.abc import Collection, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from lisatune.distributed import ranks

__all__ = ["MARK", "Scaling", "StepRates", "compute_lr_factors", "mark_as_scaled", "scale_block_lr"]

Scaling = Literal["sqrt", "inverse", "none"]

POWER: dict[Scaling, float] = {"sqrt": -0.5, "inverse": -1.0, "none": 0.0}

MARK = "lr_scaling"
"""Key of a param group whose rate must not be scaled (again)."""

LOG = logging.getLogger("lisatune")

Group = dict[str, Any]


def compute_lr_factors(chances: Sequence[float], scaling: Scaling) -> tuple[float, ...]:
    """Return each block's factor, 1/√π, 1/π or 1; it is 1 for a block that never trains, π = 0."""
    return tuple(chance ** POWER[scaling] if chance > 0 else 1.0 for chance in chances)


def scale_block_lr(optimizer: Optimizer, chances: Sequence[float], scaling: Scaling = "sqrt") -> None:
    """Multiply the learning rate of each block's param groups by its factor; that of the ends stays.

    `LISA(lr_scaling=…)` does the same in each step, for any param groups. It leaves the groups alone that
    this function has scaled. Call it once, before a schedule reads the rates. A schedule that sets rates of
    its own, such as `OneCycleLR`, undoes it.

    Args:
        optimizer: over groups of `param_groups`, as `build_adamw` makes it.
        chances: π of each block, 0 <= π <= 1: γ/N for all, or `Sampler.inclusion()`.
        scaling: the factor is 1/√π for `sqrt`, 1/π for `inverse`, 1 for `none`.

    Raises:
        ValueError: there are not as many chances as blocks with param groups of their own, or rates are
            scaled already.
    """
    blocks: dict[int, list[Group]] = {}
    for group in optimizer.param_groups:
        kind, _, block = group.get("layer", "").partition(" ")
        if kind == "block":
            blocks.setdefault(int(block), []).append(group)
    if len(blocks) != len(chances):
        raise ValueError(
            f"got {len(chances)} chances for {len(blocks)} blocks with param groups of their own; give one "
            "per block, to an optimizer over lisatune.param_groups(model, lisatune.find_layers(model))"
        )
    if any(MARK in group for groups in blocks.values() for group in groups):
        raise ValueError("the learning rates of these blocks are scaled already; call scale_block_lr once")
    for block, factor in enumerate(compute_lr_factors(chances, scaling)):
        for group in blocks[block]:
            group["lr"] = group["lr"] * factor  # not in place: groups may share one tensor
        mark_as_scaled(blocks[block], scaling)


def mark_as_scaled(groups: Sequence[Group], scaling: Scaling) -> None:
    """Mark param groups whose rates are as they must be, so that `LISA` leaves them alone."""
    for group in groups:
        group[MARK] = scaling


class StepRates:
    """Gives the param groups the learning rates of a step, and puts the groups back after it.

    In a step a rate is multiplied by the factor of its block (not in groups with `MARK`), and by i/(warmup +
    1) at step i of a period if its layer has just thawed. During the step `param_groups`, the same list,
    holds copies of the groups. A group whose parameters need several rates is there in parts, in the order
    of their first parameters. What the optimizer writes into a copy, such as a count of steps, goes to its
    group.

    The groups are put back too if the step raises. If updates are made in backward, the rates of a step are
    there from the first update to the end of `step()`; if backward raises, they stay until the next step,
    `state_dict()` or `load_state_dict()`.

    Args:
        optimizer: its `step` is wrapped, to put the groups back if it raises.
        blocks: the parameters of each block.
        chances: each block's chance to train in a period.
        scaling: how the factor of a block follows from its chance.
        warmup: steps of a period over which rates of thawed layers ramp up; 0 leaves them as they are.

    Raises:
        ValueError: there is a warm-up, and a group has no learning rate; or there are not as many chances as
            blocks.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        blocks: Sequence[tuple[nn.Parameter, ...]],
        chances: Sequence[float],
        scaling: Scaling,
        warmup: int,
    ) -> None:
        if warmup and any(group["lr"] is None for group in optimizer.param_groups):
            raise ValueError(
                f"warmup needs a learning rate to ramp, and {type(optimizer).__name__} has lr=None; "
                "give it one, or set warmup=0"
            )
        if len(chances) != len(blocks):
            raise ValueError(
                f"the sampler's inclusion() gives {len(chances)} chances for {len(blocks)} blocks; give one "
                "per block"
            )
        self._optimizer, self._blocks, self._warmup = optimizer, blocks, warmup
        self._scaling = scaling
        self.set_chances(chances)
        self._groups: list[Group] = []
        self._swapped: list[tuple[Group, list[Group], list[Group]]] = []
        """Groups, the parts that stand for them, and copies of the parts as they were put in."""
        self._step = self._guard_step()
        self._hook = optimizer.register_step_post_hook(self._end_step)
        # The first of all hooks: a schedule or a log in another one must see the groups as they were built.
        hooks: Any = optimizer._optimizer_step_post_hooks  # an OrderedDict, which torch's types do not say
        hooks.move_to_end(self._hook.id, last=False)
        self._announce()

    def set_chances(self, chances: Sequence[float]) -> None:
        """Scale by other chances from now on, not inside a step."""
        self.set_factors(compute_lr_factors(chances, self._scaling))

    def set_factors(self, factors: Sequence[float]) -> None:
        """Multiply the rate of each block by these factors from now on, not inside a step."""
        self._of_block = tuple(factors)
        pairs = zip(self._blocks, self._of_block, strict=True)
        self._factors = {p: factor for block, factor in pairs for p in block if factor != 1}

    def factor(self, block: int) -> float:
        """Return what the rate in the param group of a block is multiplied by in a step."""
        first = next(iter(self._blocks[block]), None)
        of_block = [g for g in self._optimizer.param_groups if any(p is first for p in g["params"])]
        is_left_alone = any(MARK in group or group["lr"] is None for group in of_block)
        return 1.0 if is_left_alone else self._of_block[block]

    def _announce(self) -> None:
        """Say once, as a log message of level INFO, that rates of blocks are scaled, and how to change it."""
        scaled = [f for f in map(self.factor, range(len(self._blocks))) if f != 1]
        if scaled and ranks.is_rank0():
            least, most = f"{min(scaled):.3g}", f"{max(scaled):.3g}"
            LOG.info(
                "blocks train at %s × the optimizer's learning rate, because each trains in a part of the "
                'steps only; lr_scaling="none" gives all layers one rate',
                least if least == most else f"{least} to {most}",
            )

    def apply(self, done: int, thawed: Collection[nn.Parameter]) -> None:
        """Give the param groups the rates of one step. They are put back right after it.

        Args:
            done: steps of the period that were made before.
            thawed: parameters of the layers that have thawed in this period.
        """
        self.restore()  # backward may have raised, or runs the hooks before the step does
        ramp = dict.fromkeys(thawed, (done + 1) / (self._warmup + 1)) if done < self._warmup else {}
        if not (ramp or self._factors):
            return
        self._groups = groups = self._optimizer.param_groups
        for group in groups:
            parts = _divide(group, {} if MARK in group else self._factors, ramp)
            self._swapped.append((group, parts, [dict(part) for part in parts]))
        groups[:] = [part for _, parts, _ in self._swapped for part in parts]

    def restore(self, _: Optimizer | None = None) -> None:
        """Put the param groups back as they were before `apply`, with what has been written into them since.

        Raises:
            RuntimeError: parts of one group got different values.
        """
        swapped, self._swapped = self._swapped, []
        if not swapped:
            return
        known = {id(part) for _, parts, _ in swapped for part in parts}
        added = [group for group in self._groups if id(group) not in known]
        self._groups[:] = [group for group, _, _ in swapped] + added
        for group, parts, before in swapped:
            if parts[0] is not group:
                self._write_back(group, parts, before)

    def _write_back(self, group: Group, parts: list[Group], before: list[Group]) -> None:
        written: Group = {}
        for part, was in zip(parts, before, strict=True):
            for key, value in part.items():
                is_new = key not in was or was[key] is not value
                if is_new and not _is_same(written.setdefault(key, value), value):
                    raise RuntimeError(
                        f"{type(self._optimizer).__name__} keeps {key!r} in its param groups, and it differs "
                        "between the learning rates of ends and blocks; build the optimizer over "
                        "lisatune.param_groups(model, lisatune.find_layers(model)), or set lr_scaling to none"
                    )
        group.update(written)

    def _end_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.restore()

    # ---- a step that raises

    def detach(self) -> None:
        """Put the param groups back, and unwrap `step` unless something else has wrapped it since."""
        self.restore()
        self._hook.remove()
        if vars(self._optimizer).get("step") is self._step:
            del self._optimizer.step
            if self._wrapped is not None:
                self._optimizer.step = self._wrapped  # type: ignore[method-assign]

    def _guard_step(self) -> types.MethodType:
        """Wrap `step` so that it puts the groups back also if it raises, when no hook runs after it."""
        self._wrapped = vars(self._optimizer).get("step")  # a schedule that counts steps, say
        inner = self._optimizer.step

        @functools.wraps(inner)
        def step(_: Optimizer, *args: Any, **kwargs: Any) -> Any:
            try:
                return inner(*args, **kwargs)
            finally:
                self.restore()

        bound = types.MethodType(step, self._optimizer)  # schedules ask for `step.__func__`
        self._optimizer.step = bound  # type: ignore[method-assign]
        return bound


def _divide(group: Group, factors: dict[nn.Parameter, float], ramp: dict[nn.Parameter, float]) -> list[Group]:
    """Return copies of a group, one for each rate; the group itself if its rate does not change."""
    parts: dict[float, list[int]] = {}
    for i, p in enumerate(group["params"]):
        parts.setdefault(factors.get(p, 1.0) * ramp.get(p, 1.0), []).append(i)
    if group["lr"] is None or parts.keys() <= {1.0}:
        return [group]
    return [_take_part(group, chosen, factor) for factor, chosen in parts.items()]


def _take_part(group: Group, chosen: list[int], factor: float) -> Group:
    part = dict(group)
    for key in {"params", "param_names"} & group.keys():
        part[key] = [group[key][i] for i in chosen]
    if factor != 1:
        part["lr"] = group["lr"] * factor
    return part


def _is_same(a: Any, b: Any) -> bool:
    return a is b or (not isinstance(a, Tensor) and bool(a == b))
