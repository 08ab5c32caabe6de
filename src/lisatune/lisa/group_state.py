"""Optimizers that count steps per param group, which a block that thaws anew cannot live with.

Adam divides its moments by 1 - beta^t, because they start at zero. torch counts t per parameter, in
`state[p]["step"]`, so the count goes when LISA releases the state of a block. Some optimizers count in the
param group instead (`group["step"]`, `group["k"]`), and others keep there what they have learnt so far
(Prodigy's `d`). There the moments of a block that thaws start at zero while the count says thousands, and its
first updates are wrong by a factor. No error shows it.

Whether it matters depends on the optimizer: Lion counts and never reads the count. So it is tried: one
parameter of each group gets its first update from a copy of the optimizer with the group as it is now, and
from a copy with a new group. Numbers that grow with training (Prodigy's `d`) are looked at in each period.
"""

import copy
import math
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lisatune.distributed.shards import has_values
from lisatune.lisa.frozen_state import StatePolicy
from lisatune.optim.adamw import AdamW

__all__ = ["GroupState"]

TOLERANCE = 0.01
"""How far the two first updates may differ, relative to the larger one."""

LATE = 1000
"""Step at which a block thaws in the trial."""

LARGEST = 1 << 22
"""Elements of the largest parameter that is tried."""


class GroupState:
    """Watches the first steps of an optimizer for state in its param groups that new moments need.

    Args:
        optimizer: the one that LISA is attached to.
        policy: what LISA does to the state of blocks that freeze.
    """

    def __init__(self, optimizer: Optimizer, policy: StatePolicy) -> None:
        self._optimizer, self._policy = optimizer, policy
        self._before: list[dict[str, Any]] | None = None
        # Ours counts steps in a group too, to seed its rounding. In a memory plan nothing can be tried.
        has_shapes_only = not all(has_values(p) for group in optimizer.param_groups for p in group["params"])
        self._steps_seen, self._is_known = 0, isinstance(optimizer, AdamW) or has_shapes_only

    def before_step(self, *, ends_period: bool) -> None:
        """Note what the param groups hold, before the first step and before the last one of each period."""
        looks = not self._is_known and (ends_period or self._steps_seen == 0)
        self._before = [_copy_numbers(group) for group in self._optimizer.param_groups] if looks else None
        self._steps_seen += 1

    def after_step(self) -> None:
        """Try the first update of a block, if the step has changed numbers in the groups.

        Call it while the gradients of the step still exist.

        Raises:
            ValueError: the first updates of blocks that thaw would be wrong, and the policy releases state.
        """
        before_G, self._before = self._before or [], None
        for group, before in zip(self._optimizer.param_groups, before_G, strict=False):
            numbers = _copy_numbers(group)
            changed = {key: value - before.get(key, 0) for key, value in numbers.items()}
            changed = {key: change for key, change in changed.items() if change != 0}
            if changed and not self._is_known:
                self._judge(group, changed)

    def _judge(self, group: dict[str, Any], changed: dict[str, float]) -> None:
        kind, keys = type(self._optimizer).__name__, " and ".join(map(repr, [*changed][:3]))
        kept = f"{kind} keeps {keys} per param group, not per parameter"
        size = _compare_first_updates(self._optimizer, group, changed)
        if size is None:
            return
        self._is_known = True
        if math.isnan(size):
            warnings.warn(
                f"{kept}, and what that does to a block that thaws could not be tried; its first updates may "
                "be too large or too small, so compare with lisatune.AdamW",
                stacklevel=2,
            )
            return
        what = f"{kept}, so the first update of a block that thaws late is {size:.3g} times what it must be"
        if self._policy in ("keep", "cpu"):
            warnings.warn(f"{what}, once for each block; lisatune.AdamW has no such error", stacklevel=2)
            return
        raise ValueError(
            f"{what}, and state={self._policy!r} starts a block anew at each visit; use an optimizer that "
            "counts steps per parameter, such as lisatune.AdamW, or state='keep' or 'cpu', where only a "
            "block's first visit is wrong"
        )


def _copy_numbers(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of a param group, but for its learning rate, which LISA's warm-up changes."""
    numbers = {}
    for key, value in group.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if key not in ("lr", "initial_lr") and (
            is_number or (isinstance(value, Tensor) and value.numel() == 1)
        ):
            numbers[key] = float(value)
    return numbers


def _compare_first_updates(
    optimizer: Optimizer, group: dict[str, Any], changed: Mapping[str, float]
) -> float | None:
    """Compare the first update of new parameters in this group and in a new one.

    Args:
        optimizer: copies of it without state make the updates.
        group: one of its param groups.
        changed: by how much a step changes each number of the group. What counts steps is set to LATE.

    Returns:
        The update's norm in this group divided by that in a new one; None if the two updates are equal, NaN
        if the optimizer cannot make them.
    """
    counts = [key for key, change in changed.items() if change >= 1 and change == int(change)]
    late = {**group, **{key: _fill(group[key], LATE) for key in counts}}
    rest = {key: value for key, value in group.items() if key not in changed}
    known = {key: optimizer.defaults[key] for key in changed if key in optimizer.defaults}
    zeros = {key: _fill(group[key], 0) for key in changed}
    for parameter in _choose_parameters(group):
        now = _make_first_update(optimizer, late, parameter)
        right = _make_first_update(optimizer, {**rest, **known}, parameter)
        if right is None:  # the group had these numbers from its start
            right = _make_first_update(optimizer, {**rest, **zeros, **known}, parameter)
        if now is None or right is None:
            return math.nan
        if (now - right).norm() > TOLERANCE * max(now.norm(), right.norm()):
            return float(now.norm() / right.norm())  # inf if a new optimizer skips its first step
    return None


def _fill(value: Any, number: int) -> Any:
    return torch.full_like(value, number) if isinstance(value, Tensor) else type(value)(number)


def _choose_parameters(group: Mapping[str, Any]) -> list[nn.Parameter]:
    """Return the smallest parameter with a gradient of each number of dimensions."""
    chosen: dict[int, nn.Parameter] = {}
    for p in group["params"]:
        fits = p.grad is not None and not p.grad.is_sparse and p.numel() <= LARGEST and bool(p.grad.any())
        if fits and (p.ndim not in chosen or p.numel() < chosen[p.ndim].numel()):
            chosen[p.ndim] = p
    return list(chosen.values())


def _make_first_update(
    optimizer: Optimizer, group: Mapping[str, Any], parameter: nn.Parameter
) -> Tensor | None:
    """Return the change of a copy of a parameter in one step of a copy of the optimizer without state.

    None if the step raises: the optimizer needs more than gradients, or a number that the group lacks.
    """
    assert parameter.grad is not None
    twin = nn.Parameter(parameter.detach().float().clone())
    before, twin.grad = twin.detach().clone(), parameter.grad.detach().float().clone()
    trial = object.__new__(type(optimizer))
    own = {key: copy.copy(value) for key, value in vars(optimizer).items() if key not in ("step", "state")}
    hooks = (key for key in own if key.startswith("_optimizer_") and key.endswith("_hooks"))
    vars(trial).update({**own, **{key: OrderedDict() for key in hooks}})
    numbers = {key: copy.copy(value) for key, value in group.items() if key not in ("params", "param_names")}
    if numbers.get("lr") == 0:  # in the first step of many schedules
        numbers["lr"] = optimizer.defaults.get("lr") or 1e-3
    trial.param_groups, trial.state = [{**numbers, "params": [twin]}], defaultdict(dict)
    devices = [twin.device] if twin.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            type(optimizer).step(trial)
    except Exception:
        return None
    return twin.detach() - before if trial.state.get(twin) else torch.zeros_like(before)
